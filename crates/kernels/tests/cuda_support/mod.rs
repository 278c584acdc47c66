//! Attention problems on a GPU: numbers that bf16 holds exactly, poisoned outputs, layouts with gaps.
#![allow(dead_code, reason = "each test crate uses its own part")]

use half::bf16;
use stickbreak_kernels::attention::AttentionLayout;
use stickbreak_kernels::cuda::{DeviceElement, Queue, Scratch};

use super::attention_support::Problem;

/// An element type of the GPU kernels under test.
pub trait Number: DeviceElement + PartialEq + std::fmt::Debug {
    const NAME: &'static str;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u32;
}

impl Number for f32 {
    const NAME: &'static str = "f32";
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Number for bf16 {
    const NAME: &'static str = "bf16";
    fn from_f64(x: f64) -> Self {
        bf16::from_f64(x)
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

pub fn queue() -> Queue {
    Queue::open(0).unwrap()
}

/// A random problem whose numbers bf16 holds exactly, so that every type computes the same one.
pub fn exact(lengths: &[usize], heads: (usize, usize), head_dim: usize, spread: f64) -> Problem<f64> {
    let mut problem = Problem::<f64>::random(lengths, heads.0, heads.1, head_dim, spread);
    for values in [&mut problem.q, &mut problem.k, &mut problem.v, &mut problem.d_o, &mut problem.d_rem] {
        values.iter_mut().for_each(|x| *x = f64::from(bf16::from_f64(*x)));
    }
    problem
}

/// The contiguous layout with gaps of some elements between tokens, a different number for each tensor.
pub fn with_gaps(layout: &AttentionLayout, gap: usize) -> AttentionLayout {
    AttentionLayout {
        query_stride: layout.query_stride + gap,
        key_stride: layout.key_stride + 2 * gap,
        value_stride: layout.value_stride + 3 * gap,
        output_stride: layout.output_stride + gap,
        ..*layout
    }
}

/// Contiguous rows on the device at a stride, NaN in the gaps.
pub fn upload<T: Number>(queue: &Queue, values: &[f64], width: usize, stride: usize) -> Scratch {
    let mut data = Vec::with_capacity(values.len() / width.max(1) * stride);
    for row in values.chunks(width) {
        data.extend(row.iter().map(|&x| T::from_f64(x)));
        data.resize(data.len() + stride - width, T::from_f64(f64::NAN));
    }
    queue.upload(&data).unwrap()
}

/// NaN everywhere: whatever is not written shows.
pub fn poisoned<T: Number>(queue: &Queue, len: usize) -> Scratch {
    queue.upload(&vec![T::from_f64(f64::NAN); len]).unwrap()
}

pub fn download<T: Number>(queue: &Queue, memory: &Scratch) -> Vec<T> {
    queue.download(memory.as_ref()).unwrap()
}

pub fn wide<T: Number>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&x| x.to_f64()).collect()
}

pub fn same_bits<T: Number>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| a.bits() == b.bits())
}

/// The rows out of a strided output, whose gaps must be untouched.
pub fn without_gaps<T: Number>(values: &[T], width: usize, stride: usize) -> Vec<T> {
    assert!(values.chunks(stride).all(|row| row[width..].iter().all(|x| x.to_f64().is_nan())), "a gap was written");
    values.chunks(stride).flat_map(|row| row[..width].to_vec()).collect()
}

/// Ends the process if it is not dropped within some seconds: a kernel that hangs cannot be stopped in any other way.
/// `STICKBREAK_PATIENCE` in the environment is a number of seconds to wait instead, for runs under a sanitizer.
pub struct Watchdog(std::sync::mpsc::Sender<()>);

impl Watchdog {
    pub fn new(what: impl Into<String>, seconds: u64) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let what = what.into();
        let asked = std::env::var("STICKBREAK_PATIENCE").ok().and_then(|text| text.parse().ok());
        let seconds = asked.unwrap_or(seconds);
        std::thread::spawn(move || {
            let outcome = receiver.recv_timeout(std::time::Duration::from_secs(seconds));
            if outcome == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{what} did not end within {seconds} s");
                // Not an exit in order: the driver's part of that may wait for the kernel.
                std::process::abort();
            }
        });
        Self(sender)
    }
}
