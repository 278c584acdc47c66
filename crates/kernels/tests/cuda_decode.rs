//! Decoding on a GPU, f32 and bf16, against the CPU's float64.

mod attention_support;
mod cuda_support;

use attention_support::assert_close;
use cuda_support::{Number, download, exact, poisoned, queue, same_bits, upload, wide};
use half::bf16;
use stickbreak_kernels::attention::decode::{DecodeInputs, DecodeLayout};
use stickbreak_kernels::attention::softmax::decode::SoftmaxDecodeSpec;
use stickbreak_kernels::attention::softmax::{self, alibi_slopes};
use stickbreak_kernels::attention::stick_breaking;
use stickbreak_kernels::attention::stick_breaking::decode::StickBreakingDecodeSpec;
use stickbreak_kernels::cuda::{DeviceType, Queue};

/// Queries and caches; behind a sequence's length the caches hold NaN.
struct Step {
    layout: DecodeLayout,
    lengths: Vec<i32>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Step {
    fn new(lengths: &[usize], heads: (usize, usize), head_dim: usize, spread: f64) -> Self {
        let capacity = lengths.iter().max().unwrap() + 3;
        let layout = DecodeLayout::contiguous(lengths.len(), capacity, heads.0, heads.1, head_dim);
        let mut keys = exact(&vec![capacity; lengths.len()], heads, head_dim, spread);
        for (sequence, &length) in lengths.iter().enumerate() {
            let cache = sequence * layout.sequence_stride;
            let behind = cache + length * layout.cache_stride..cache + layout.sequence_stride;
            keys.k[behind.clone()].fill(f64::NAN);
            keys.v[behind].fill(f64::NAN);
        }
        keys.q.truncate(lengths.len() * layout.query_stride);
        Self { layout, lengths: lengths.iter().map(|&length| length as i32).collect(), q: keys.q, k: keys.k, v: keys.v }
    }

    /// Logits around `shift`, so that the stick lasts.
    fn shifted(lengths: &[usize], shift: f64) -> Self {
        let mut step = Self::new(lengths, (4, 2), 64, 0.25);
        step.q.chunks_mut(64).for_each(|row| row[0] = 8.0);
        for (sequence, &length) in lengths.iter().enumerate() {
            let cache = sequence * step.layout.sequence_stride;
            let held = &mut step.k[cache..cache + length * step.layout.cache_stride];
            held.chunks_mut(64).for_each(|row| row[0] = shift);
        }
        step
    }

    fn inputs(&self) -> DecodeInputs<'_, f64> {
        DecodeInputs { q: &self.q, k: &self.k, v: &self.v, lengths: &self.lengths }
    }

    fn rows(&self) -> usize {
        self.layout.sequences * self.layout.query_heads
    }

    fn name<T: Number>(&self, what: &str) -> String {
        format!("{what}, {} {:?} {:?}", T::NAME, self.lengths, self.layout)
    }
}

fn limits<T: Number>() -> (f64, f64) {
    if T::TYPE == DeviceType::F32 { (2e-5, 1e-4) } else { (4e-3, 1e-2) }
}

fn stick_breaking<T: Number>(queue: &Queue, step: &Step, early_exit_bits: u32) -> (Vec<T>, Vec<f32>) {
    let spec = StickBreakingDecodeSpec { early_exit_bits, ..StickBreakingDecodeSpec::new(step.layout) };
    let [q, k, v] = [&step.q, &step.k, &step.v].map(|values| upload::<T>(queue, values, 1, 1));
    let lengths = queue.upload(&step.lengths).unwrap();
    let (mut o, mut rem) = (poisoned::<T>(queue, step.q.len()), poisoned::<f32>(queue, step.rows()));
    let [q, k, v] = [q.as_ref(), k.as_ref(), v.as_ref()];
    stick_breaking::decode_cuda::decode(queue, &spec, q, k, v, lengths.as_ref(), &mut o.as_mut(), &mut rem.as_mut())
        .unwrap();
    (download(queue, &o), download(queue, &rem))
}

fn softmax<T: Number>(queue: &Queue, step: &Step, alibi: Option<Vec<f64>>) -> Vec<T> {
    let spec = SoftmaxDecodeSpec { alibi, ..SoftmaxDecodeSpec::new(step.layout) };
    let [q, k, v] = [&step.q, &step.k, &step.v].map(|values| upload::<T>(queue, values, 1, 1));
    let lengths = queue.upload(&step.lengths).unwrap();
    let mut o = poisoned::<T>(queue, step.q.len());
    let [q, k, v] = [q.as_ref(), k.as_ref(), v.as_ref()];
    softmax::decode_cuda::decode(queue, &spec, q, k, v, lengths.as_ref(), &mut o.as_mut()).unwrap();
    download(queue, &o)
}

