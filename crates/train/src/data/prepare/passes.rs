//! Passes over the inputs, and which documents of each are held out.

use super::{PrepareOptions, Validation};
use crate::data::dataset::SplitName;
use crate::data::source::{FileList, find_files};
use crate::data::{DataError, Result};
use std::collections::HashSet;

/// Some files and the rule by which their documents are split.
pub(super) struct Pass {
    pub(super) list: FileList,
    pub(super) rule: Rule,
}

#[derive(Clone, Copy)]
pub(super) enum Rule {
    All(SplitName),
    Fraction(f64),
    First(u64),
}

impl Rule {
    pub(super) fn split(self, index: u64, name: &str) -> SplitName {
        let held_out = match self {
            Self::All(split) => return split,
            Self::First(n) => index < n,
            Self::Fraction(fraction) => {
                let hash = blake3::hash(name.as_bytes());
                let hash = u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]));
                (hash as f64) < fraction * 2f64.powi(64)
            }
        };
        if held_out { SplitName::Valid } else { SplitName::Train }
    }
}

pub(super) fn find_passes(options: &PrepareOptions) -> Result<Vec<Pass>> {
    let list = find_files(&options.inputs, &options.extensions)?;
    let rule = match &options.validation {
        Validation::None | Validation::Inputs(_) => Rule::All(SplitName::Train),
        Validation::Fraction(fraction) => Rule::Fraction(*fraction),
        Validation::FirstDocuments(n) => Rule::First(*n),
    };
    let mut passes = vec![Pass { list, rule }];
    if let Validation::Inputs(inputs) = &options.validation {
        let list = find_files(inputs, &options.extensions)?;
        let inputs: HashSet<_> = passes[0].list.files.iter().map(|file| &file.path).collect();
        let both = list.files.iter().find(|file| inputs.contains(&file.path));
        if let Some(file) = both {
            return Err(DataError::Input(format!("{}: both an input and a validation input", file.path.display())));
        }
        passes.push(Pass { list, rule: Rule::All(SplitName::Valid) });
    }
    Ok(passes)
}
