//! The differentiable ops, one file each: formula, forward, backward, gradient-check cases.

pub mod add;
pub mod affine;
pub mod broadcast_to;
pub mod div;
pub mod embedding;
pub mod exp;
pub mod head_norm;
pub mod linear;
pub mod linear_cross_entropy;
pub mod log;
pub mod matmul;
pub mod mul;
pub mod narrow;
pub mod permute;
pub mod reshape;
pub mod rms_norm;
pub mod rope;
pub mod sigmoid;
pub mod silu;
pub mod softmax_attention;
pub mod stick_breaking_attention;
pub mod sub;
pub mod sum;
pub mod swiglu;
pub mod tanh;

pub use embedding::embedding;
pub use head_norm::head_norm;
pub use linear::linear;
pub use linear_cross_entropy::linear_cross_entropy;
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use softmax_attention::softmax_attention;
pub use stick_breaking_attention::{StickBreakingOutput, stick_breaking_attention};
pub use swiglu::swiglu;
