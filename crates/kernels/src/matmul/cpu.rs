//! Matrix product on the CPU by the `gemm` crates' kernels.
//!
//! One large product is spread over threads by gemm itself, which hands out whole tiles of C: each element is summed by
//! one thread over the same blocks of k whatever the number of threads, so results do not depend on it (there is a
//! test). Batches of small products run one product per task.

use std::any::TypeId;

use gemm_common::{Parallelism, Ptr};
use rayon::prelude::*;

use super::MatmulSpec;
use crate::error::Result;
use crate::float::Float;

/// Multiply-adds from which one product of a batch is worth all threads.
const LARGE: usize = 1 << 21;

/// `C[b] = alpha * A[b] B[b] + beta * C[b]`; see the module for shapes and strides.
///
/// # Errors
/// Operands shorter than their strides reach, or a C whose elements overlap.
pub fn matmul<T: Float>(spec: &MatmulSpec, alpha: T, a: &[T], b: &[T], beta: T, c: &mut [T]) -> Result<()> {
    spec.validate(a.len(), b.len(), c.len())?;
    if spec.m == 0 || spec.n == 0 {
        return Ok(());
    }
    let c = Ptr(c.as_mut_ptr());
    let work = spec.m.saturating_mul(spec.n).saturating_mul(spec.k);
    if spec.batch == 1 || work >= LARGE {
        for batch in 0..spec.batch {
            multiply(spec, batch, alpha, a, b, beta, c, Parallelism::Rayon(0));
        }
    } else {
        (0..spec.batch).into_par_iter().with_min_len((LARGE / work.max(1)).max(1)).for_each(|batch| {
            multiply(spec, batch, alpha, a, b, beta, c, Parallelism::None);
        });
    }
    Ok(())
}

/// Product number `batch` of a spec that [`matmul`] has validated against the lengths of `a`, `b` and the slice at `c`.
fn multiply<T: Float>(
    spec: &MatmulSpec,
    batch: usize,
    alpha: T,
    a: &[T],
    b: &[T],
    beta: T,
    c: Ptr<T>,
    parallelism: Parallelism,
) {
    // gemm writes down columns of C, so a row-major C is computed as C^T = B^T A^T.
    let swap = spec.c.column < spec.c.row;
    let (spec, a, b) = if swap { (&spec.swapped(), b, a) } else { (spec, a, b) };
    let MatmulSpec { m, n, k, .. } = *spec;
    // An operand without elements may be shorter than its batch offset.
    let (a, b) = if k == 0 { (&[][..], &[][..]) } else { (&a[batch * spec.a.batch..], &b[batch * spec.b.batch..]) };
    // No stride that is used passes isize::MAX, because slices do not reach further; an unused one may be anything.
    let (a_row, a_column) = (spec.a.row as isize, spec.a.column as isize);
    let (b_row, b_column) = (spec.b.row as isize, spec.b.column as isize);
    let (c_row, c_column) = (spec.c.row as isize, spec.c.column as isize);
    let c = c.wrapping_add(batch * spec.c.batch).0;
    let keep = beta != T::ZERO;

    macro_rules! product {
        ($gemm:path, $t:ty) => {
            $gemm()(
                m,
                n,
                k,
                c.cast::<$t>(),
                c_column,
                c_row,
                keep,
                a.as_ptr().cast::<$t>(),
                a_column,
                a_row,
                b.as_ptr().cast::<$t>(),
                b_column,
                b_row,
                beta.to_f64() as $t,
                alpha.to_f64() as $t,
                false,
                false,
                false,
                parallelism,
            )
        };
    }

    // SAFETY: `MatmulSpec::validate` has checked that every index that the sizes and strides reach lies inside the
    // slices of A and B and inside the exclusively borrowed slice of C, and that no two elements of C (of one matrix or
    // of two matrices of the batch) share memory, so the threads inside gemm and concurrent calls for other batches
    // write disjoint elements. The casts are from T to itself: `Float` is sealed and only f32 and f64 implement it.
    #[allow(unsafe_code)]
    unsafe {
        if TypeId::of::<T>() == TypeId::of::<f32>() {
            product!(gemm_f32::gemm::f32::get_gemm_fn, f32);
        } else if TypeId::of::<T>() == TypeId::of::<f64>() {
            product!(gemm_f64::gemm::f64::get_gemm_fn, f64);
        } else {
            unreachable!("Float is implemented for f32 and f64 only");
        }
    }
}
