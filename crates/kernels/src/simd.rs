//! Vector code without `unsafe`: the loop bodies of the kernels are plain Rust, and [`vectorize`] compiles them a second
//! time for the widest instruction set that the running processor has.

/// Runs `body` compiled for the best instruction set found at run time (AVX2 + FMA or AVX-512 on x86-64).
///
/// `body` and everything hot that it calls must be `#[inline(always)]`, or it keeps the baseline instruction set.
/// Rayon closures inside `body` are compiled elsewhere, so call this *inside* the parallel loop, once per chunk.
#[inline(always)]
pub fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}