fn check<T: Number>(queue: &Queue, step: &Step) {
    let head_dim = step.layout.head_dim;
    let (tensor, row) = limits::<T>();
    let (mut o, mut rem) = (vec![f64::NAN; step.q.len()], vec![f64::NAN; step.rows()]);
    let spec = StickBreakingDecodeSpec::new(step.layout);
    stick_breaking::decode::decode(&spec, &step.inputs(), &mut o, &mut rem).unwrap();
    // With 24 bits what a piece leaves out is below float32's rounding.
    for early_exit_bits in [0, 24] {
        let (found, found_rem) = stick_breaking::<T>(queue, step, early_exit_bits);
        assert_close(&step.name::<T>("stick-breaking o"), &wide(&found), &o, head_dim, tensor, row);
        for (found, expected) in found_rem.iter().zip(&rem) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= 2e-5 * expected + 1e-6, "{}: {found} {expected}", step.name::<T>("rem"));
        }
    }
    for alibi in [None, Some(alibi_slopes(step.layout.query_heads))] {
        let spec = SoftmaxDecodeSpec { alibi: alibi.clone(), ..SoftmaxDecodeSpec::new(step.layout) };
        softmax::decode::decode(&spec, &step.inputs(), &mut o).unwrap();
        let found = softmax::<T>(queue, step, alibi);
        assert_close(&step.name::<T>("softmax o"), &wide(&found), &o, head_dim, tensor, row);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn lengths_and_head_dims() {
    let queue = queue();
    for head_dim in [1, 5, 16, 24, 33, 64, 80, 128, 250, 256] {
        let step = Step::new(&[1, 2, 17, 0, 63, 64, 65, 129, 300], (2, 1), head_dim, 1.0);
        check::<f32>(&queue, &step);
        check::<bf16>(&queue, &step);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn groups_of_heads() {
    let queue = queue();
    for heads in [(8, 2), (8, 8), (5, 1), (12, 2), (2, 1), (16, 1)] {
        let step = Step::new(&[300, 5, 140], heads, 64, 0.5);
        check::<f32>(&queue, &step);
        check::<bf16>(&queue, &step);
    }
}

/// The stick lasts: every piece counts.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn long_caches_in_pieces() {
    let queue = queue();
    for lengths in [&[5000][..], &[3000, 0, 4100]] {
        let step = Step::shifted(lengths, -7.0);
        check::<f32>(&queue, &step);
        check::<bf16>(&queue, &step);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn early_exit_stays_within_its_bound() {
    let queue = queue();
    let step = Step::shifted(&[2000, 500], -3.0);
    let exact = stick_breaking::<f32>(&queue, &step, 0);
    let largest = step.v.chunks(64).map(|row| row.iter().fold(0.0f64, |most, x| most.max(x.abs()))).fold(0.0, f64::max);
    for bits in [4, 10] {
        let found = stick_breaking::<f32>(&queue, &step, bits);
        let bound = (-f64::from(bits)).exp2();
        for (a, b) in found.0.iter().zip(&exact.0) {
            assert!(f64::from((a - b).abs()) <= bound * largest + 1e-5, "{a} {b} at {bits} bits");
        }
        // With 4 bits something must have been left out.
        assert!(bits > 4 || !same_bits(&found.0, &exact.0));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_same_launch_gives_the_same_bits() {
    let queue = queue();
    let step = Step::new(&[3000, 77], (8, 2), 128, 0.2);
    let one = (stick_breaking::<bf16>(&queue, &step, 20), softmax::<bf16>(&queue, &step, None));
    for _ in 0..5 {
        let two = (stick_breaking::<bf16>(&queue, &step, 20), softmax::<bf16>(&queue, &step, None));
        assert!(same_bits(&one.0.0, &two.0.0) && same_bits(&one.0.1, &two.0.1) && same_bits(&one.1, &two.1));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn wrong_calls_are_refused() {
    let queue = queue();
    let layout = DecodeLayout::contiguous(2, 4, 1, 1, 2);
    let (lengths, three) = (queue.upload(&[0, -1]).unwrap(), queue.upload(&[0, 0, 0]).unwrap());
    let (q, cache, short) = (poisoned::<f32>(&queue, 4), poisoned::<f32>(&queue, 16), poisoned::<f32>(&queue, 15));
    let (mut o, mut rem) = (poisoned::<f32>(&queue, 4), poisoned::<f32>(&queue, 2));
    let spec = StickBreakingDecodeSpec::new(layout);
    let mut call = |k, lengths| {
        let v = cache.as_ref();
        let outcome = stick_breaking::decode_cuda::decode(
            &queue,
            &spec,
            q.as_ref(),
            k,
            v,
            lengths,
            &mut o.as_mut(),
            &mut rem.as_mut(),
        );
        (outcome, download::<f32>(&queue, &o), download::<f32>(&queue, &rem))
    };
    let (outcome, o, _) = call(short.as_ref(), lengths.as_ref());
    assert!(outcome.unwrap_err().to_string().contains("k has 15 elements") && o.iter().all(|x| x.is_nan()));
    // No keys: nothing is attended to and the stick is whole.
    let (outcome, o, _) = call(cache.as_ref(), three.as_ref());
    assert!(outcome.unwrap_err().to_string().contains("lengths has 3 elements") && o.iter().all(|x| x.is_nan()));
    let (outcome, o, rem) = call(cache.as_ref(), lengths.as_ref());
    outcome.unwrap();
    assert_eq!((o, rem), (vec![0.0; 4], vec![1.0; 2]));
}
