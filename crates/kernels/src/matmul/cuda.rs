//! Matrix products on a CUDA device, by cuBLASLt.
//!
//! bf16 or f32 factors, sums in fp32 (true fp32 for f32 factors, no TF32), a result in bf16 or f32. The algorithm is the
//! first that cuBLASLt's heuristic names for a shape: a fixed rule, so that the same command gives the same bits on the
//! same card and library.

#![allow(unsafe_code)]

use super::{MatmulSpec, MatrixStrides};
use crate::cuda::library::{Library, require};
use crate::cuda::{DeviceMut, DeviceRef, DeviceType, Memory, Queue};
use crate::{KernelError, Result};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// Memory that cuBLASLt may use. NVIDIA recommends 32 MiB for Hopper; fixed, so that the choice of algorithm is too.
const WORKSPACE_BYTES: usize = 64 << 20;

/// `C = alpha A B + beta C`; see [`super`]. A and B are of one type (bf16 or f32); C is bf16 or f32.
/// Each of A, B and C must have stride 1 along its rows or its columns.
///
/// # Errors
/// If memory is too short, a layout is not supported, or cuBLASLt fails.
pub fn matmul(
    queue: &Queue,
    spec: &MatmulSpec,
    alpha: f32,
    a: DeviceRef<'_>,
    b: DeviceRef<'_>,
    beta: f32,
    c: &mut DeviceMut<'_>,
) -> Result<()> {
    spec.validate(a.len(), b.len(), c.len())?;
    let float = |dtype| matches!(dtype, DeviceType::F32 | DeviceType::Bf16);
    if a.dtype() != b.dtype() || !float(a.dtype()) || !float(c.dtype()) {
        let found = format!("{} x {} -> {}", a.dtype().name(), b.dtype().name(), c.dtype().name());
        return Err(KernelError::size("matmul", "the element types", "f32 or bf16, one for both factors", found));
    }
    if spec.batch == 0 || spec.m == 0 || spec.n == 0 {
        return Ok(());
    }
    if spec.k == 0 {
        // An empty product; cuBLASLt refuses it.
        return match beta {
            0.0 => clear(queue, spec, c),
            1.0 => Ok(()),
            _ => Err(KernelError::size("matmul", "beta of a product over no elements", "0 or 1", beta)),
        };
    }
    // A result stored transposed is computed as C^T = B^T A^T.
    let (_, transposed, _) = leading("c", spec.c, spec.m, spec.n)?;
    let (spec, a, b) = if transposed { (spec.swapped(), b, a) } else { (*spec, a, b) };
    queue.blas()?.run(queue, &spec, alpha, a, b, beta, c)
}

/// Zeros in every element of C.
fn clear(queue: &Queue, spec: &MatmulSpec, c: &mut DeviceMut<'_>) -> Result<()> {
    let contiguous = spec.c == MatrixStrides::row_major(spec.m, spec.n) || (spec.batch == 1 && spec.c.row == spec.n);
    if !contiguous {
        return Err(KernelError::size("matmul", "c of an empty product", "contiguous", format!("{:?}", spec.c)));
    }
    queue.zero(&mut c.slice_mut(0..spec.batch * spec.m * spec.n))
}

/// cuBLASLt's handle, its workspace and the plans made so far.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: Handle,
    workspace: Memory,
    plans: Mutex<HashMap<PlanKey, Plan>>,
}

#[derive(Debug)]
struct Handle(sys::cublasLtHandle_t);
// SAFETY: a cublasLt handle may be used from any thread (cuBLAS documentation, "thread safety" of cublasLt).
unsafe impl Send for Handle {}
// SAFETY: as above; cublasLtMatmul does not change the handle.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by create_handle and destroyed once.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// Everything that the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PlanKey {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    a: (usize, bool, usize),
    b: (usize, bool, usize),
    c: (usize, usize),
    input: DeviceType,
    output: DeviceType,
    /// The largest powers of two, up to 16 bytes, that divide the addresses.
    alignment: [u32; 3],
}

#[derive(Debug)]
struct Plan {
    descriptor: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}
