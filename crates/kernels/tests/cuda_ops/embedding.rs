use half::bf16;
use stickbreak_kernels::cuda::Queue;
use stickbreak_kernels::embedding::{EmbeddingSpec, cpu, cuda};

use crate::support::*;

fn forward<T: Number>(queue: &Queue) {
    for (tokens, vocabulary, width) in [(0, 5, 8), (1, 1, 1), (100, 50, 64), (33, 7, 37), (1000, 300, 1024)] {
        for shift in [0, 1] {
            let spec = EmbeddingSpec { tokens, vocabulary, width };
            let (ids, table) = (random_ids(1, tokens, vocabulary as u32), random(2, vocabulary * width));
            let mut expected = vec![0.0; tokens * width];
            cpu::forward(&spec, &ids, &table, &mut expected).unwrap();
            let (device_ids, device_table) = (queue.upload(&ids).unwrap(), Buffer::new::<T>(queue, &table, shift));
            let mut out = Buffer::poisoned::<T>(queue, tokens * width, shift);
            cuda::forward(queue, &spec, device_ids.as_ref(), device_table.get(), &mut out.get_mut()).unwrap();
            assert_same(&format!("{} {spec:?}", T::NAME), &out.read::<T>(queue), &expected);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_are_gathered_exactly() {
    let queue = queue();
    forward::<f32>(&queue);
    forward::<bf16>(&queue);
}

/// Ids as text has them (few very often), all different, all the same, in order, in runs.
fn distributions(tokens: usize, vocabulary: u32) -> Vec<Vec<u32>> {
    let zipf = random_ids(7, tokens, 1 << 16)
        .iter()
        .map(|&x| ((f64::from(vocabulary)).powf(f64::from(x) / 65536.0) as u32).min(vocabulary) - 1)
        .collect();
    vec![
        random_ids(1, tokens, vocabulary),
        zipf,
        vec![vocabulary / 2; tokens],
        (0..tokens as u32).map(|t| t % vocabulary).collect(),
        (0..tokens as u32).map(|t| t / 100 % vocabulary).collect(),
    ]
}

fn backward<X: Number, G: Number>(queue: &Queue) {
    for (tokens, vocabulary, width) in [
        (0, 5, 8),
        (1, 1, 1),
        (31, 7, 24),
        (33, 255, 16),
        (2048, 256, 8),
        (2049, 257, 37),
        (5000, 50304, 64),
        (5000, 3, 1024),
        (70_000, 70_000, 8),
        (150_000, 262_144, 8),
    ] {
        let spec = EmbeddingSpec { tokens, vocabulary, width };
        for (kind, ids) in distributions(tokens, vocabulary as u32).into_iter().enumerate() {
            for shift in [0, 1] {
                let what = format!("{} into {} {spec:?} ids {kind} shift {shift}", X::NAME, G::NAME);
                // The accumulator starts at small numbers, so that a bf16 one does not hide the sums.
                let (dout, before) = (random(2, tokens * width), random(3, vocabulary * width));
                let mut expected = before.clone();
                cpu::backward(&spec, &ids, &dout, &mut expected).unwrap();
                let (device_ids, device_dout) = (queue.upload(&ids).unwrap(), Buffer::new::<X>(queue, &dout, shift));
                let found = twice(&what, || {
                    let mut dtable = Buffer::new::<G>(queue, &before, shift);
                    cuda::backward(queue, &spec, device_ids.as_ref(), device_dout.get(), &mut dtable.get_mut())
                        .unwrap();
                    dtable.read::<G>(queue)
                });
                assert_within(&what, G::BOUNDS, &found, &expected, width);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_tables_gradient_agrees_with_float64() {
    let queue = queue();
    backward::<f32, f32>(&queue);
    backward::<bf16, f32>(&queue);
    backward::<bf16, bf16>(&queue);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn ids_outside_of_the_vocabulary_touch_nothing() {
    let queue = queue();
    let spec = EmbeddingSpec { tokens: 6, vocabulary: 3, width: 8 };
    // 258 and 65538 share their low bits with 2.
    let ids = [2u32, 258, 2, 3, 65_538, u32::MAX];
    let device_ids = queue.upload(&ids).unwrap();
    let table = Buffer::new::<f32>(&queue, &[1.0; 24], 0);
    let mut out = Buffer::new::<f32>(&queue, &[0.0; 48], 0);
    cuda::forward(&queue, &spec, device_ids.as_ref(), table.get(), &mut out.get_mut()).unwrap();
    for (token, row) in out.read::<f32>(&queue).chunks(8).enumerate() {
        let valid = ids[token] < 3;
        assert!(row.iter().all(|x| if valid { *x == 1.0 } else { x.is_nan() }), "token {token}");
    }
    let dout = Buffer::new::<f32>(&queue, &[1.0; 48], 0);
    let mut dtable = Buffer::new::<f32>(&queue, &[0.0; 24], 0);
    cuda::backward(&queue, &spec, device_ids.as_ref(), dout.get(), &mut dtable.get_mut()).unwrap();
    assert_eq!(dtable.read::<f32>(&queue), [vec![0.0; 16], vec![2.0; 8]].concat());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn embedding_refuses_what_does_not_fit() {
    let queue = queue();
    let spec = EmbeddingSpec { tokens: 2, vocabulary: 3, width: 4 };
    let ids = queue.upload(&[0u32, 1]).unwrap();
    let table = Buffer::new::<f32>(&queue, &[1.0; 12], 0);
    let mut out = Buffer::poisoned::<f32>(&queue, 8, 0);
    let mut run = |ids, table| cuda::forward(&queue, &spec, ids, table, &mut out.get_mut());
    assert_refused(run(ids.as_ref().slice(0..1), table.get()), &["ids", "2", "1"]);
    assert_refused(run(table.get().slice(0..2), table.get()), &["ids", "u32", "f32"]);
    assert_refused(run(ids.as_ref(), table.get().slice(0..11)), &["table", "12", "11"]);
}
