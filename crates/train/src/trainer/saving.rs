//! Saving: every rank writes its part of a checkpoint in a thread of its own, and training may go on meanwhile.
//!
//! The leading rank makes the folder and writes the model; all write their shards of the optimizer's state into it. Once
//! all parts are there and checked the ranks tell the leading one their checksums, which writes the manifest and renames
//! the folder: until then there is no checkpoint. The threads speak to no other rank: what has to be agreed on is agreed
//! on between steps.

use super::Trainer;
use super::snapshot::Snapshot;
use crate::checkpoint::{Checkpoint, CheckpointError, CheckpointStore, FileEntry};
use crate::profile::range;
use anyhow::{Context, Error, Result, anyhow, bail};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use stickbreak_tensor::Device;

/// A checkpoint that is being written.
pub(super) struct Save {
    step: u64,
    part: Part,
}

type Entries = BTreeMap<String, FileEntry>;

/// This rank's part in it.
enum Part {
    /// The leading rank's.
    Lead(Lead),
    /// Another rank's file.
    Other(JoinHandle<Result<Entries, CheckpointError>>),
    /// Nothing is left to do for this rank.
    Done,
}

struct Lead {
    thread: JoinHandle<Result<Checkpoint, CheckpointError>>,
    /// Says so when the folder is there, and when this rank's files are.
    progress: Receiver<()>,
    written: bool,
    /// Takes the entries of the others' files, once they are all there. Dropped, the checkpoint is given up.
    others: Option<Sender<Entries>>,
}

impl Lead {
    fn start(store: CheckpointStore, step: u64, snapshot: Snapshot) -> Result<Self> {
        let (tell, progress) = channel();
        let (others, entries) = channel::<Entries>();
        let work = move || {
            store.save(step, |writer| {
                // Who listens no more has given up, which the last line notices.
                let _ = tell.send(());
                snapshot.write(writer)?;
                let _ = tell.send(());
                let entries = entries.recv().context("another rank could not write its part, or the run ended")?;
                entries.into_iter().try_for_each(|(name, entry)| writer.adopt(&name, entry))
            })
        };
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(work)?;
        Ok(Self { thread, progress, written: false, others: Some(others) })
    }

    /// Waits for this rank's files; false if they could not be written, which the thread's result explains.
    fn wait_until_written(&mut self) -> bool {
        self.written = self.written || self.progress.recv().is_ok();
        self.written
    }

    fn is_written(&mut self) -> Option<bool> {
        self.written = self.written || self.progress.try_recv().is_ok();
        if self.written { Some(true) } else { self.thread.is_finished().then_some(false) }
    }

    fn finish(self) -> Result<Checkpoint> {
        drop(self.others);
        Ok(result_of(self.thread)?)
    }
}

/// What a thread returned; its panic goes on here.
fn result_of<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// State of this rank's part, as a note to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing to agree on: no save, or it is all the leading rank's business now.
    Idle = 0,
    Writing = 1,
    Written = 2,
    Failed = 3,
}

/// A file's length and checksum in numbers that float64 holds exactly.
fn to_values(entry: &FileEntry) -> Vec<f64> {
    let words = entry.blake3.as_bytes().chunks(8).map(|digits| {
        let word = std::str::from_utf8(digits).ok().and_then(|digits| u32::from_str_radix(digits, 16).ok());
        f64::from(word.unwrap_or_default())
    });
    std::iter::once(entry.bytes as f64).chain(words).collect()
}

fn to_entry(values: &[f64]) -> FileEntry {
    let blake3 = values[1..].iter().map(|&word| format!("{:08x}", word as u32)).collect();
    FileEntry { bytes: values[0] as u64, blake3 }
}