// SAFETY: descriptors are plain data behind a pointer, read only after they are made.
unsafe impl Send for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made once for this plan.
        unsafe {
            let _ = result::destroy_matmul_desc(self.descriptor);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn blas_error(doing: impl std::fmt::Display) -> impl Fn(result::CublasError) -> KernelError {
    move |error| KernelError::cuda(&doing, format!("cuBLASLt: {:?}", error.0))
}

fn data_type(dtype: DeviceType) -> sys::cudaDataType {
    match dtype {
        DeviceType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

/// Leading dimension of a row-major matrix `[rows, columns]` and whether it is stored transposed, if it has a unit stride.
fn leading(
    argument: &'static str,
    strides: MatrixStrides,
    rows: usize,
    columns: usize,
) -> Result<(usize, bool, usize)> {
    let batch = strides.batch;
    if (strides.column == 1 || columns == 1) && (strides.row >= columns || rows == 1) {
        return Ok((if rows == 1 { columns.max(strides.row) } else { strides.row }, false, batch));
    }
    if (strides.row == 1 || rows == 1) && (strides.column >= rows || columns == 1) {
        return Ok((if columns == 1 { rows.max(strides.column) } else { strides.column }, true, batch));
    }
    Err(KernelError::Size {
        op: "matmul",
        what: "strides",
        expected: format!("1 along the rows or columns of {argument}"),
        found: format!("{strides:?} for [{rows}, {columns}]"),
    })
}

impl Blas {
    pub(crate) fn new(queue: &Queue) -> Result<Self> {
        require(Library::CublasLt)?;
        let handle = Handle(result::create_handle().map_err(blas_error("starting"))?);
        Ok(Self { handle, workspace: queue.memory(WORKSPACE_BYTES)?, plans: Mutex::default() })
    }

    fn run(
        &self,
        queue: &Queue,
        spec: &MatmulSpec,
        alpha: f32,
        a: DeviceRef<'_>,
        b: DeviceRef<'_>,
        beta: f32,
        c: &mut DeviceMut<'_>,
    ) -> Result<()> {
        let alignment = |pointer: u64| 1 << pointer.trailing_zeros().min(4);
        let (ldc, transposed, batch) = leading("c", spec.c, spec.m, spec.n)?;
        debug_assert!(!transposed);
        let key = PlanKey {
            batch: spec.batch,
            m: spec.m,
            n: spec.n,
            k: spec.k,
            a: leading("a", spec.a, spec.m, spec.k)?,
            b: leading("b", spec.b, spec.k, spec.n)?,
            c: (ldc, batch),
            input: a.dtype(),
            output: c.dtype(),
            alignment: [a.pointer(), b.pointer(), c.pointer()].map(alignment),
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(self.plan(&key)?),
        };
        queue.gpu().context().bind_to_thread().map_err(|e| KernelError::cuda("switching to the device", e))?;
        // A row-major matrix is the transpose of the column-major one in the same memory, so C^T = B^T A^T is computed.
        // SAFETY: the plan's layouts were made from the spec that was validated against the views' lengths; the scalars
        // are floats, as the descriptor's scale type says, and are read before the call returns.
        let ran = unsafe {
            result::matmul(
                self.handle.0,
                plan.descriptor,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b.pointer() as *const c_void,
                plan.layouts[1],
                a.pointer() as *const c_void,
                plan.layouts[0],
                c.pointer() as *const c_void,
                plan.layouts[2],
                c.pointer() as *mut c_void,
                plan.layouts[2],
                &plan.algorithm,
                self.workspace.pointer() as *mut c_void,
                WORKSPACE_BYTES,
                queue.stream().cu_stream() as CUstream as *mut _,
            )
        };
        ran.map_err(blas_error(format_args!("matrix product {}x{}x{}", spec.m, spec.n, spec.k)))
    }

    /// Descriptors and algorithm for a shape.
    fn plan(&self, key: &PlanKey) -> Result<Plan> {
        let doing = format!("preparing a matrix product {}x{}x{}", key.m, key.n, key.k);
        let error = blas_error(&doing);
        let descriptor =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
                .map_err(&error)?;
        // Column-major view: memory of a row-major [rows, columns] matrix is [columns, rows] with the same leading dimension.
        let layout = |dtype, rows: usize, columns: usize, ld: usize, batch_stride: usize| {
            let layout = result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, ld as i64)?;
            if key.batch > 1 {
                let (count, stride) = (key.batch as i32, batch_stride as i64);
                let set = |attribute, value: *const c_void, bytes| {
                    // SAFETY: the layout was just made; value points to `bytes` bytes.
                    unsafe { result::set_matrix_layout_attribute(layout, attribute, value, bytes) }
                };
                use sys::cublasLtMatrixLayoutAttribute_t as A;
                set(A::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
                set(A::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8)?;
            }
            Ok(layout)
        };
        // What is stored transposed in row-major terms is [rows, columns] in column-major ones.
        let stored = |(ld, transposed, batch): (usize, bool, usize), rows: usize, columns: usize| {
            if transposed {
                layout(key.input, rows, columns, ld, batch)
            } else {
                layout(key.input, columns, rows, ld, batch)
            }
        };
        let a = stored(key.a, key.m, key.k).map_err(&error)?;
        let b = stored(key.b, key.k, key.n).map_err(&error)?;
        let c = layout(key.output, key.n, key.m, key.c.0, key.c.1).map_err(&error)?;
        // cublasOperation_t: 0 is CUBLAS_OP_N, 1 is CUBLAS_OP_T.
        let operation = i32::from;
        use sys::cublasLtMatmulDescAttributes_t as D;
        // cuBLASLt's A is our B and the other way round.
        for (attribute, value) in
            [(D::CUBLASLT_MATMUL_DESC_TRANSA, operation(key.b.1)), (D::CUBLASLT_MATMUL_DESC_TRANSB, operation(key.a.1))]
        {
            // SAFETY: the descriptor was just made; the attribute is an int32.
            unsafe { result::set_matmul_desc_attribute(descriptor, attribute, (&raw const value).cast(), 4) }
                .map_err(&error)?;
        }
        let preference = result::create_matmul_pref().map_err(&error)?;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let [align_a, align_b, align_c] = key.alignment;
        let workspace = WORKSPACE_BYTES;
        let settings: [(P, *const c_void, usize); 5] = [
            (P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (&raw const align_b).cast(), 4),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (&raw const align_a).cast(), 4),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (&raw const align_c).cast(), 4),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (&raw const align_c).cast(), 4),
        ];
        for (attribute, value, bytes) in settings {
            // SAFETY: the preference was just made; each value has the size that its attribute asks for.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, bytes) }.map_err(&error)?;
        }
        // SAFETY: all descriptors above are alive.
        let found = unsafe { result::get_matmul_algo_heuristic(self.handle.0, descriptor, b, a, c, c, preference) };
        // SAFETY: made above, not used any more.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        let algorithm = found.map_err(blas_error(format_args!("{doing} ({key:?})")))?.algo;
        Ok(Plan { descriptor, layouts: [a, b, c], algorithm })
    }
}
