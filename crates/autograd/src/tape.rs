//! The tape: what ran, in order, and the loop that runs it backwards.

use crate::error::{AutogradError, Result};
use crate::parameter::{Parameter, ParameterId};
use crate::var::Var;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use stickbreak_tensor::{DType, Device, Shape, Tensor};

/// A differentiable op after its forward pass: exactly what its backward needs.
///
/// `backward` takes the op by value, so whatever it saved is freed as soon as it has run.
pub trait Op {
    /// The op's name in the registry.
    fn name(&self) -> &'static str;

    /// Given the gradients of the outputs, adds the gradients of the inputs to `sink`.
    fn backward(self: Box<Self>, outputs: OutputGradients, sink: &mut Sink<'_>) -> Result<()>;
}

/// The gradients of an op's outputs; one that nothing depended on is absent.
pub struct OutputGradients {
    gradients: Vec<Option<Tensor>>,
}

impl OutputGradients {
    /// The gradient of the only output.
    pub fn single(mut self) -> Tensor {
        debug_assert_eq!(self.gradients.len(), 1);
        self.take(0).expect("backward is called only if some output has a gradient")
    }

    /// The gradient of output `index`, or `None` if nothing depended on it.
    pub fn take(&mut self, index: usize) -> Option<Tensor> {
        self.gradients[index].take()
    }
}

/// Index of a gradient on the tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) usize);

/// Where the gradient of one tracked value is gathered.
pub(crate) struct SlotState {
    pub(crate) shape: Shape,
    dtype: DType,
    device: Device,
    gradient: Option<Tensor>,
    /// A parameter's gradient lies in its arena instead.
    pub(crate) parameter: Option<Parameter>,
    /// Recorded ops that take this value and whose backward has not run yet.
    pending_uses: usize,
}

pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) inputs: Vec<Option<Slot>>,
    pub(crate) outputs: Vec<Slot>,
    op: Option<Box<dyn Op>>,
}

/// The record of one step: one forward pass, then one backward pass, which uses it up.
pub struct Tape {
    recording: bool,
    /// Whether the backward pass has taken the ops' saved state.
    used_up: Cell<bool>,
    pub(crate) nodes: RefCell<Vec<Node>>,
    pub(crate) slots: RefCell<Vec<SlotState>>,
    parameters: RefCell<HashMap<ParameterId, Slot>>,
    /// Parameters that were used although nothing is recorded; see [`crate::checkpoint`].
    used_parameters: RefCell<Vec<Parameter>>,
    before_use: Option<BeforeUse>,
}

/// Called with each parameter before an op reads its value: the seam at which values that are still on their way from
/// other ranks are waited for.
#[derive(Clone)]
pub struct BeforeUse(Rc<dyn Fn(ParameterId)>);

impl BeforeUse {
    /// Calls `hook`.
    pub fn new(hook: impl Fn(ParameterId) + 'static) -> Self {
        Self(Rc::new(hook))
    }
}

