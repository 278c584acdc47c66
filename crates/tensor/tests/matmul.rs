//! Matrix products of random shapes, batches and layouts against sums in float64.

mod support;

use proptest::prelude::*;
use stickbreak_tensor::{DType, Tensor};
use support::{Naive, indices, numbered, scattered, seen};

/// `[.., m, k] x [.., k, n]` by definition.
fn product(a: &Naive, b: &Naive, batch: &[usize]) -> Naive {
    let (m, k) = (a.shape[a.shape.len() - 2], a.shape[a.shape.len() - 1]);
    let n = b.shape[b.shape.len() - 1];
    let (a, b) = (a.broadcast_to(&[batch, &[m, k]].concat()), b.broadcast_to(&[batch, &[k, n]].concat()));
    Naive::from_fn(&[batch, &[m, n]].concat(), |index| {
        let (batch, place) = index.split_at(batch.len());
        (0..k).map(|l| a.at(&[batch, &[place[0], l]].concat()) * b.at(&[batch, &[l, place[1]]].concat())).sum()
    })
}

/// Sizes m, k, n and the leading dimensions of both sides, which broadcast against each other.
fn sizes() -> impl Strategy<Value = ([usize; 3], Vec<usize>, Vec<usize>, Vec<usize>)> {
    let size = || prop_oneof![1 => Just(0usize), 10 => 1..7usize, 2 => 15..20usize];
    let batch = prop::collection::vec((1..4usize, 0..3u8), 0..3);
    ([size(), size(), size()], batch, 0..3usize, 0..3usize).prop_map(|(mkn, batch, skip_a, skip_b)| {
        let side = |which: u8| batch.iter().map(|&(n, one)| if one == which { 1 } else { n }).collect::<Vec<_>>();
        let (mut a, mut b) = (side(1), side(2));
        // One side may lack leading dimensions altogether.
        a.drain(..skip_a.min(a.len()));
        if a.len() == batch.len() {
            b.drain(..skip_b.min(b.len()));
        }
        let rank = a.len().max(b.len());
        let pad = |s: &[usize]| [vec![1; rank - s.len()], s.to_vec()].concat();
        let full = pad(&a).into_iter().zip(pad(&b)).map(|(x, y)| x.max(y)).collect();
        (mkn, a, b, full)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn products_of_any_layout(
        ([m, k, n], batch_a, batch_b, batch) in sizes(),
        keys in prop::collection::vec(0..100usize, 8), gaps in (0..3usize, 0..3usize),
    ) {
        let (na, nb) = (numbered(&[&batch_a[..], &[m, k]].concat(), 5), numbered(&[&batch_b[..], &[k, n]].concat(), 6));
        let (a, b) = (scattered(&na, &keys[..4], gaps.0), scattered(&nb, &keys[4..], gaps.1));
        let expected = product(&na, &nb, &batch);
        // Whole numbers: every sum is exact in float64, and in float32 below 2^24.
        prop_assert_eq!(&seen(&a.matmul(&b).unwrap()), &expected);
        let single = a.to_dtype(DType::F32).unwrap().matmul(&b.to_dtype(DType::F32).unwrap()).unwrap();
        prop_assert_eq!(&seen(&single), &expected);
    }

    #[test]
    fn accumulated_products(
        ([m, k, n], _, _, batch) in sizes(), keys in prop::collection::vec(0..100usize, 8),
        alpha in -2..3i32, beta in -1..3i32, transposed in any::<bool>(),
    ) {
        let (na, nb) = (numbered(&[&batch[..], &[m, k]].concat(), 5), numbered(&[&batch[..], &[k, n]].concat(), 6));
        let (a, b) = (scattered(&na, &keys[..4], 1), scattered(&nb, &keys[4..], 1));
        let start = numbered(&[&batch[..], &[m, n]].concat(), 7);
        let rank = start.shape.len();
        let out = Tensor::from_vec(start.values.clone(), start.shape.clone()).unwrap();
        let swapped = |t: &Tensor| t.transpose(rank - 2, rank - 1).unwrap();
        let out = if transposed { swapped(&swapped(&out).copy().unwrap()) } else { out };
        let result = out.matmul_assign(f64::from(alpha), &a, &b, f64::from(beta));
        result.unwrap();
        let ab = product(&na, &nb, &batch);
        let expected = ab.values.iter().zip(&start.values).map(|(ab, c)| f64::from(alpha) * ab + f64::from(beta) * c);
        prop_assert_eq!(seen(&out), Naive { values: expected.collect(), ..start });
    }
}

#[test]
fn beta_zero_overwrites_even_nan() {
    for k in [0, 3] {
        let out = Tensor::full(f64::NAN, [2, 2], DType::F64);
        let (a, b) = (Tensor::ones([2, k], DType::F64), Tensor::ones([k, 2], DType::F64));
        out.matmul_assign(1.0, &a, &b, 0.0).unwrap();
        assert_eq!(out.to_f64_vec().unwrap(), [k as f64; 4]);
    }
}

#[test]
fn outputs_that_cannot_be_written_are_refused() {
    let (a, b) = (Tensor::ones([2, 3], DType::F64), Tensor::ones([3, 2], DType::F64));
    let wrong = Tensor::ones([3, 3], DType::F64).matmul_assign(1.0, &a, &b, 0.0).unwrap_err().to_string();
    assert!(wrong.contains("[3, 3]") && wrong.contains("[2, 2]"), "{wrong}");
    let repeated = Tensor::ones([1, 2], DType::F64).broadcast_to([2, 2]).unwrap();
    assert!(repeated.matmul_assign(1.0, &a, &b, 0.0).is_err());
    let vector = Tensor::ones([3], DType::F64);
    assert!(a.matmul(&vector).unwrap_err().to_string().contains("two dimensions"));
    assert_eq!(indices(&[2, 2]).len(), 4);
}
