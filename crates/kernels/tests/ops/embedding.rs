use stickbreak_kernels::KernelError;
use stickbreak_kernels::embedding::{self, EmbeddingSpec};

use crate::support::*;

#[test]
fn rows_are_gathered_and_gradients_scattered_in_token_order() {
    let (tokens, vocabulary, width) = (500, 61, 19);
    let spec = EmbeddingSpec { tokens, vocabulary, width };
    let ids = random_ids(1, tokens, vocabulary as u32);
    let table = random(2, vocabulary * width);
    let mut out = vec![f64::NAN; tokens * width];
    embedding::cpu::forward(&spec, &ids, &table, &mut out).unwrap();
    for (t, &id) in ids.iter().enumerate() {
        assert_eq!(out[t * width..][..width], table[id as usize * width..][..width]);
    }

    let dout = single(&random(3, tokens * width));
    let start = single(&random(4, vocabulary * width));
    let mut expected = start.clone();
    for (t, &id) in ids.iter().enumerate() {
        for d in 0..width {
            expected[id as usize * width + d] += dout[t * width + d];
        }
    }
    let mut dtable = start;
    embedding::cpu::backward(&spec, &ids, &dout, &mut dtable).unwrap();
    assert_eq!(dtable, expected);
}

#[test]
fn ids_outside_of_the_vocabulary_and_wrong_lengths_are_refused() {
    let spec = EmbeddingSpec { tokens: 3, vocabulary: 4, width: 2 };
    let (table, mut out) = ([0f32; 8], [7f32; 6]);
    let error = embedding::cpu::forward(&spec, &[0, 4, 1], &table, &mut out).unwrap_err();
    assert!(matches!(error, KernelError::Index { position: 1, value: 4, .. }), "{error}");
    assert!(error.to_string().contains("vocabulary of 4"), "{error}");
    assert_eq!(out, [7.0; 6]);
    let mut dtable = [7f32; 8];
    assert!(embedding::cpu::backward(&spec, &[0, u32::MAX, 1], &out, &mut dtable).is_err());
    assert_eq!(dtable, [7.0; 8]);
    assert_length_error(embedding::cpu::forward(&spec, &[0, 1], &table, &mut out), 3, 2);
    assert_length_error(embedding::cpu::forward(&spec, &[0, 1, 2], &table[1..], &mut out), 8, 7);
    assert_length_error(embedding::cpu::backward(&spec, &[0, 1, 2], &out[1..], &mut dtable), 6, 5);
}
