//! Parameters in flat arenas: one allocation for all values, one for all gradients.
//!
//! The optimizer, the global norm, checkpoints and gradient reduction work on contiguous ranges instead of hundreds of
//! small tensors, and a weight gradient is accumulated by the matrix product straight into its place.

use crate::error::{AutogradError, Result};
use std::ops::Range;
use stickbreak_tensor::{DType, Device, Shape, Tensor};

/// Names a parameter within its arena: its position in the order of registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParameterId(pub usize);

/// A trainable tensor: views of its value and of its gradient in the arena. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name within the arena.
    pub id: ParameterId,
    /// The value.
    pub value: Tensor,
    /// The gradient, to which every backward pass adds.
    pub gradient: Tensor,
}

/// Where a parameter lies in its arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArenaEntry {
    /// Full name, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Shape of the value.
    pub shape: Shape,
    /// Elements of the arena that it takes.
    pub range: Range<usize>,
}

/// All parameters of a model, their values and gradients flat and parallel to each other.
///
/// With bfloat16 values the arena also holds *master* values in float32: an update is often smaller than half a step of
/// bfloat16 and would be lost. The optimizer changes the master, [`publish`](ParameterArena::publish) rounds it into the
/// values that the ops read, and gradients are summed in float32.
#[derive(Debug, Clone)]
pub struct ParameterArena {
    entries: Vec<ArenaEntry>,
    values: Tensor,
    gradients: Tensor,
    /// The same tensor as `values` unless those are bfloat16; the same as `gradients` if it is only lent.
    master: Tensor,
}

/// What an arena has beyond its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaLayout {
    /// The arena's length is a multiple of this many elements, so that ranks can have equal parts of it.
    pub length_multiple: usize,
    /// Whether float32 master values are kept beside bfloat16 ones. Without, their place is lent by the gradients: what
    /// is written there as master counts until gradients are summed, and is to be taken out before by who keeps a part.
    pub keeps_master: bool,
    /// Whether values lie in memory of which GPUs reach each other's, where there is such.
    pub shares_values: bool,
    /// The same of gradients.
    pub shares_gradients: bool,
}

impl Default for ArenaLayout {
    fn default() -> Self {
        Self { length_multiple: 1, keeps_master: true, shares_values: false, shares_gradients: false }
    }
}

/// Collects names and shapes, then allocates the arena.
#[derive(Debug, Default)]
pub struct ArenaBuilder {
    entries: Vec<ArenaEntry>,
    length: usize,
}

/// Parameters start at multiples of this many elements, so that vector loads and bulk copies stay aligned on a GPU.
/// The gap elements are zero and stay zero under AdamW.
pub const ALIGNMENT: usize = 64;

impl ArenaBuilder {
    /// Reserves room for a parameter.
    pub fn add(&mut self, name: impl Into<String>, shape: impl Into<Shape>) -> ParameterId {
        let (name, shape) = (name.into(), shape.into());
        let start = self.length;
        self.length = (start + shape.elements()).next_multiple_of(ALIGNMENT);
        self.entries.push(ArenaEntry { name, range: start..start + shape.elements(), shape });
        ParameterId(self.entries.len() - 1)
    }

    /// Allocates the arena on the CPU, all zeros.
    pub fn build(self, dtype: DType) -> ParameterArena {
        self.build_on(dtype, Device::Cpu).expect("memory of the host is not refused")
    }

    /// Allocates the arena on a device, all zeros.
    ///
    /// # Errors
    /// If the device cannot be used, has not the memory, or does not compute in `dtype`.
    pub fn build_on(self, dtype: DType, device: Device) -> Result<ParameterArena> {
        self.build_with(dtype, device, ArenaLayout::default())
    }

    /// [`build_on`](Self::build_on) for an arena of which ranks share the work.
    ///
    /// # Errors
    /// As [`build_on`](Self::build_on).
    pub fn build_with(self, dtype: DType, device: Device, layout: ArenaLayout) -> Result<ParameterArena> {
        let sums = if dtype == DType::BF16 { DType::F32 } else { dtype };
        let length = self.length.next_multiple_of(layout.length_multiple.max(1));
        let zeros = |dtype, shareable| match shareable {
            true => Tensor::zeros_shareable_on([length], dtype, device),
            false => Tensor::zeros_on([length], dtype, device),
        };
        let (values, gradients) = (zeros(dtype, layout.shares_values)?, zeros(sums, layout.shares_gradients)?);
        let master = match (sums == dtype, layout.keeps_master) {
            (true, _) => values.clone(),
            (false, true) => Tensor::zeros_on([length], sums, device)?,
            (false, false) => gradients.clone(),
        };
        Ok(ParameterArena { entries: self.entries, values, gradients, master })
    }
}

impl ParameterArena {
    /// Names, shapes and places, in the order of registration.
    pub fn entries(&self) -> &[ArenaEntry] {
        &self.entries
    }

    /// All values as the ops read them, `[n]`; gaps between parameters are zero.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// All values as the optimizer keeps them, `[n]`: float32 beside bfloat16 values, else the values themselves. See
    /// [`keeps_master`](Self::keeps_master) for when they are there.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// Whether the master values stay; else they are lent the gradients' memory: [`ArenaLayout::keeps_master`].
    pub fn keeps_master(&self) -> bool {
        !self.master.shares_storage(&self.gradients)
    }

    /// Rounds the master values into those that the ops read, after the master was written.
    ///
    /// # Errors
    /// If the device fails.
    pub fn publish(&self) -> Result<()> {
        if !self.master.shares_storage(&self.values) {
            self.values.copy_assign(&self.master.to_dtype(self.values.dtype())?)?;
        }
        Ok(())
    }

    /// The master values of the parameter with this id.
    ///
    /// # Errors
    /// If the arena has no such parameter.
    pub fn master_of(&self, id: ParameterId) -> Result<Tensor> {
        let unknown = AutogradError::UnknownParameter { id, parameters: self.entries.len() };
        let ArenaEntry { range, shape, .. } = self.entries.get(id.0).ok_or(unknown)?;
        Ok(self.master.narrow(0, range.start, range.len())?.reshape(shape)?)
    }

    /// All gradients, `[n]`.
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// Sets every gradient to zero, as before a new step.
    ///
    /// # Errors
    /// If the arena's dtype is none that the device computes in.
    pub fn zero_gradients(&self) -> Result<()> {
        Ok(self.gradients.zero_assign()?)
    }

    /// The parameter with this id.
    ///
    /// # Errors
    /// If the arena has no such parameter.
    pub fn parameter(&self, id: ParameterId) -> Result<Parameter> {
        let unknown = AutogradError::UnknownParameter { id, parameters: self.entries.len() };
        let ArenaEntry { range, shape, .. } = self.entries.get(id.0).ok_or(unknown)?;
        let view = |arena: &Tensor| arena.narrow(0, range.start, range.len())?.reshape(shape);
        Ok(Parameter { id, value: view(&self.values)?, gradient: view(&self.gradients)? })
    }

    /// All parameters with their entries, in the order of registration.
    pub fn iter(&self) -> impl Iterator<Item = (&ArenaEntry, Parameter)> {
        self.entries.iter().enumerate().map(|(i, entry)| {
            (entry, self.parameter(ParameterId(i)).expect("an entry's own range lies inside the arena"))
        })
    }

    /// Number of parameters, the gaps left out.
    pub fn parameter_count(&self) -> usize {
        self.entries.iter().map(|e| e.range.len()).sum()
    }
}
