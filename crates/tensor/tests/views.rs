//! Views agree with naive index arithmetic, whatever they are composed of, and errors name the op and both shapes.

mod support;

use proptest::prelude::*;
use stickbreak_tensor::ops::{BinaryOp, UnaryOp};
use stickbreak_tensor::{DType, Shape, Tensor, TensorError};
use support::{Naive, apply, indices, numbered, scattered, seen, shape, step, viewed};

/// What an op does to two numbers.
type Scalar = fn(f64, f64) -> f64;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn composed_views_agree_with_the_index_model(
        shape in shape(),
        steps in prop::collection::vec(step(), 0..10),
        dtype in prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::U32, DType::I32]),
    ) {
        let mut naive = numbered(&shape, 1);
        let mut tensor = Tensor::from_vec(naive.values.clone(), shape).unwrap().to_dtype(dtype).unwrap();
        for step in &steps {
            (tensor, naive) = apply(step, &tensor, &naive);
            prop_assert_eq!(&seen(&tensor), &naive, "after {:?}", step);
            prop_assert_eq!(tensor.dtype(), dtype);
            prop_assert_eq!(tensor.elements(), naive.values.len());
        }
    }

    #[test]
    fn contiguous_keeps_the_elements_and_copies_only_if_it_must((tensor, naive) in viewed()) {
        let contiguous = tensor.contiguous().unwrap();
        prop_assert!(contiguous.is_contiguous());
        prop_assert_eq!(contiguous.shares_storage(&tensor), tensor.is_contiguous());
        prop_assert_eq!(&seen(&contiguous), &naive);
        let copy = tensor.copy().unwrap();
        prop_assert!(copy.is_contiguous() && copy.is_unique());
        prop_assert_eq!(&seen(&copy), &naive);
    }

    #[test]
    fn broadcast_shapes_follow_numpys_rule(a in shape(), b in shape()) {
        let rank = a.len().max(b.len());
        let padded = |s: &[usize]| [vec![1; rank - s.len()], s.to_vec()].concat();
        let pairs: Vec<_> = padded(&a).into_iter().zip(padded(&b)).collect();
        let fits = pairs.iter().all(|&(x, y)| x == y || x == 1 || y == 1);
        let (a, b) = (Shape::from(a), Shape::from(b));
        match a.broadcast(&b, "test") {
            Ok(shape) => {
                prop_assert!(fits);
                let expected: Vec<usize> = pairs.iter().map(|&(x, y)| if x == 1 { y } else { x }).collect();
                prop_assert_eq!(&shape[..], &expected[..]);
                prop_assert_eq!(b.broadcast(&a, "test").unwrap(), shape);
            }
            Err(error) => {
                prop_assert!(!fits);
                let message = error.to_string();
                prop_assert!(message.contains(&a.to_string()) && message.contains(&b.to_string()), "{}", message);
            }
        }
    }

    #[test]
    fn broadcast_to_takes_what_broadcasts_and_nothing_else(a in shape(), b in shape()) {
        let tensor = Tensor::zeros(a.clone(), DType::F32);
        let (from, to) = (Shape::from(a), Shape::from(b));
        let fits = from.broadcast(&to, "test").is_ok_and(|shape| shape == to);
        prop_assert_eq!(tensor.broadcast_to(&to).is_ok(), fits);
        prop_assert_eq!(Tensor::zeros(&to, DType::F32).sum_to(&from).is_ok(), fits);
    }

    #[test]
    fn arithmetic_on_views_broadcasts((a, na) in viewed(), (b, nb) in viewed()) {
        let shape = match a.shape().broadcast(b.shape(), "test") {
            Ok(shape) if shape.elements() < 20_000 => shape,
            _ => return Ok(()),
        };
        let cases: [(BinaryOp, Scalar); 4] = [
            (BinaryOp::Add, |a, b| a + b),
            (BinaryOp::Subtract, |a, b| a - b),
            (BinaryOp::Multiply, |a, b| a * b),
            (BinaryOp::Divide, |a, b| a / b),
        ];
        for (op, expected) in cases {
            let expected = Naive::from_fn(&shape, |i| expected(na.at_broadcast(i), nb.at_broadcast(i)));
            let found = seen(&a.binary(op, &b).unwrap());
            // Bits, for 0 / 0 is a NaN that equals nothing.
            let bits = |n: &Naive| n.values.iter().map(|x| x.to_bits() & !(1 << 63)).collect::<Vec<_>>();
            prop_assert_eq!(&found.shape, &expected.shape);
            prop_assert_eq!(bits(&found), bits(&expected), "{:?}", op);
        }
        let square = Naive { values: na.values.iter().map(|x| x * x).collect(), ..na.clone() };
        prop_assert_eq!(seen(&a.unary(UnaryOp::Square).unwrap()), square);
    }

    #[test]
    fn sums_of_views((tensor, naive) in viewed(), picks in prop::collection::vec(any::<bool>(), 8)) {
        let rank = naive.shape.len();
        let axes: Vec<usize> = (0..rank).filter(|&d| picks[d % picks.len()]).collect();
        let mut to = naive.shape.clone();
        axes.iter().for_each(|&d| to[d] = 1);
        let mut expected = Naive { shape: to.clone(), values: vec![0.0; to.iter().product()] };
        for index in indices(&naive.shape) {
            let at = index.iter().enumerate().fold(0, |flat, (d, &i)| flat * to[d] + if to[d] == 1 { 0 } else { i });
            expected.values[at] += naive.at(&index);
        }
        prop_assert_eq!(&seen(&tensor.sum(&axes).unwrap()), &expected);
        let total: f64 = naive.values.iter().sum();
        prop_assert_eq!(tensor.sum_all().unwrap().to_scalar().unwrap(), total);
        prop_assert_eq!(tensor.sum_of_squares().unwrap(), naive.values.iter().map(|x| x * x).sum::<f64>());
    }

    #[test]
    fn sum_to_is_the_transpose_of_broadcast_to(
        small in shape(), times in 1..4usize, lead in prop::collection::vec(1..3usize, 0..3), seed in any::<u64>(),
    ) {
        let large: Vec<usize> =
            lead.into_iter().chain(small.iter().map(|&n| if n == 1 { times } else { n })).collect();
        let (x, y) = (numbered(&small, seed), numbered(&large, seed ^ 1));
        let tensor = |n: &Naive| Tensor::from_vec(n.values.clone(), n.shape.clone()).unwrap();
        // <broadcast(x), y> = <x, sum_to(y)>, in whole numbers and so exactly.
        let dot = |a: &Naive, b: &Naive| a.values.iter().zip(&b.values).map(|(a, b)| a * b).sum::<f64>();
        let summed = seen(&tensor(&y).sum_to(&Shape::from(small)).unwrap());
        prop_assert_eq!(dot(&x.broadcast_to(&large), &y), dot(&x, &summed));
    }

    #[test]
    fn add_assign_scaled_writes_into_strided_views_and_nowhere_else(
        shape in shape(), keys in prop::collection::vec(0..100usize, 4), gap in 0..4usize,
        (source_keys, source_gap) in (prop::collection::vec(0..100usize, 4), 0..3usize), alpha in -3..4i32,
    ) {
        let (start, x) = (numbered(&shape, 3), numbered(&shape, 4));
        let target = scattered(&start, &keys, gap);
        let source = scattered(&x, &source_keys, source_gap);
        let storage: f64 = target.read::<f64>().unwrap().iter().sum();
        target.add_assign_scaled(f64::from(alpha), &source).unwrap();
        let expected = start.values.iter().zip(&x.values).map(|(a, b)| a + f64::from(alpha) * b).collect();
        prop_assert_eq!(seen(&target), Naive { values: expected, ..start });
        // The sum over the whole memory grew by what was added to the view: the gaps are as they were.
        let after: f64 = target.read::<f64>().unwrap().iter().sum();
        prop_assert_eq!(after - storage, f64::from(alpha) * x.values.iter().sum::<f64>());
        prop_assert_eq!(&seen(&source), &x);
    }
}

