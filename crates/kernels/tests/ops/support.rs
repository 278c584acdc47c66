//! Random inputs, comparisons and finite differences.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stickbreak_kernels::KernelError;

/// Uniform numbers in -1 .. 1.
pub fn random(seed: u64, length: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Uniform integers below a bound.
pub fn random_ids(seed: u64, length: usize, below: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| rng.random_range(0..below)).collect()
}

/// The same numbers in float32.
pub fn single(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// The same numbers in float64.
pub fn double(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Fails unless `|x - reference| <= tolerance * |reference|` in the 2-norm (absolute for a zero reference).
#[track_caller]
pub fn assert_close(what: &str, x: &[f64], reference: &[f64], tolerance: f64) {
    assert_eq!(x.len(), reference.len(), "{what}: length");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut x.iter().zip(reference).map(|(a, b)| a - b));
    let size = norm(&mut reference.iter().copied());
    let relative = if size > 0.0 { error / size } else { error };
    assert!(relative <= tolerance, "{what}: relative error {relative:e} above {tolerance:e}");
}

/// Fails unless `gradient` is the derivative of `loss` at `x` by central differences in float64.
#[track_caller]
pub fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    let step = 1e-5;
    let mut at = x.to_vec();
    let numeric: Vec<f64> = (0..x.len())
        .map(|i| {
            at[i] = x[i] + step;
            let above = loss(&at);
            at[i] = x[i] - step;
            let below = loss(&at);
            at[i] = x[i];
            (above - below) / (2.0 * step)
        })
        .collect();
    assert_close(what, gradient, &numeric, 1e-8);
}

/// Sum of products: the loss whose gradient with respect to `x` is `direction`.
pub fn dot(x: &[f64], direction: &[f64]) -> f64 {
    x.iter().zip(direction).map(|(x, d)| x * d).sum()
}

/// Fails unless the call was refused for a length, with a message that holds both numbers.
#[track_caller]
pub fn assert_length_error<T: std::fmt::Debug>(result: Result<T, KernelError>, expected: usize, found: usize) {
    let error = result.expect_err("a wrong length must be refused");
    assert!(matches!(error, KernelError::Length { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains(&format!("{found} elements")) && message.contains(&expected.to_string()), "{message}");
}

/// Runs `body` on a pool of its own.
pub fn with_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body)
}

/// Calls `body` for every index of a shape, last dimension fastest.
pub fn for_each_index(shape: &[usize], mut body: impl FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0; shape.len()];
    loop {
        body(&index);
        let mut d = shape.len();
        loop {
            if d == 0 {
                return;
            }
            d -= 1;
            index[d] += 1;
            if index[d] < shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
}

/// Where an index lies.
pub fn offset(index: &[usize], strides: &[usize]) -> usize {
    index.iter().zip(strides).map(|(i, stride)| i * stride).sum()
}

/// One past the largest offset of a view.
pub fn reach(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        0
    } else {
        1 + shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>()
    }
}
