//! The order and the packing of batches.

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use stickbreak_train::data::loader::bits_per_byte;
use stickbreak_train::data::tokens::MemoryTokens;
use stickbreak_train::data::{Batch, Cursor, IGNORED_LABEL, Loader, Prefetch, Share, TokenStream, Tokenizer};

const EOT: u32 = 256;

fn stream(tokens: Vec<u32>) -> TokenStream {
    let source = Box::new(MemoryTokens::new("memory", tokens));
    TokenStream::new("train", vec![source], 257).unwrap().with_tokenizer(&Tokenizer::Bytes)
}

fn loader(tokens: Vec<u32>, sequence_length: usize, seed: Option<u64>) -> Loader {
    Loader::new(stream(tokens), sequence_length, seed).unwrap()
}

/// `n` windows of 4 tokens, each of which begins with its own number.
fn numbered(windows: u32) -> Vec<u32> {
    (0..windows).flat_map(|w| [w, 100, 101, 102]).collect()
}

fn numbers(batch: &Batch) -> Vec<u32> {
    batch.ids.iter().step_by(4).copied().collect()
}

#[test]
fn every_epoch_has_every_window_once_in_its_own_order() {
    let loader = loader(numbered(37), 4, Some(5));
    // 5 does not divide 37: batches lie across the boundary of epochs.
    let order: Vec<u32> = (0..37).flat_map(|step| numbers(&loader.batch(step * 5, 5).unwrap())).collect();
    let epochs: Vec<&[u32]> = order.chunks(37).collect();
    for epoch in &epochs {
        assert_eq!(epoch.iter().collect::<BTreeSet<_>>().len(), 37);
    }
    assert_ne!(epochs[0], epochs[1]);
    assert_ne!(epochs[1], epochs[2]);
    let cursor = Cursor { position: 37 };
    assert_eq!(cursor.epoch(loader.windows()), 1);
}

#[test]
fn a_position_is_all_the_state_there_is() {
    let first = loader(numbered(50), 4, Some(5));
    let all: Vec<_> = (0..40).map(|step| first.batch(step * 3, 3).unwrap()).collect();
    // A fresh loader goes straight to any position, backwards too.
    let second = loader(numbered(50), 4, Some(5));
    for step in (0..40).rev() {
        assert_eq!(second.batch(step * 3, 3).unwrap(), all[step as usize]);
    }
    assert_ne!(
        numbers(&loader(numbered(50), 4, Some(6)).batch(0, 50).unwrap()),
        numbers(&second.batch(0, 50).unwrap())
    );
}

#[test]
fn shares_of_ranks_are_disjoint_and_complete_in_every_step_over_epochs() {
    // 24 windows a step, 37 an epoch: most steps cross no end of an epoch, some do.
    let loader = loader(numbered(37), 4, Some(1));
    let (sequences, steps) = (24, 9);
    let cursor = Cursor { position: 5 };
    for ranks in [1, 2, 3, 4, 6, 24] {
        for at_once in [1, 2, 3, 4, 24].into_iter().filter(|at_once| (sequences / ranks) % at_once == 0) {
            let mut by_step = vec![Vec::new(); steps];
            for rank in 0..ranks {
                let share = Share { sequences, rank, ranks, at_once };
                assert_eq!(share.batches() * at_once * ranks, sequences);
                for (index, (position, count)) in share.requests(cursor).take(steps * share.batches()).enumerate() {
                    by_step[index / share.batches()].extend(numbers(&loader.batch(position, count).unwrap()));
                }
            }
            for (step, windows) in by_step.into_iter().enumerate() {
                // One rank behind the other they are the step of a rank that is alone.
                let whole = loader.batch(5 + (step * sequences) as u64, sequences).unwrap();
                assert_eq!(windows, numbers(&whole), "{ranks} ranks, {at_once} at once, step {step}");
            }
        }
    }
}

#[test]
fn without_a_seed_windows_come_as_they_lie() {
    let loader = loader(numbered(5), 4, None);
    assert_eq!(numbers(&loader.batch(3, 4).unwrap()), [3, 4, 0, 1]);
}

#[test]
fn documents_end_without_predicting_the_next() {
    // Documents: "ab", "", "cde"; windows of 4 with one token left over.
    let loader = loader(vec![EOT, 97, 98, EOT, EOT, 99, 100, 101, 102], 4, None);
    let batch = loader.batch(0, 2).unwrap();
    assert_eq!(batch.ids, [EOT, 97, 98, EOT, EOT, 99, 100, 101]);
    // The first window's last token begins an empty document; the second's last one continues outside the window.
    assert_eq!(batch.labels, [97, 98, IGNORED_LABEL, IGNORED_LABEL, 99, 100, 101, 102]);
    assert_eq!(batch.cu_seqlens, [0, 3, 4, 8]);
    assert_eq!(batch.valid_tokens, 6);
    assert_eq!(batch.text_bytes, Some(6));
}

#[test]
fn the_last_token_of_the_data_predicts_nothing() {
    let batch = loader(vec![EOT, 1, 2, 3], 4, None).batch(0, 1).unwrap();
    assert_eq!(batch.labels, [1, 2, 3, IGNORED_LABEL]);
}

#[test]
fn a_sequence_longer_than_the_data_is_refused_with_both_numbers() {
    let error = Loader::new(stream(vec![1, 2, 3]), 4, None).err().unwrap().to_string();
    assert!(error.contains("train: a sequence of 4 tokens") && error.contains("has 3 tokens"), "{error}");
    assert!(Loader::new(stream(vec![]), 1, None).is_err());
    assert!(Loader::new(stream(vec![1]), 0, None).is_err());
}

