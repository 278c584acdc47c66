//! A value and its place on the tape.

use crate::tape::{Slot, Tape};
use std::fmt;
use stickbreak_tensor::{DType, Shape, Tensor};

/// A tensor that a [`Tape`] may know how to differentiate. Cheap to clone.
#[derive(Clone)]
pub struct Var<'t> {
    pub(crate) tape: &'t Tape,
    pub(crate) value: Tensor,
    /// The place where its gradient is gathered; `None` for a constant.
    pub(crate) slot: Option<Slot>,
}

impl<'t> Var<'t> {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The tape that this variable belongs to.
    pub fn tape(&self) -> &'t Tape {
        self.tape
    }

    /// The value's shape.
    pub fn shape(&self) -> &Shape {
        self.value.shape()
    }

    /// The value's dtype.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// Whether a gradient flows into this variable.
    pub fn is_tracked(&self) -> bool {
        self.slot.is_some()
    }

    /// The same value as a constant: no gradient flows through it.
    pub fn detach(&self) -> Var<'t> {
        self.tape.constant(self.value.clone())
    }
}

impl fmt::Debug for Var<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_tracked() { "tracked" } else { "constant" };
        write!(f, "Var ({kind}) {:?}", self.value)
    }
}
