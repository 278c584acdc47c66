//! SwiGLU's elementwise half: `out = silu(gate) * up`, `silu(x) = x sigmoid(x)`.
//!
//! All slices have one length. Saved for the backward pass: `gate` and `up`.
//! Backward, with `s = sigmoid(gate)`: `dgate = dout * up * s (1 + gate (1 - s))`, `dup = dout * gate * s`, overwritten.

pub mod cpu;
pub mod cuda;