impl fmt::Debug for BeforeUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BeforeUse")
    }
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// A tape that records.
    pub fn new() -> Self {
        Self::with_recording(true)
    }

    /// A tape that records nothing: every variable on it is a constant and ops save nothing. For evaluation.
    pub fn without_gradients() -> Self {
        Self::with_recording(false)
    }

    fn with_recording(recording: bool) -> Self {
        Self {
            recording,
            used_up: Cell::new(false),
            nodes: RefCell::default(),
            slots: RefCell::default(),
            parameters: RefCell::default(),
            used_parameters: RefCell::default(),
            before_use: None,
        }
    }

    /// The tape with a hook that is called before a parameter is used on it, in its forward pass.
    #[must_use]
    pub fn with_before_use(self, before_use: Option<BeforeUse>) -> Self {
        Self { before_use, ..self }
    }

    /// The hook of [`with_before_use`](Self::with_before_use), for a tape that stands in for this one.
    pub(crate) fn before_use(&self) -> Option<BeforeUse> {
        self.before_use.clone()
    }

    /// Number of ops recorded so far.
    pub fn len(&self) -> usize {
        self.nodes.borrow().len()
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn new_slot(&self, value: &Tensor, parameter: Option<Parameter>) -> Slot {
        let mut slots = self.slots.borrow_mut();
        let (shape, dtype, device) = (value.shape().clone(), value.dtype(), value.device());
        slots.push(SlotState { shape, dtype, device, gradient: None, parameter, pending_uses: 0 });
        Slot(slots.len() - 1)
    }

    /// A value through which no gradient flows.
    pub fn constant(&self, value: Tensor) -> Var<'_> {
        Var { tape: self, value, slot: None }
    }

    /// A value whose gradient can be asked for after [`backward`](Self::backward).
    pub fn input(&self, value: Tensor) -> Var<'_> {
        let slot = self.recording.then(|| self.new_slot(&value, None));
        Var { tape: self, value, slot }
    }

    /// A parameter; every use on this tape adds to its gradient in the arena.
    ///
    /// # Panics
    /// If the tape has a parameter of another arena under the same id: a tape serves one arena.
    pub fn parameter(&self, parameter: &Parameter) -> Var<'_> {
        if let Some(BeforeUse(hook)) = &self.before_use {
            hook(parameter.id);
        }
        let value = parameter.value.clone();
        if !self.recording {
            let mut used = self.used_parameters.borrow_mut();
            if used.iter().all(|p| p.id != parameter.id) {
                used.push(parameter.clone());
            }
            return self.constant(value);
        }
        let known = self.parameters.borrow().get(&parameter.id).copied();
        let slot = known.unwrap_or_else(|| {
            let slot = self.new_slot(&value, Some(parameter.clone()));
            self.parameters.borrow_mut().insert(parameter.id, slot);
            slot
        });
        let slots = self.slots.borrow();
        let known = slots[slot.0].parameter.as_ref().expect("a slot in the map of parameters is a parameter's");
        let same_arena = known.gradient.shares_storage(&parameter.gradient);
        assert!(same_arena, "parameter {} of two arenas on one tape", parameter.id.0);
        Var { tape: self, value, slot: Some(slot) }
    }

    /// Lets the gradient of an input start from a sum gathered elsewhere instead of nothing.
    pub(crate) fn start_gradient(&self, input: &Var<'_>, gradient: Option<Tensor>) {
        if let Some(slot) = input.slot {
            self.slots.borrow_mut()[slot.0].gradient = gradient;
        }
    }

    pub(crate) fn used_parameters(&self) -> Vec<Parameter> {
        self.used_parameters.borrow().clone()
    }

    /// Records an op that has run: the only way to make a tracked variable that is not a leaf.
    ///
    /// If no input is tracked the outputs are constants and the op, with all it saved, is dropped.
    ///
    /// # Panics
    /// If an input belongs to another tape.
    pub fn record<'t, const N: usize>(
        &'t self,
        op: impl Op + 'static,
        inputs: &[&Var<'t>],
        outputs: [Tensor; N],
    ) -> [Var<'t>; N] {
        for input in inputs {
            assert!(std::ptr::eq(self, input.tape), "{}: an input belongs to another tape", op.name());
        }
        if !inputs.iter().any(|v| v.is_tracked()) {
            return outputs.map(|value| self.constant(value));
        }
        let inputs: Vec<Option<Slot>> = inputs.iter().map(|v| v.slot).collect();
        for slot in inputs.iter().flatten() {
            self.slots.borrow_mut()[slot.0].pending_uses += 1;
        }
        let outputs = outputs.map(|value| {
            let slot = Some(self.new_slot(&value, None));
            Var { tape: self, value, slot }
        });
        let output_slots = outputs.iter().filter_map(|v| v.slot).collect();
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Node { name: op.name(), inputs, outputs: output_slots, op: Some(Box::new(op)) });
        outputs
    }

    /// Gradients of a loss of one element. Those of parameters are added to their arena, those of inputs are returned.
    ///
    /// # Errors
    /// If the loss has more elements or depends on nothing tracked, an op's backward fails, or the tape has run backward
    /// before: what the ops saved is gone then. To accumulate, record each micro-batch on a tape of its own.
    pub fn backward(&self, loss: &Var<'_>) -> Result<Gradients> {
        self.backward_with(loss, 1.0, &mut |_| {})
    }

    /// Gradients of `scale * loss`. `ready` is called once for each parameter on the tape, as soon as its gradient is
    /// complete: the seam at which gradients are sent to other ranks while the backward pass goes on.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_with(&self, loss: &Var<'_>, scale: f64, ready: &mut dyn FnMut(ParameterId)) -> Result<Gradients> {
        if loss.value.elements() != 1 {
            return Err(AutogradError::NotScalar { shape: loss.shape().clone() });
        }
        let seed = Tensor::full_on(scale, loss.shape(), loss.dtype(), loss.value.device())?;
        self.backward_from(&[(loss, seed)], ready)
    }

    /// Vector-Jacobian product: starts from the given gradients of several variables.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_from(&self, seeds: &[(&Var<'_>, Tensor)], ready: &mut dyn FnMut(ParameterId)) -> Result<Gradients> {
        if !seeds.iter().any(|(var, _)| var.is_tracked()) {
            return Err(AutogradError::Untracked);
        }
        self.backward_from_any(seeds, ready)
    }

    /// [`backward_from`](Self::backward_from) that takes seeds into which nothing tracked went.
    pub(crate) fn backward_from_any(
        &self,
        seeds: &[(&Var<'_>, Tensor)],
        ready: &mut dyn FnMut(ParameterId),
    ) -> Result<Gradients> {
        if self.used_up.replace(true) {
            return Err(AutogradError::UsedUp);
        }
        let mut slots = self.slots.borrow_mut();
        for (index, (var, gradient)) in seeds.iter().enumerate() {
            assert!(std::ptr::eq(self, var.tape), "backward of a variable of another tape");
            let inputs = [var.slot];
            Sink { op: "seed", inputs: &inputs, slots: &mut slots }.add(0, gradient.clone()).map_err(|e| match e {
                AutogradError::GradientShape { op, expected, found, .. } => {
                    AutogradError::GradientShape { op, input: index, expected, found }
                }
                other => other,
            })?;
        }
        // A parameter that no op took, or that is a seed itself, is complete before the loop.
        for state in slots.iter().filter(|state| state.pending_uses == 0) {
            state.parameter.iter().for_each(|parameter| ready(parameter.id));
        }
        // Creation order is topological, so one loop from the end sees every op after all ops that use its outputs.
        // The nodes stay, for a picture of the graph; their ops, with all they saved, go one by one.
        for node in self.nodes.borrow_mut().iter_mut().rev() {
            let gradients: Vec<_> = node.outputs.iter().map(|slot| slots[slot.0].gradient.take()).collect();
            if let Some(op) = node.op.take().filter(|_| gradients.iter().any(Option::is_some)) {
                let mut sink = Sink { op: node.name, inputs: &node.inputs, slots: &mut slots };
                op.backward(OutputGradients { gradients }, &mut sink)
                    .map_err(|e| AutogradError::Backward { op: node.name, source: Box::new(e) })?;
            }
            for slot in node.inputs.iter().flatten() {
                let state = &mut slots[slot.0];
                state.pending_uses -= 1;
                if let (0, Some(parameter)) = (state.pending_uses, &state.parameter) {
                    ready(parameter.id);
                }
            }
        }
        let gradients = slots.iter_mut().map(|state| state.gradient.take()).collect();
        Ok(Gradients { gradients })
    }
}

/// The gradients of the inputs of a tape, after the backward pass.
pub struct Gradients {
    gradients: Vec<Option<Tensor>>,
}

impl Gradients {
    /// The gradient of a variable made by [`Tape::input`]; `None` if the loss did not depend on it. The gradients of
    /// intermediate values are gone: they were used up on the way; those of parameters are in their arena.
    pub fn get(&self, var: &Var<'_>) -> Option<&Tensor> {
        self.gradients.get(var.slot?.0)?.as_ref()
    }

    pub(crate) fn take(&mut self, var: &Var<'_>) -> Option<Tensor> {
        self.gradients.get_mut(var.slot?.0)?.take()
    }
}

/// Takes the gradients of one op's inputs.
pub struct Sink<'a> {
    op: &'static str,
    inputs: &'a [Option<Slot>],
    slots: &'a mut [SlotState],
}

