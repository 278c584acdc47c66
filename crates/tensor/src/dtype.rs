//! The element types a tensor can hold.

use crate::storage::{Buffer, CpuStorage};
use half::bf16;
use std::fmt;

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit floating point: the working type on a CPU.
    F32,
    /// 64-bit floating point: references and gradient checks.
    F64,
    /// bfloat16: storage and interchange on a CPU, the compute type of a GPU.
    BF16,
    /// 32-bit unsigned integers: token ids, positions.
    U32,
    /// 32-bit signed integers: labels, `cu_seqlens`.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 | DType::I32 => 4,
            DType::F64 => 8,
            DType::BF16 => 2,
        }
    }

    /// Whether the type is one of the floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::BF16)
    }

    /// The type's lower-case name, as configs and errors spell it.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
            DType::I32 => "i32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a tensor can hold. Sealed: it is exactly the list of [`DType`].
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + fmt::Debug + bytemuck::Pod + 'static {
    /// The matching [`DType`].
    const DTYPE: DType;
    /// The value nearest to a float64, ties to even; an integer drops the fraction and saturates, NaN becomes 0.
    fn from_f64(x: f64) -> Self;
    /// The value as float64 (exact for every type here).
    fn to_f64(self) -> f64;
    #[doc(hidden)]
    fn wrap(buffer: Buffer<Self>) -> CpuStorage;
    #[doc(hidden)]
    fn buffer(storage: &CpuStorage) -> Option<&Buffer<Self>>;
    #[doc(hidden)]
    fn buffer_mut(storage: &mut CpuStorage) -> Option<&mut Buffer<Self>>;
}

macro_rules! element {
    ($t:ty, $variant:ident, $from:expr, $to:expr) => {
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$variant;
            fn from_f64(x: f64) -> Self {
                $from(x)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn wrap(buffer: Buffer<Self>) -> CpuStorage {
                CpuStorage::$variant(buffer)
            }
            fn buffer(storage: &CpuStorage) -> Option<&Buffer<Self>> {
                match storage {
                    CpuStorage::$variant(buffer) => Some(buffer),
                    _ => None,
                }
            }
            fn buffer_mut(storage: &mut CpuStorage) -> Option<&mut Buffer<Self>> {
                match storage {
                    CpuStorage::$variant(buffer) => Some(buffer),
                    _ => None,
                }
            }
        }
    };
}

element!(f32, F32, |x| x as f32, |x: f32| f64::from(x));
element!(f64, F64, |x| x, |x| x);
element!(bf16, BF16, bf16_from_f64, |x: bf16| f64::from(x));
element!(u32, U32, |x| x as u32, |x: u32| f64::from(x));
element!(i32, I32, |x| x as i32, |x: i32| f64::from(x));

/// Rounds to nearest even, once.
///
/// `bf16::from_f64` looks at the upper half of the float64 alone and so takes a number just above a tie for the tie. Here
/// float32 is between, rounded to odd: its last bit remembers that something was cut off, which makes the second rounding
/// right (Boldo and Melquiond, "When double rounding is odd", 2005).
fn bf16_from_f64(x: f64) -> bf16 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || x.is_nan() {
        return bf16::from_f32(nearest);
    }
    let toward_zero = nearest.to_bits() - u32::from(back.abs() > x.abs());
    bf16::from_f32(f32::from_bits(toward_zero | 1))
}
