//! Attention prepared for a device: document offsets and tile lists are uploaded once for a batch, not once a layer.

use crate::{DType, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// Plans kept: those of a training batch, an evaluation batch and a prompt, each for a kind of attention.
const KEPT: usize = 8;

struct Entry<S, P> {
    ordinal: usize,
    dtype: DType,
    cu_seqlens: Vec<i32>,
    spec: S,
    plan: Arc<P>,
}

/// The plans used last, the newest at the end.
pub(super) struct PlanCache<S, P> {
    entries: Mutex<Vec<Entry<S, P>>>,
}

impl<S: Clone + PartialEq, P> PlanCache<S, P> {
    pub const fn new() -> Self {
        Self { entries: Mutex::new(Vec::new()) }
    }

    /// The plan for these documents, made by `make` if there is none.
    pub fn get(
        &self,
        ordinal: usize,
        dtype: DType,
        cu_seqlens: &[i32],
        spec: &S,
        make: impl FnOnce() -> Result<P>,
    ) -> Result<Arc<P>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted =
            |e: &Entry<S, P>| (e.ordinal, e.dtype) == (ordinal, dtype) && e.spec == *spec && e.cu_seqlens == cu_seqlens;
        let entry = match entries.iter().position(wanted) {
            Some(index) => entries.remove(index),
            None => {
                Entry { ordinal, dtype, cu_seqlens: cu_seqlens.to_vec(), spec: spec.clone(), plan: Arc::new(make()?) }
            }
        };
        let plan = Arc::clone(&entry.plan);
        if entries.len() == KEPT {
            entries.remove(0);
        }
        entries.push(entry);
        Ok(plan)
    }
}