impl Trainer {
    /// Saves this step, unless it is saved or nothing was trained. With `wait` it is on the disk when this returns; else
    /// that may take until the next save. Every rank calls it.
    pub(super) fn save(&mut self, wait: bool) -> Result<()> {
        self.finish_save()?;
        if self.step == 0 || self.is_saved()? {
            return Ok(());
        }
        let _save = range("save");
        self.optimizer.weights().settle()?;
        // An update can overflow although its gradients were finite; such weights must not push out good ones.
        if let Some((rank, name)) = self.non_finite_parameter()? {
            bail!(
                "step {}, rank {rank}: the parameter {name} is not finite after the update, so this step is not saved. \
                 The last checkpoint is intact; a lower optimizer.learning_rate usually helps",
                self.step
            );
        }
        let asynchronous = self.config.checkpoint.asynchronous.unwrap_or(self.device != Device::Cpu);
        let wait = wait || !asynchronous;
        self.save = Some(self.start_save(!wait)?);
        if wait { self.finish_save() } else { Ok(()) }
    }

    /// Whether there is a valid checkpoint of this step: the leading rank knows.
    fn is_saved(&self) -> Result<bool> {
        let saved = self.leads() && self.store.open_step(self.step).is_ok();
        let told = self.communicator.gather_values("whether the step is saved", &[f64::from(saved)])?;
        Ok(told[0][0] != 0.0)
    }

    fn start_save(&self, detached: bool) -> Result<Save> {
        let step = self.step;
        let (lead, process) = if self.leads() {
            let lead = self.start_lead(detached);
            (Some(lead), f64::from(std::process::id()))
        } else {
            (None, 0.0)
        };
        let begun = lead.as_ref().is_none_or(Result::is_ok);
        let told = self.communicator.gather_values("begin of a checkpoint", &[f64::from(begun), process])?;
        if let Some(mut lead) = lead.transpose()? {
            if self.ranks() == 1 {
                // Nobody else's part is waited for: the checkpoint is whole as soon as it is written, whatever comes.
                let _ = lead.others.take().map(|others| others.send(Entries::new()));
            }
            return Ok(Save { step, part: Part::Lead(lead) });
        }
        if told[0][0] == 0.0 {
            bail!("rank 0 could not begin the checkpoint of step {step}");
        }
        let (store, snapshot, saver) = (self.store.clone(), self.snapshot(detached)?, told[0][1] as u32);
        let work = move || store.write_part(step, saver, |writer| snapshot.write(writer));
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(work)?;
        Ok(Save { step, part: Part::Other(thread) })
    }

    /// Starts the leading rank's thread, and returns when the folder is there for the others.
    fn start_lead(&self, detached: bool) -> Result<Lead> {
        self.sync_metrics()?;
        let lead = Lead::start(self.store.clone(), self.step, self.snapshot(detached)?)?;
        match lead.progress.recv() {
            Ok(()) => Ok(lead),
            Err(_) => Err(lead.finish().err().unwrap_or_else(|| anyhow!("the checkpoint's thread ended early"))),
        }
    }

    /// How this rank's part of a save is doing, for the round at the end of a step.
    pub(super) fn save_progress(&mut self) -> Progress {
        let written = match &mut self.save {
            Some(Save { part: Part::Lead(lead), .. }) if lead.others.is_some() => lead.is_written(),
            Some(Save { part: Part::Other(thread), .. }) => thread.is_finished().then_some(true),
            _ => return Progress::Idle,
        };
        match written {
            None => Progress::Writing,
            Some(true) => Progress::Written,
            Some(false) => Progress::Failed,
        }
    }

    /// Goes on with a save as far as that needs no wait, after all ranks have told their progress.
    pub(super) fn advance_save(&mut self, progress: &[f64]) -> Result<()> {
        let is = |state: Progress| move |&progress: &f64| progress == f64::from(state as u8);
        if progress.iter().all(is(Progress::Written)) || progress.iter().any(is(Progress::Failed)) {
            self.exchange_parts()?;
        }
        // The rest is the leading rank's: manifest, check, rename.
        if let Some(Save { part: Part::Lead(lead), .. }) = &self.save
            && lead.others.is_none()
            && lead.thread.is_finished()
        {
            self.finish_lead()?;
        }
        Ok(())
    }

