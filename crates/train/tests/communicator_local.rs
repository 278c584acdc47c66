//! Collectives of one rank, and of ranks as threads: results, order of sums, and what happens when a rank fails.

use half::bf16;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stickbreak_tensor::{DType, Tensor};
use stickbreak_train::distributed::local::LocalGroup;
use stickbreak_train::distributed::single::Single;
use stickbreak_train::distributed::{Communicator, CommunicatorError, Reduction};

const LONG: Duration = Duration::from_secs(30);

/// Runs on threads; a panic of a rank fails the test.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&dyn Communicator) -> T + Sync) -> Vec<T> {
    let results = LocalGroup::run(ranks, LONG, |communicator| work(&*communicator));
    results.into_iter().map(|result| result.expect("no rank panics")).collect()
}

/// For every number of ranks; one rank also by the communicator that is made for it.
fn on_any_ranks(work: impl Fn(&dyn Communicator) + Sync) {
    work(&Single);
    for ranks in 1..=4 {
        on_ranks(ranks, &work);
    }
}

fn numbers(values: impl IntoIterator<Item = f64>) -> Tensor {
    let values: Vec<f64> = values.into_iter().collect();
    let n = values.len();
    Tensor::from_vec(values, [n]).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

#[test]
fn all_reduce_gives_every_rank_the_sum_or_the_largest() {
    on_any_ranks(|group| {
        let (rank, ranks) = (group.rank() as f64, group.ranks() as f64);
        let tensor = numbers([rank, 10.0 * rank, 1.0]);
        group.all_reduce("sum", &tensor, Reduction::Sum).unwrap().join().unwrap();
        let sum = ranks * (ranks - 1.0) / 2.0;
        assert_eq!(values(&tensor), [sum, 10.0 * sum, ranks]);
        let tensor = numbers([rank, -rank]);
        group.all_reduce("largest", &tensor, Reduction::Max).unwrap().join().unwrap();
        assert_eq!(values(&tensor), [ranks - 1.0, 0.0]);
    });
}

#[test]
fn reduce_scatter_then_all_gather_is_all_reduce_in_place_and_apart() {
    on_any_ranks(|group| {
        let (rank, ranks) = (group.rank(), group.ranks());
        for n in [0, 1, 5] {
            let contents = |rank: usize| numbers((0..ranks * n).map(|i| ((rank + 1) * (i + 3)) as f64));
            let expected: Vec<f64> = (0..ranks * n).map(|i| ((1..=ranks).sum::<usize>() * (i + 3)) as f64).collect();
            let own = expected[rank * n..][..n].to_vec();

            let (from, to) = (contents(rank), Tensor::zeros([n], DType::F64));
            group.reduce_scatter("apart", &from, &to).unwrap().join().unwrap();
            assert_eq!(values(&to), own);
            let all = Tensor::zeros([ranks * n], DType::F64);
            group.all_gather("apart", &to, &all).unwrap().join().unwrap();
            assert_eq!(values(&all), expected);

            let arena = contents(rank);
            let part = arena.narrow(0, rank * n, n).unwrap();
            group.reduce_scatter("in place", &arena, &part).unwrap().join().unwrap();
            assert_eq!(values(&part), own);
            group.all_gather("in place", &part, &arena).unwrap().join().unwrap();
            assert_eq!(values(&arena), expected);
        }
    });
}

#[test]
fn a_bucket_is_a_part_of_an_arena_and_the_rest_is_left_alone() {
    on_any_ranks(|group| {
        let (rank, ranks) = (group.rank(), group.ranks());
        let arena = numbers(vec![1.0; 2 + ranks * 3 + 1]);
        let bucket = arena.narrow(0, 2, ranks * 3).unwrap();
        let own = bucket.narrow(0, rank * 3, 3).unwrap();
        group.reduce_scatter("bucket", &bucket, &own).unwrap().join().unwrap();
        group.all_gather("bucket", &own, &bucket).unwrap().join().unwrap();
        let mut expected = vec![ranks as f64; 2 + ranks * 3 + 1];
        for untouched in [0, 1, 2 + ranks * 3] {
            expected[untouched] = 1.0;
        }
        assert_eq!(values(&arena), expected);
    });
}

#[test]
fn broadcast_and_gathered_values_come_from_the_right_rank() {
    on_any_ranks(|group| {
        let (rank, ranks) = (group.rank(), group.ranks());
        let root = ranks - 1;
        let tensor = numbers([rank as f64, 7.0]);
        group.broadcast("weights", &tensor, root).unwrap().join().unwrap();
        assert_eq!(values(&tensor), [root as f64, 7.0]);
        // As many values as the rank's number: lengths may differ, and values keep their bits.
        let mine = vec![f64::from_bits(0x7ff8_0000_0000_1234); rank];
        let all = group.gather_values("counts", &mine).unwrap();
        assert_eq!(all.len(), ranks);
        for (other, values) in all.iter().enumerate() {
            assert_eq!(values.len(), other);
            assert!(values.iter().all(|value| value.to_bits() == 0x7ff8_0000_0000_1234));
        }
        group.barrier("end").unwrap();
    });
}

#[test]
fn sums_run_in_the_order_of_the_ranks_and_bf16_is_rounded_once() {
    // 1e16 + 1 - 1e16 is 0 in this order only; thirty repetitions, since an order by arrival would sometimes be right.
    let contents = [1e16, 1.0, -1e16];
    let small = [256.0, 1.0, 1.0];
    let sums = on_ranks(3, |group| {
        (0..30)
            .map(|_| {
                let tensor = numbers([contents[group.rank()]]);
                group.all_reduce("sum", &tensor, Reduction::Sum).unwrap().join().unwrap();
                // 256 + 1 is a tie of bfloat16 that rounds down: rounding at each step would give 256.
                let halves = Tensor::from_vec(vec![bf16::from_f64(small[group.rank()])], [1]).unwrap();
                group.all_reduce("sum", &halves, Reduction::Sum).unwrap().join().unwrap();
                (values(&tensor)[0], values(&halves)[0])
            })
            .collect::<Vec<_>>()
    });
    assert!(sums.into_iter().flatten().all(|sum| sum == (0.0, 258.0)));
}

#[test]
fn every_element_type_is_reduced() {
    on_ranks(2, |group| {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::U32, DType::I32] {
            let tensor = Tensor::full(3.0 + group.rank() as f64, [4], dtype);
            group.all_reduce("sum", &tensor, Reduction::Sum).unwrap().join().unwrap();
            assert_eq!(values(&tensor), [7.0; 4], "{dtype}");
        }
    });
}

