//! Device buffers with guards, random inputs, comparisons.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stickbreak_kernels::KernelError;
use stickbreak_kernels::cuda::{DeviceElement, DeviceMut, DeviceRef, Queue, Scratch};

/// The types that kernels compute on.
pub trait Number: DeviceElement + PartialEq + std::fmt::Debug {
    /// Largest relative error of a tensor, and of a row of it, after one rounding to this type.
    const BOUNDS: (f64, f64);
    const NAME: &'static str;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u32;
    fn from_bits(bits: u32) -> Self;
}
impl Number for f32 {
    const BOUNDS: (f64, f64) = (2e-5, 1e-4);
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
    fn from_bits(bits: u32) -> Self {
        f32::from_bits(bits)
    }
}
impl Number for bf16 {
    // One rounding is 2^-8 at most.
    const BOUNDS: (f64, f64) = (4e-3, 5e-3);
    const NAME: &'static str = "bf16";
    fn from_f64(x: f64) -> Self {
        // from_f64 drops bits before it rounds.
        bf16::from_f32(x as f32)
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
    fn from_bits(bits: u32) -> Self {
        bf16::from_bits(bits as u16)
    }
}

pub fn queue() -> Queue {
    Queue::open(0).unwrap()
}

/// Elements before and after a buffer, and what they hold.
const GUARD: usize = 16;
const POISON: f64 = f64::NAN;

/// Device memory of `len` elements between guards. `shift` elements move it away from a 16-byte boundary.
pub struct Buffer {
    memory: Scratch,
    start: usize,
    len: usize,
}

impl Buffer {
    pub fn new<T: Number>(queue: &Queue, data: &[f64], shift: usize) -> Self {
        let start = GUARD + shift;
        let mut host = vec![T::from_f64(POISON); start];
        host.extend(data.iter().map(|&x| T::from_f64(x)));
        host.extend([T::from_f64(POISON); GUARD]);
        Self { memory: queue.upload(&host).unwrap(), start, len: data.len() }
    }

    pub fn poisoned<T: Number>(queue: &Queue, len: usize, shift: usize) -> Self {
        Self::new::<T>(queue, &vec![POISON; len], shift)
    }

    pub fn get(&self) -> DeviceRef<'_> {
        self.memory.as_ref().slice(self.start..self.start + self.len)
    }

    pub fn get_mut(&mut self) -> DeviceMut<'_> {
        self.memory.as_mut().into_slice(self.start..self.start + self.len)
    }

    /// What the memory holds now. Fails if a guard was written.
    #[track_caller]
    pub fn read<T: Number>(&self, queue: &Queue) -> Vec<f64> {
        self.raw::<T>(queue).into_iter().map(T::to_f64).collect()
    }

    #[track_caller]
    pub fn raw<T: Number>(&self, queue: &Queue) -> Vec<T> {
        let all: Vec<T> = queue.download(self.memory.as_ref()).unwrap();
        let poison = T::from_f64(POISON).bits();
        for (i, x) in all.iter().enumerate() {
            let inside = (self.start..self.start + self.len).contains(&i);
            assert!(
                inside || x.bits() == poison,
                "element {} before or behind the buffer was written",
                i as i64 - self.start as i64
            );
        }
        all[self.start..self.start + self.len].to_vec()
    }

    pub fn bits<T: Number>(&self, queue: &Queue) -> Vec<u32> {
        self.raw::<T>(queue).into_iter().map(T::bits).collect()
    }
}

/// Numbers in -2 .. 2 that bf16 represents exactly.
pub fn random(seed: u64, length: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| f64::from(rng.random_range(-128..128i32)) / 64.0).collect()
}

/// The same, in 0.25 .. 2.
pub fn positive(seed: u64, length: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| f64::from(rng.random_range(16..128i32)) / 64.0).collect()
}

pub fn random_ids(seed: u64, length: usize, below: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| rng.random_range(0..below)).collect()
}

/// Fails unless `|x - reference|` is within the bounds in the 2-norm: relative to the reference (absolute for a zero one),
/// and for every row of `width` relative to the larger of its norm and the root mean square of the rows' norms.
#[track_caller]
pub fn assert_within(what: &str, (tensor, row): (f64, f64), x: &[f64], reference: &[f64], width: usize) {
    assert_eq!(x.len(), reference.len(), "{what}: length");
    if x.is_empty() {
        return;
    }
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error: Vec<f64> = x.iter().zip(reference).map(|(a, b)| a - b).collect();
    let size = norm(reference);
    let relative = if size > 0.0 { norm(&error) / size } else { norm(&error) };
    assert!(relative <= tensor, "{what}: relative error {relative:e} above {tensor:e}");
    let width = width.max(1);
    let typical = size / (x.len().div_ceil(width) as f64).sqrt();
    for (r, (error, reference)) in error.chunks(width).zip(reference.chunks(width)).enumerate() {
        let scale = norm(reference).max(typical);
        let relative = if scale > 0.0 { norm(error) / scale } else { norm(error) };
        assert!(relative <= row, "{what}: relative error {relative:e} of row {r} above {row:e}");
    }
}

/// Fails at the first element that differs.
#[track_caller]
pub fn assert_same<T: PartialEq + std::fmt::Debug>(what: &str, found: &[T], expected: &[T]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(found == expected, "{what}: element {i} is {found:?}, not {expected:?}");
    }
}

/// Runs something twice and fails if the bits differ.
#[track_caller]
pub fn twice<R: PartialEq>(what: &str, mut body: impl FnMut() -> R) -> R {
    let first = body();
    assert!(first == body(), "{what}: the same launch gave other bits");
    first
}

/// The numbers behind bits.
pub fn values<T: Number>(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&bits| T::from_bits(bits).to_f64()).collect()
}

#[track_caller]
pub fn assert_refused(result: Result<(), KernelError>, needles: &[&str]) {
    let message = result.expect_err("must be refused").to_string();
    for needle in needles {
        assert!(message.contains(needle), "{message:?} lacks {needle:?}");
    }
}

/// Rounds to a type.
pub fn rounded<T: Number>(x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| T::from_f64(x).to_f64()).collect()
}

/// One past the largest offset of a view.
pub fn reach(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        0
    } else {
        1 + shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>()
    }
}
