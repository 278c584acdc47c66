//! Whole training steps on trained weights: the run's own shape, on its held-out text. The learning rate is 0, so that the
//! weights stay what they are while a step does all that a step does.

use super::Settings;
use super::gpu_step::{StepTimes, time_steps};
use super::row::{AttentionFigures, Row};
use super::trained::Trained;
use crate::optimizer::Optimizer;
use anyhow::Result;

pub(super) fn measure(settings: &Settings, trained: &Trained, each: &mut dyn FnMut(Row)) -> Result<()> {
    let config = trained.config()?;
    let (length, sequences, at_once) =
        (config.train.sequence_length, config.sequences_per_step(), config.micro_batch(1));
    let text = trained.windows(length)?;
    let kinds = if trained.skips_tiles() { trained.kinds().to_vec() } else { vec![("softmax".to_owned(), 0)] };
    for (kind, bits) in kinds.into_iter().filter(|(_, bits)| *bits == 0 || !settings.dense_only) {
        let name = format!("{}, {kind}", trained.name);
        let model = trained.loaded.with_early_exit(bits)?;
        let optimizer = Optimizer::new(config.optimizer.clone(), &model)?;
        let mut position = 0;
        // Past the text's end it begins again.
        let next = || -> Result<_> {
            let starts = (position..).step_by(at_once).take(sequences / at_once);
            position += sequences as u64;
            starts.map(|start| Ok(text.batch(start, at_once)?)).collect()
        };
        model.watch_tiles(true);
        let times: StepTimes = time_steps(settings, &model, &optimizer, (0.0, config.train.recompute), &name, next)?;
        let mut row = times.row(name, format!("{sequences} x {length} tokens"));
        row.loss = Some(times.loss);
        row.attention = model.take_skipped_tiles()?.map(|shares| {
            AttentionFigures { layers: shares.len(), ..AttentionFigures::default() }.with_skipped(&shares)
        });
        each(row);
    }
    Ok(())
}