#[test]
fn many_collectives_in_a_row_never_mix() {
    let sums = on_ranks(4, |group| {
        let mut sum = 0.0;
        for step in 0..500u32 {
            let tensor = numbers([f64::from(step) * (group.rank() + 1) as f64]);
            group.all_reduce("step", &tensor, Reduction::Sum).unwrap().join().unwrap();
            sum += values(&tensor)[0];
        }
        sum
    });
    assert_eq!(sums, [10.0 * 499.0 * 500.0 / 2.0; 4]);
}

// ---------------------------------------------------------------------------------------------- failures

/// The errors of all ranks but one, which does what `culprit` does instead of coming.
fn errors_beside(culprit: usize, timeout: Duration, act: impl Fn(Arc<dyn Communicator>) + Sync) -> Vec<String> {
    let results = LocalGroup::run(3, timeout, |group| {
        group.barrier("start").unwrap();
        if group.rank() == culprit {
            act(group);
            return String::new();
        }
        let tensor = numbers([1.0; 3]);
        let part = tensor.narrow(0, group.rank(), 1).unwrap();
        let first = group.reduce_scatter("bucket 3", &tensor, &part).unwrap_err().to_string();
        // It stays broken.
        assert!(group.barrier("afterwards").is_err());
        first
    });
    let mut results: Vec<String> = results.into_iter().map(Result::unwrap_or_default).collect();
    results.remove(culprit);
    results
}

