//! Numerical kernels of stickbreak, on raw memory.
//!
//! The crate knows slices, shapes, strides and threads; it knows nothing of tensors, devices or gradients' bookkeeping,
//! so that it can be used alone by a program with its own memory.
//!
//! Every op is a folder `src/<op>/`: `mod.rs` says what it computes (formula, shapes, what is saved for the backward pass)
//! and holds its *spec*, which is validated once; `cpu.rs` is the CPU implementation, generic over [`Float`] (f32, f64)
//! and parallel over rayon's current thread pool. `KERNELS.md` has one row per op.
//!
//! Invariants:
//! * results do not depend on the number of threads: work is cut into pieces by shape alone, and partial sums are
//!   combined in a fixed order;
//! * an output is written in full, whatever it held before, unless its doc says "accumulates";
//! * a shape error is reported before anything is written.
//!
//! # Stick-breaking attention in a program of your own
//!
//! On the CPU, [`attention::stick_breaking::cpu`] takes slices. On an NVIDIA card (Ampere or newer, driver 580 or newer; the
//! toolkit is not needed to build, NVRTC is found at run time, see [`cuda::library`]) a
//! [`Plan`](attention::stick_breaking::cuda::Plan) takes device memory: [`DeviceRef`](cuda::DeviceRef) and
//! [`DeviceMut`](cuda::DeviceMut) are made from cudarc's slices or from raw pointers. `examples/standalone.rs` is a whole
//! program: both passes on a context, a stream and slices of its own.
//!
//! **Shapes.** Documents are packed: q and o are `[tokens, query_heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`,
//! rem and its gradient f32 `[tokens, query_heads]`, and `cu_seqlens`, on the host, are the document offsets with the
//! leading 0. A plain batch is packed as it is: `[batch, length, ...]` with offsets `0, length, 2 length, ...`. Query
//! head h reads key/value head `h / (query_heads / kv_heads)`. bf16 has tensor-core kernels for head dims 8 to 128 in
//! steps of 8, and 256; f32 has plain ones up to 256.
//!
//! **Strides.** The heads of a token are contiguous; tokens of q, k, v and o may lie further apart
//! ([`AttentionLayout`](attention::AttentionLayout)), so that q, k and v can be parts of one projection: slice the view at
//! the part's first element and give the projection's width as the stride. For bf16 strides have to be multiples of 8
//! elements and addresses multiples of 16 bytes. Gradients are contiguous and overwritten in full.
//!
//! **Streams.** A [`Queue`](cuda::Queue) is a device and one stream, its own ([`Queue::open`](cuda::Queue::open)) or yours
//! ([`Queue::new`](cuda::Queue::new)). Everything is put on that stream and nothing waits for it, except downloads,
//! [`visited_tiles`](attention::stick_breaking::cuda::Saved::visited_tiles) and
//! [`TileCount::read`](attention::stick_breaking::tiles_cuda::TileCount::read). Memory that other streams use has to be ordered
//! by your events: cudarc's own event tracking sees no access made here, and is switched off in the context.
//!
//! **Plans.** [`Plan::new`](attention::stick_breaking::cuda::Plan::new) checks sizes and offsets, uploads tile lists and loads
//! the kernels (the first time on a machine they are compiled, which takes seconds, and kept on disk). It depends on shapes
//! and documents only: make one per batch and use it for every layer.
//!
//! **Between the passes.** `forward(.., save = true)` returns [`Saved`](attention::stick_breaking::cuda::Saved), which the
//! backward pass reads along with q, k, v and the gradient of o; o itself and rem are not needed. It holds at most an eighth
//! of what q, k, v and o take, beside 16 bits per row ([`bytes`](attention::stick_breaking::cuda::Saved::bytes)): what is left
//! of the stick at some keys, and with early exit how far each query tile went. With `save = false` nothing is kept.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod cuda;
pub mod elementwise;
pub mod embedding;
pub mod error;
pub mod float;
pub mod group_norm;
pub mod matmul;
mod parallel;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod simd;
pub mod strided;
pub mod swiglu;

pub use error::{KernelError, Result};
pub use float::Float;
pub use strided::Strided;