#[test]
fn shapes_too_large_for_memory_are_refused_instead_of_wrapping() {
    let huge = [1usize << 33, 1 << 33];
    assert_eq!(Shape::from(huge).elements(), usize::MAX);
    assert_eq!(Shape::from([usize::MAX, 0, 3]).elements(), 0);
    assert!(Tensor::from_vec(Vec::<f32>::new(), huge).is_err());
    assert!(Tensor::zeros([4], DType::F32).reshape([usize::MAX, 2]).is_err());
    assert!(Tensor::zeros([0], DType::F32).reshape([usize::MAX, 2, 0]).is_ok());
    assert!(Tensor::zeros([4], DType::F32).narrow(0, usize::MAX, 2).is_err());
}

#[test]
fn empty_views_beyond_the_end_can_be_read() {
    let tensor = Tensor::ones([3, 2], DType::F32).narrow(0, 3, 0).unwrap().narrow(1, 2, 0).unwrap();
    assert!(tensor.to_f64_vec().unwrap().is_empty() && tensor.copy().unwrap().to_f64_vec().unwrap().is_empty());
    let column = Tensor::zeros([0, 3], DType::F32).narrow(1, 2, 1).unwrap();
    assert!(column.to_f64_vec().unwrap().is_empty());
    assert_eq!(column.sum(&[0]).unwrap().to_f64_vec().unwrap(), [0.0]);
}