#[test]
fn a_rank_that_leaves_panics_or_gives_up_ends_all_others_with_its_name() {
    let started = Instant::now();
    for culprit in 0..3 {
        for error in errors_beside(culprit, LONG, drop) {
            assert!(error.contains(r#"reduce_scatter "bucket 3""#), "{error}");
            assert!(error.contains(&format!("rank {culprit} left")), "{error}");
        }
        for error in errors_beside(culprit, LONG, |_group| panic!("on purpose")) {
            assert!(error.contains(&format!("rank {culprit} panicked")), "{error}");
        }
        for error in errors_beside(culprit, LONG, |group| group.abort("the loss is NaN")) {
            assert!(error.contains(&format!("rank {culprit} gave up: the loss is NaN")), "{error}");
        }
    }
    assert!(started.elapsed() < LONG, "none of these waits for the timeout");
}

#[test]
fn a_rank_that_hangs_is_named_after_the_timeout() {
    let (timeout, hang) = (Duration::from_millis(200), Duration::from_millis(600));
    for error in errors_beside(1, timeout, |_group| std::thread::sleep(hang)) {
        assert!(error.contains("rank 1 did not come within 0.2 s"), "{error}");
        assert!(error.contains(r#"reduce_scatter "bucket 3""#), "{error}");
    }
}

#[test]
fn ranks_that_call_different_things_are_told_what_the_other_called() {
    let errors = on_ranks(2, |group| {
        let tensor = numbers(vec![0.0; 4 + group.rank()]);
        group.all_reduce("gradients", &tensor, Reduction::Sum).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("4 elements") && error.contains("5 elements"), "{error}");
    }
    let errors = on_ranks(2, |group| {
        if group.rank() == 0 {
            return group.barrier("evaluation").unwrap_err();
        }
        let tensor = numbers([1.0]);
        group.all_reduce("gradients", &tensor, Reduction::Sum).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, CommunicatorError::Disagreement { .. }), "{error}");
        assert!(error.to_string().contains("evaluation") && error.to_string().contains("gradients"), "{error}");
    }
}

#[test]
fn tensors_that_do_not_go_together_are_refused_before_anyone_waits() {
    let groups = LocalGroup::with_ranks(2, LONG);
    let refused = |result: Result<_, CommunicatorError>, words: &[&str]| {
        let error = result.map(drop).unwrap_err();
        assert!(matches!(error, CommunicatorError::Argument { .. }), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{word} is not in: {error}");
        }
    };
    let arena = numbers(vec![0.0; 8]);
    let part = |start, len| arena.narrow(0, start, len).unwrap();
    refused(groups[0].reduce_scatter("b", &arena, &numbers([0.0; 3])), &["3 elements", "8 elements", "2 times"]);
    refused(groups[0].all_gather("b", &Tensor::zeros([4], DType::F32), &arena), &["f32", "f64"]);
    refused(groups[1].reduce_scatter("b", &arena, &part(0, 4)), &["element 0", "starts at 4"]);
    refused(groups[0].all_gather("b", &part(1, 4), &arena), &["element 1", "starts at 0"]);
    refused(groups[0].broadcast("b", &arena, 2), &["rank 2", "2 ranks"]);
    let turned = numbers(vec![0.0; 8]).reshape([2, 4]).unwrap().transpose(0, 1).unwrap();
    refused(groups[0].all_reduce("b", &turned, Reduction::Sum), &["not contiguous"]);
    refused(Single.reduce_scatter("b", &part(0, 4), &part(2, 4)), &["starts at 0"]);
    part(0, 4).fill_assign(3.0).unwrap();
    Single.reduce_scatter("apart in one storage", &part(0, 4), &part(4, 4)).unwrap().join().unwrap();
    assert_eq!(values(&arena), [3.0; 8]);
}