#[test]
fn impossible_batches_are_errors() {
    let loader = loader(numbered(4), 4, Some(1));
    assert!(loader.batch(0, 0).is_err());
    assert!(loader.batch(0, usize::MAX).is_err());
    assert!(loader.batch(u64::MAX, 2).is_err());
}

#[test]
fn validation_reads_a_fixed_number_of_tokens_in_order() {
    let loader = loader((0..23).collect(), 4, Some(9));
    let batches: Vec<Batch> = loader.sequential(2, None).map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(|b| b.ids.len()).collect::<Vec<_>>(), [8, 8, 7]);
    assert_eq!(batches.iter().flat_map(|b| b.ids.clone()).collect::<Vec<_>>(), (0..23).collect::<Vec<u32>>());
    assert_eq!(batches[2].cu_seqlens, [0, 4, 7]);
    // All bytes but the first, which nothing precedes.
    assert_eq!(batches.iter().filter_map(|b| b.text_bytes).sum::<u64>(), 22);
    let part: Vec<Batch> = loader.sequential(2, Some(12)).map(Result::unwrap).collect();
    assert_eq!(part.iter().map(|b| b.ids.len()).collect::<Vec<_>>(), [8, 4]);
    assert_eq!(part[1].labels[3], 12, "the token after the last one read is its label");
    assert_eq!(loader.sequential(2, Some(1000)).count(), 3);
}

#[test]
fn a_uniform_guess_of_bytes_costs_eight_bits() {
    let text = "gr\u{fc}n\n".repeat(10);
    let stream = TokenStream::from_text("text", text.as_bytes(), &Tokenizer::Bytes).unwrap();
    let loader = Loader::new(stream, 16, None).unwrap();
    let (mut nats, mut bytes) = (0.0, 0);
    for batch in loader.sequential(1, None) {
        let batch = batch.unwrap();
        nats += batch.valid_tokens as f64 * 256f64.ln();
        bytes += batch.text_bytes.unwrap();
    }
    assert_eq!(bytes, text.len() as u64, "with the end-of-text token in front every byte is predicted");
    assert!((bits_per_byte(nats, bytes) - 8.0).abs() < 1e-12);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn packing_agrees_with_the_definition(
        documents in prop::collection::vec(prop::collection::vec(0u32..256, 0..12), 1..20),
        length in 1usize..9,
        count in 1usize..5,
        position in 0u64..30,
        seed in prop::option::of(any::<u64>()),
    ) {
        let tokens: Vec<u32> = documents.iter().flat_map(|d| [&[EOT][..], d].concat()).collect();
        prop_assume!(tokens.len() >= length);
        let loader = loader(tokens.clone(), length, seed);
        let batch = loader.batch(position, count).unwrap();
        let mut starts = Vec::new();
        for at in 0..count * length {
            let window = loader.order().window(position + (at / length) as u64) as usize;
            let place = window * length + at % length;
            prop_assert_eq!(batch.ids[at], tokens[place]);
            let label = tokens.get(place + 1).filter(|next| **next != EOT).map_or(IGNORED_LABEL, |next| *next as i32);
            prop_assert_eq!(batch.labels[at], label);
            if at % length == 0 || tokens[place] == EOT {
                starts.push(at as i32);
            }
        }
        starts.push((count * length) as i32);
        prop_assert_eq!(&batch.cu_seqlens, &starts);
        prop_assert_eq!(batch.valid_tokens, batch.labels.iter().filter(|l| **l != IGNORED_LABEL).count());
        prop_assert_eq!(batch.text_bytes, Some(batch.valid_tokens as u64));
    }
}

#[test]
fn prefetch_gives_the_same_batches_and_stops_when_dropped() {
    let loader = Arc::new(loader(numbered(30), 4, Some(3)));
    let mut prefetch = Prefetch::start(loader.clone(), (0..).map(|step| (step * 4, 4))).unwrap();
    for step in 0..20 {
        assert_eq!(prefetch.next_batch().unwrap(), loader.batch(step * 4, 4).unwrap());
    }
    drop(prefetch); // would hang here if the thread did not notice
    assert_eq!(Arc::strong_count(&loader), 1);
}

#[test]
fn prefetch_hands_on_errors_and_ends() {
    // The third window has an id outside the vocabulary.
    let mut tokens = numbered(4);
    tokens[9] = 999;
    let loader = Arc::new(loader(tokens, 4, None));
    let mut prefetch = Prefetch::start(loader, (0..4).map(|i| (i, 1))).unwrap();
    assert!(prefetch.next_batch().is_ok());
    assert!(prefetch.wait(Duration::from_secs(10)).unwrap().is_some());
    let error = prefetch.next_batch().unwrap_err().to_string();
    assert!(error.contains("token 999 at position 9"), "{error}");
    assert!(prefetch.next_batch().is_err());
}

#[test]
fn a_sample_is_spread_evenly_in_whole_blocks_and_always_the_same() {
    let loader = loader(numbered(40), 4, None);
    let sample = |block, tokens| -> Vec<u32> {
        loader.spread(3, block, tokens).unwrap().flat_map(|batch| numbers(&batch.unwrap())).collect()
    };
    assert_eq!(sample(4, 16), [0, 10, 20, 30]);
    assert_eq!(sample(8, 16), [0, 1, 20, 21], "blocks of two windows");
    assert_eq!(sample(4, 1), [0], "at least one block");
    assert_eq!(sample(4, 10_000), (0..40).collect::<Vec<_>>(), "at most everything");
    assert!(loader.spread(1, 6, 16).is_err(), "6 is no multiple of 4");
    let message = loader.spread(1, 400, 400).err().unwrap().to_string();
    assert!(message.contains("400") && message.contains("160"), "{message}");
}
