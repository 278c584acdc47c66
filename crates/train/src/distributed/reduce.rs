//! What a rank gets of a collective, from the CPU values of all ranks. Sums run in the order of the ranks.

use super::Reduction;
use stickbreak_tensor::Element;

/// Runs `$body` with `$t` bound to the Rust type of a `$dtype`.
macro_rules! for_number {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            stickbreak_tensor::DType::F32 => {
                type $t = f32;
                $body
            }
            stickbreak_tensor::DType::F64 => {
                type $t = f64;
                $body
            }
            stickbreak_tensor::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            stickbreak_tensor::DType::U32 => {
                type $t = u32;
                $body
            }
            stickbreak_tensor::DType::I32 => {
                type $t = i32;
                $body
            }
            other => unreachable!("no tensor op computes in {other}"),
        }
    };
}
pub(super) use for_number;

/// What a rank gets, from what all have.
pub(super) trait Compute {
    fn result<T: Number>(&self, values: &[&[T]]) -> Vec<T>;
}

/// A part of the reduction, in the order of the ranks.
pub(super) struct Reduce {
    pub(super) reduction: Reduction,
    pub(super) part: usize,
    pub(super) parts: usize,
}

impl Compute for Reduce {
    fn result<T: Number>(&self, values: &[&[T]]) -> Vec<T> {
        let n = values[0].len() / self.parts;
        let own = |values: &&[T]| values[self.part * n..][..n].to_vec();
        let parts: Vec<Vec<T>> = values.iter().map(own).collect();
        (0..n).map(|i| T::reduced(self.reduction, parts.iter().map(|part| part[i]))).collect()
    }
}

/// Everything, one rank behind the other.
pub(super) struct Gather;

impl Compute for Gather {
    fn result<T: Number>(&self, values: &[&[T]]) -> Vec<T> {
        values.concat()
    }
}

/// What one rank has.
pub(super) struct Of(pub(super) usize);

impl Compute for Of {
    fn result<T: Number>(&self, values: &[&[T]]) -> Vec<T> {
        values[self.0].to_vec()
    }
}

/// An element type that ranks can reduce.
pub(super) trait Number: Element {
    fn reduced(reduction: Reduction, values: impl Iterator<Item = Self>) -> Self;
}

macro_rules! number {
    (float $($t:ty, $wide:ty);*) => { $(impl Number for $t {
        fn reduced(reduction: Reduction, values: impl Iterator<Item = Self>) -> Self {
            let values = values.map(<$wide>::from);
            let result = match reduction {
                Reduction::Sum => values.reduce(|a, b| a + b),
                // Loses a NaN, as the GPUs' library does.
                Reduction::Max => values.reduce(<$wide>::max),
            };
            <$t>::narrowed(result.unwrap_or_default())
        }
    })* };
    (integer $($t:ty),*) => { $(impl Number for $t {
        fn reduced(reduction: Reduction, values: impl Iterator<Item = Self>) -> Self {
            let result = match reduction {
                Reduction::Sum => values.reduce(<$t>::wrapping_add),
                Reduction::Max => values.reduce(<$t>::max),
            };
            result.unwrap_or_default()
        }
    })* };
}
number!(float f32, f32; f64, f64; half::bf16, f32);
number!(integer u32, i32);

/// The way back from the type that sums are taken in.
trait Narrowed<W> {
    fn narrowed(wide: W) -> Self;
}

impl Narrowed<f32> for f32 {
    fn narrowed(wide: f32) -> Self {
        wide
    }
}

impl Narrowed<f64> for f64 {
    fn narrowed(wide: f64) -> Self {
        wide
    }
}

impl Narrowed<f32> for half::bf16 {
    fn narrowed(wide: f32) -> Self {
        Self::from_f32(wide)
    }
}