#[test]
fn errors_name_the_op_and_both_shapes() {
    let (a, b) = (Tensor::zeros([2, 3], DType::F32), Tensor::zeros([4, 5], DType::F32));
    let errors: [(&str, TensorError); 7] = [
        ("add", a.add(&b).unwrap_err()),
        ("div", a.div(&b).unwrap_err()),
        ("matmul", a.matmul(&b).unwrap_err()),
        ("broadcast_to", a.broadcast_to([4, 5]).unwrap_err()),
        ("sum_to", a.sum_to(b.shape()).unwrap_err()),
        ("reshape", a.reshape([4, 5]).unwrap_err()),
        ("add_assign_scaled", a.add_assign_scaled(1.0, &b).unwrap_err()),
    ];
    for (op, error) in errors {
        let message = error.to_string();
        assert!(message.starts_with(op), "{message}");
        assert!(message.contains("[2, 3]") && message.contains("[4, 5]"), "{message}");
    }
    let out_of_range: [(&str, TensorError); 5] = [
        ("narrow", a.narrow(1, 2, 2).unwrap_err()),
        ("permute", a.permute(&[0, 0]).unwrap_err()),
        ("unsqueeze", a.unsqueeze(3).unwrap_err()),
        ("dim", a.transpose(0, 2).unwrap_err()),
        ("dim", a.sum(&[5]).unwrap_err()),
    ];
    for (op, error) in out_of_range {
        let message = error.to_string();
        assert!(message.starts_with(op) && message.contains("[2, 3]"), "{message}");
    }
    let message = a.add(&a.to_dtype(DType::F64).unwrap()).unwrap_err().to_string();
    assert_eq!(message, "add: right side has dtype f64, expected f32");
    assert_eq!(a.read::<f64>().err().unwrap().to_string(), "read: tensor has dtype f32, expected f64");
    assert!(a.transpose(0, 1).unwrap().write::<f32>().err().unwrap().to_string().contains("strides [1, 3]"));
}

#[test]
fn writing_into_memory_that_is_also_read_is_refused() {
    let x = Tensor::ones([4, 4], DType::F64);
    let view = x.transpose(0, 1).unwrap();
    let row = x.narrow(0, 0, 1).unwrap();
    let aliased = |result: stickbreak_tensor::Result<()>, op: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, TensorError::Aliased { .. }) && error.to_string().starts_with(op), "{error}");
    };
    aliased(x.add_assign_scaled(1.0, &view), "add_assign_scaled");
    aliased(x.copy_assign(&view), "copy_assign");
    aliased(x.matmul_assign(1.0, &view, &Tensor::ones([4, 4], DType::F64), 0.0), "matmul_assign");
    aliased(x.matmul_assign(1.0, &Tensor::ones([4, 4], DType::F64), &view, 0.0), "matmul_assign");
    // Even where the views do not overlap: the rule is about storage, so it needs no proof about strides.
    aliased(row.copy_assign(&x.narrow(0, 1, 1).unwrap()), "copy_assign");
    // A view that shows one element twice cannot be written into.
    let repeated = Tensor::ones([1, 3], DType::F64).broadcast_to([2, 3]).unwrap();
    assert!(repeated.add_assign_scaled(1.0, &Tensor::ones([2, 3], DType::F64)).is_err());
    assert_eq!(x.to_f64_vec().unwrap(), [1.0; 16]);
}
