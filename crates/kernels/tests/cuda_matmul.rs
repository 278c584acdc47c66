//! Matrix products on a GPU against float64 ones on the CPU.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stickbreak_kernels::cuda::{DeviceElement, DeviceRef, Queue};
use stickbreak_kernels::matmul::{self, MatmulSpec, MatrixStrides};

trait Number: DeviceElement {
    fn from_f32(x: f32) -> Self;
    fn to_f64(self) -> f64;
}
impl Number for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}
impl Number for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

fn random<T: Number>(len: usize, seed: u64) -> Vec<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| T::from_f32((rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0)).collect()
}

/// Error of `C = alpha A B + beta C` relative to the float64 product, in the Frobenius norm.
fn error<I: Number, O: Number>(queue: &Queue, spec: &MatmulSpec, alpha: f32, beta: f32) -> f64 {
    let reach =
        |s: MatrixStrides, r: usize, c: usize| (spec.batch - 1) * s.batch + (r - 1) * s.row + (c - 1) * s.column + 1;
    let a = random::<I>(reach(spec.a, spec.m, spec.k), 1);
    let b = random::<I>(reach(spec.b, spec.k, spec.n), 2);
    // With beta = 0 what C held must not survive, NaN included.
    let c = match beta {
        0.0 => vec![O::from_f32(f32::NAN); reach(spec.c, spec.m, spec.n)],
        _ => random::<O>(reach(spec.c, spec.m, spec.n), 3),
    };
    let (device_a, device_b, mut device_c) =
        (queue.upload(&a).unwrap(), queue.upload(&b).unwrap(), queue.upload(&c).unwrap());
    matmul::cuda::matmul(queue, spec, alpha, device_a.as_ref(), device_b.as_ref(), beta, &mut device_c.as_mut())
        .unwrap();
    let found: Vec<O> = queue.download(device_c.as_ref()).unwrap();
    let wide = |x: &[I]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let mut expected: Vec<f64> = c.iter().map(|x| x.to_f64()).collect();
    matmul::cpu::matmul(spec, f64::from(alpha), &wide(&a), &wide(&b), f64::from(beta), &mut expected).unwrap();
    let (mut difference, mut norm) = (0.0, 0.0);
    for batch in 0..spec.batch {
        for row in 0..spec.m {
            for column in 0..spec.n {
                let at = batch * spec.c.batch + row * spec.c.row + column * spec.c.column;
                difference += (found[at].to_f64() - expected[at]).powi(2);
                norm += expected[at].powi(2);
            }
        }
    }
    (difference / norm).sqrt()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_in_every_layout_agree_with_float64() {
    let queue = Queue::open(0).unwrap();
    for (m, n, k) in [(64, 96, 128), (17, 33, 65), (1, 40, 16), (40, 1, 16), (1, 1, 8), (7, 5, 1)] {
        for layout in 0..8 {
            let strides = |bit: usize, rows: usize, columns: usize| {
                let swapped = MatrixStrides::row_major(columns, rows).transposed();
                if layout >> bit & 1 == 0 { MatrixStrides::row_major(rows, columns) } else { swapped }
            };
            for batch in [1, 3] {
                let spec = MatmulSpec { batch, m, n, k, a: strides(0, m, k), b: strides(1, k, n), c: strides(2, m, n) };
                for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0)] {
                    let errors = [
                        error::<f32, f32>(&queue, &spec, alpha, beta),
                        error::<bf16, f32>(&queue, &spec, alpha, beta),
                        error::<bf16, bf16>(&queue, &spec, alpha, beta),
                    ];
                    assert!(errors[0] < 2e-6 && errors[1] < 2e-6 && errors[2] < 4e-3, "{errors:?} for {spec:?}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn views_into_wider_rows_and_a_shared_factor() {
    let queue = Queue::open(0).unwrap();
    let a = MatrixStrides { row: 80, column: 1, batch: 80 * 24 };
    let b = MatrixStrides { row: 56, column: 1, batch: 0 };
    let c = MatrixStrides { row: 72, column: 1, batch: 72 * 24 };
    let spec = MatmulSpec { batch: 2, m: 24, n: 56, k: 64, a, b, c };
    let found = error::<bf16, bf16>(&queue, &spec, 1.0, 0.0);
    assert!(found < 4e-3, "{found}");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_same_product_twice_has_the_same_bits() {
    let queue = Queue::open(0).unwrap();
    let (m, n, k) = (1024, 2816, 8192);
    let spec = MatmulSpec {
        batch: 1,
        m,
        n,
        k,
        a: MatrixStrides::row_major(k, m).transposed(),
        b: MatrixStrides::row_major(k, n),
        c: MatrixStrides::row_major(m, n),
    };
    let (a, b) = (queue.upload(&random::<bf16>(m * k, 1)).unwrap(), queue.upload(&random::<bf16>(k * n, 2)).unwrap());
    let run = || {
        let mut c = queue.upload(&vec![0.25f32; m * n]).unwrap();
        matmul::cuda::matmul(&queue, &spec, 1.0, a.as_ref(), b.as_ref(), 1.0, &mut c.as_mut()).unwrap();
        queue.download::<f32>(c.as_ref()).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn wrong_calls_are_refused() {
    let queue = Queue::open(0).unwrap();
    let spec = MatmulSpec {
        batch: 1,
        m: 4,
        n: 4,
        k: 4,
        a: MatrixStrides::row_major(4, 4),
        b: MatrixStrides::row_major(4, 4),
        c: MatrixStrides::row_major(4, 4),
    };
    let short = queue.upload(&[0f32; 15]).unwrap();
    let full = queue.upload(&[0f32; 16]).unwrap();
    let half = queue.upload(&[bf16::ZERO; 16]).unwrap();
    let mut c = queue.upload(&[0f32; 16]).unwrap();
    let mut call = |a: DeviceRef<'_>, b: DeviceRef<'_>| {
        matmul::cuda::matmul(&queue, &spec, 1.0, a, b, 0.0, &mut c.as_mut()).unwrap_err().to_string()
    };
    let message = call(short.as_ref(), full.as_ref());
    assert!(message.contains("15") && message.contains("16"), "{message}");
    let message = call(half.as_ref(), full.as_ref());
    assert!(message.contains("bf16 x f32"), "{message}");
}