/// Memory to add a gradient to; see [`Sink::buffer`].
pub struct GradientBuffer {
    /// Contiguous, of the input's shape, shared with nothing that is still read.
    pub tensor: Tensor,
    /// Whether its contents are unspecified and have to be overwritten instead of added to.
    pub is_new: bool,
}

impl Sink<'_> {
    /// Whether input `index` needs a gradient.
    pub fn wants(&self, index: usize) -> bool {
        self.inputs[index].is_some()
    }

    /// The mask of the first `N` inputs.
    pub fn wanted<const N: usize>(&self) -> [bool; N] {
        std::array::from_fn(|index| self.wants(index))
    }

    /// Adds a gradient for input `index`; ignored if that input needs none.
    ///
    /// # Errors
    /// If its shape or dtype is not the input's.
    pub fn add(&mut self, index: usize, gradient: Tensor) -> Result<()> {
        let Some(slot) = self.inputs[index] else { return Ok(()) };
        let state = &mut self.slots[slot.0];
        if *gradient.shape() != state.shape {
            let (expected, found) = (state.shape.clone(), gradient.shape().clone());
            return Err(AutogradError::GradientShape { op: self.op, input: index, expected, found });
        }
        // Sums over tokens come in float32 beside bfloat16 values: a parameter's arena takes them so, others are rounded.
        let gradient = match (state.dtype, gradient.dtype(), &state.parameter) {
            (DType::BF16, DType::F32, None) => gradient.to_dtype(DType::BF16)?,
            _ => gradient,
        };
        let summed_in = state.parameter.as_ref().map(|parameter| parameter.gradient.dtype());
        if gradient.dtype() != state.dtype && Some(gradient.dtype()) != summed_in {
            let (expected, found) = (state.dtype, gradient.dtype());
            return Err(AutogradError::GradientDType { op: self.op, input: index, expected, found });
        }
        if let Some(parameter) = &state.parameter {
            return Ok(parameter.gradient.add_assign_scaled(1.0, &gradient)?);
        }
        state.gradient = Some(match state.gradient.take() {
            None => gradient,
            // A gradient may be shared (an addition hands the same one to both sides): write only into what is ours.
            Some(sum) if sum.is_unique() && sum.is_contiguous() => {
                sum.add_assign_scaled(1.0, &gradient)?;
                sum
            }
            Some(sum) => sum.add(&gradient)?,
        });
        Ok(())
    }

    /// The parameter that input `index` is, if it is one.
    pub(crate) fn parameter(&self, index: usize) -> Option<&Parameter> {
        self.slots[self.inputs[index]?.0].parameter.as_ref()
    }

    /// Takes out what is gathered for input `index` so far, to be put back with [`replace`](Self::replace).
    pub(crate) fn take(&mut self, index: usize) -> Option<Tensor> {
        self.slots[self.inputs[index]?.0].gradient.take()
    }

    /// Puts a gradient in the place of what was taken out.
    pub(crate) fn replace(&mut self, index: usize, gradient: Option<Tensor>) {
        if let Some(slot) = self.inputs[index] {
            self.slots[slot.0].gradient = gradient;
        }
    }

    /// The first of the inputs that is the same variable as input `index`.
    pub(crate) fn first_occurrence(&self, index: usize) -> usize {
        let same = |slot: &Option<Slot>| slot.is_some() && *slot == self.inputs[index];
        self.inputs.iter().position(same).unwrap_or(index)
    }

    /// Adds an optional gradient, as backward kernels return them.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_option(&mut self, index: usize, gradient: Option<Tensor>) -> Result<()> {
        gradient.map_or(Ok(()), |gradient| self.add(index, gradient))
    }

    /// Memory of input `index`'s gradient for a kernel that accumulates in place (a matrix product with beta = 1):
    /// a parameter's place in the arena, or the sum so far, or new memory. The input must be wanted.
    ///
    /// # Errors
    /// If the input needs no gradient.
    pub fn buffer(&mut self, index: usize) -> Result<GradientBuffer> {
        let slot = self.inputs[index].ok_or(AutogradError::Untracked)?;
        let state = &mut self.slots[slot.0];
        if let Some(parameter) = &state.parameter {
            return Ok(GradientBuffer { tensor: parameter.gradient.clone(), is_new: false });
        }
        let is_new = state.gradient.is_none();
        let tensor = match state.gradient.take() {
            None => Tensor::empty_on(&state.shape, state.dtype, state.device)?,
            Some(sum) if sum.is_unique() && sum.is_contiguous() => sum,
            Some(sum) => sum.copy()?,
        };
        state.gradient = Some(tensor.clone());
        Ok(GradientBuffer { tensor, is_new })
    }

    /// Adds the matrix product `a b` as the gradient of input `index`, without a temporary; ignored if it needs none.
    ///
    /// # Errors
    /// If the product has not the input's shape.
    pub fn add_matmul(&mut self, index: usize, a: &Tensor, b: &Tensor) -> Result<()> {
        if self.wants(index) {
            let buffer = self.buffer(index)?;
            buffer.tensor.matmul_assign(1.0, a, b, if buffer.is_new { 0.0 } else { 1.0 })?;
        }
        Ok(())
    }
}
