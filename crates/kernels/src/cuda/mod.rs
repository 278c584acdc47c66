//! The CUDA runtime under the ops: one [`Gpu`] a device, [`Queue`]s of work on it, views of device memory.
//!
//! Nothing of CUDA is needed to build this crate, and nothing is touched until [`Gpu::open`] is called: driver, NVRTC and
//! cuBLASLt are found at run time ([`library`]). Kernels are text in `cuda/*.cu`, compiled at first use for the card that
//! is there and kept on disk ([`compile`]).
//!
//! * [`DeviceRef`] and [`DeviceMut`] are contiguous device memory with an element type, made from cudarc's slices or from
//!   raw pointers.
//! * An op is a function of a [`Queue`], its spec and views. It checks the spec against the views before it launches
//!   anything; launching itself, the one unsafe act, is in `launch.rs`.
//!
//! **Order.** Work is put on the queue's stream and nothing else. Memory that other streams write or read has to be
//! ordered by the caller's events; cudarc's own event tracking sees no access made here.

pub mod compile;
mod device;
mod event;
mod launch;
pub mod library;
mod mapping;
mod queue;
mod tensor_map;
pub(crate) mod units;
mod view;

pub use compile::Source;
pub use device::{Gpu, MemoryInfo};
pub use event::Event;
pub use launch::{Arg, Kernel, Launch};
pub use queue::{Memory, Queue, Scratch, Span, Timer};
pub(crate) use tensor_map::{Boxes, TensorMap};
pub use units::DeviceView;
pub use view::{DeviceElement, DeviceMut, DeviceRef, DeviceType, check};

/// The architecture of Hopper cards with the instructions that only they have.
pub(crate) const HOPPER: &str = "sm_90a";

/// Every source that the ops can ask for on an architecture such as `sm_90a`, so that one test can compile them all without a
/// GPU.
pub fn all_sources(architecture: &str) -> Vec<Source> {
    let pointwise = [
        crate::elementwise::cuda::sources(),
        crate::reduce::cuda::sources(),
        crate::rms_norm::cuda::sources(),
        crate::group_norm::cuda::sources(),
        crate::swiglu::cuda::sources(),
        crate::rope::cuda::sources(),
        crate::embedding::cuda::sources(),
        crate::cross_entropy::cuda::sources(),
        crate::adamw::cuda::sources(),
    ];
    let attention = [
        crate::attention::f32_cuda::sources(),
        crate::attention::softmax::cuda::sources(),
        crate::attention::stick_breaking::cuda::sources(),
        crate::attention::stick_breaking::tiles_cuda::sources(),
        crate::attention::decode_cuda::sources(),
    ];
    let hopper = if architecture == HOPPER { crate::attention::stick_breaking::hopper::sources() } else { Vec::new() };
    [pointwise.concat(), attention.concat(), hopper].concat()
}

/// The sources that a model with this head dimension asks for in this type on an architecture, to be compiled before its first
/// step.
pub fn sources_for(architecture: &str, head_dim: usize, dtype: DeviceType) -> Vec<Source> {
    let wanted = |source: &Source| {
        source.defines.iter().all(|(name, value)| match (*name, dtype) {
            ("HEAD_DIM", DeviceType::Bf16) => *value == head_dim.to_string(),
            ("HEAD_DIM", _) => false,
            ("WIDTH", DeviceType::F32) => {
                value.parse().is_ok_and(|width: usize| (head_dim..2 * head_dim.max(32)).contains(&width))
            }
            ("WIDTH", _) => false,
            _ => true,
        })
    };
    all_sources(architecture).into_iter().filter(wanted).collect()
}