    /// Waits until a save that is under way, if one is, is on the disk. Every rank calls it.
    pub(super) fn finish_save(&mut self) -> Result<()> {
        let Some(save) = &self.save else { return Ok(()) };
        let step = save.step;
        let exchanged = match &save.part {
            Part::Lead(lead) => lead.others.is_none(),
            Part::Other(_) => false,
            Part::Done => true,
        };
        // The ranks agree on this one: it changes in a round of all.
        if !exchanged {
            self.exchange_parts()?;
        }
        let finished = self.finish_lead();
        self.save = None;
        let told = self.communicator.gather_values("end of a checkpoint", &[f64::from(finished.is_ok())])?;
        finished?;
        if told[0][0] == 0.0 {
            bail!("rank 0 could not finish the checkpoint of step {step}");
        }
        Ok(())
    }

    /// Waits for all parts and hands their entries to the leading rank's thread. If one is missing, the checkpoint is
    /// given up, and every rank returns an error.
    fn exchange_parts(&mut self) -> Result<()> {
        let Some(Save { step, part }) = self.save.take() else { return Ok(()) };
        let (mine, lead) = match part {
            Part::Lead(mut lead) => match lead.wait_until_written() {
                true => (Ok(Entries::new()), Some(lead)),
                false => (Err(lead.finish().err().unwrap_or_else(|| anyhow!("a part is missing"))), None),
            },
            Part::Other(thread) => (result_of(thread).map_err(Error::from), None),
            Part::Done => (Ok(Entries::new()), None),
        };
        let values = match &mine {
            Ok(entries) => std::iter::once(1.0).chain(entries.values().flat_map(to_values)).collect(),
            Err(_) => vec![0.0],
        };
        let told = self.communicator.gather_values("parts of a checkpoint", &values)?;
        let failed = told.iter().position(|values| values[0] == 0.0);
        let entries = self.entries_of(&told);
        let part = match (lead, failed) {
            (Some(mut lead), None) => {
                // A thread that listens no more has failed, and says why when it is joined.
                let _ = lead.others.take().map(|others| others.send(entries));
                Part::Lead(lead)
            }
            (Some(lead), Some(_)) => {
                // Takes the unfinished folder away.
                let _ = lead.finish();
                Part::Done
            }
            (None, _) => Part::Done,
        };
        if let Some(rank) = failed {
            let who = format!("rank {rank} could not write its part of the checkpoint of step {step}");
            // Where the leading rank gave up, the others' files went with the folder: that is not their fault.
            return Err(match mine {
                Err(error) if rank == self.rank() => error,
                Err(error) => error.context(who),
                Ok(_) => anyhow!("{who}; earlier ones are untouched"),
            });
        }
        self.save = Some(Save { step, part });
        Ok(())
    }

    /// The files of the other ranks.
    fn entries_of(&self, told: &[Vec<f64>]) -> Entries {
        let ranks = self.ranks();
        let others = told.iter().enumerate().filter(|(_, values)| values.len() > 1);
        others.map(|(rank, values)| (super::snapshot::optimizer_file(rank, ranks), to_entry(&values[1..]))).collect()
    }

    /// Ends a save that is under way without a checkpoint, unless all of it is there, and waits for its thread: nothing
    /// may write to the run's folder after the run.
    pub(super) fn give_up_save(&mut self) {
        match self.save.take().map(|save| save.part) {
            Some(Part::Lead(lead)) => drop(lead.finish()),
            Some(Part::Other(thread)) => drop(thread.join()),
            Some(Part::Done) | None => {}
        }
    }

    /// Waits for the leading rank's thread, on that rank, if it has not been waited for.
    fn finish_lead(&mut self) -> Result<()> {
        let Some(save) = &mut self.save else { return Ok(()) };
        if let Part::Lead(lead) = std::mem::replace(&mut save.part, Part::Done) {
            let checkpoint = lead.finish()?;
            self.console.line(&format!("saved {}", checkpoint.folder().display()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_travel_as_numbers_without_loss() {
        for text in ["", "a", "some bytes"] {
            let blake3 = blake3::hash(text.as_bytes()).to_hex().to_string();
            let entry = FileEntry { bytes: (1 << 50) + text.len() as u64, blake3 };
            assert_eq!(to_entry(&to_values(&entry)), entry);
        }
    }
}
