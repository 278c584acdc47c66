//! Tensors in safetensors files.

use crate::dtype::{DType, Element};
use crate::error::{Result, TensorError};
use crate::tensor::for_any;
use crate::{Shape, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Tensors by name, in the order of their names.
pub type NamedTensors = BTreeMap<String, Tensor>;

/// Everything in one safetensors file.
#[derive(Debug, Clone, Default)]
pub struct SafetensorsFile {
    /// The tensors.
    pub tensors: NamedTensors,
    /// The string metadata of the header.
    pub metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// A tensor that must be there.
    ///
    /// # Errors
    /// If it is not; `path` is named in the message.
    pub fn tensor(&self, path: &Path, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| TensorError::Safetensors {
            path: path.to_owned(),
            what: format!("no tensor {name:?}; the file has {:?}", self.tensors.keys().collect::<Vec<_>>()),
        })
    }
}

/// Reads a safetensors file. Float16 tensors become float32.
///
/// # Errors
/// If the file cannot be read, is not valid, or holds a dtype that tensors have not.
pub fn load(path: &Path) -> Result<SafetensorsFile> {
    let bytes = std::fs::read(path).map_err(|source| TensorError::Io { path: path.to_owned(), source })?;
    parse(path, &bytes)
}

/// Reads the bytes of a safetensors file; `path` is only named in errors.
///
/// # Errors
/// As [`load`].
pub fn parse(path: &Path, bytes: &[u8]) -> Result<SafetensorsFile> {
    let broken = |what: String| TensorError::Safetensors { path: path.to_owned(), what };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| broken(format!("not a valid file: {e}")))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| broken(format!("not a valid file: {e}")))?;
    let mut tensors = NamedTensors::new();
    for (name, view) in file.tensors() {
        let tensor = match view.dtype() {
            Dtype::F32 => from_bytes::<f32>(&view),
            Dtype::F64 => from_bytes::<f64>(&view),
            Dtype::BF16 => from_bytes::<half::bf16>(&view),
            Dtype::U32 => from_bytes::<u32>(&view),
            Dtype::I32 => from_bytes::<i32>(&view),
            Dtype::F16 => {
                let values = view.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
                Tensor::from_vec(values.collect::<Vec<f32>>(), view.shape())
            }
            other => return Err(broken(format!("tensor {name:?} has dtype {other:?}, which is not supported"))),
        };
        tensors.insert(name, tensor?);
    }
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok(SafetensorsFile { tensors, metadata })
}

fn from_bytes<T: Element>(view: &TensorView<'_>) -> Result<Tensor> {
    // The bytes of the file need not be aligned for T, hence a copy.
    let mut values = vec![T::default(); view.shape().iter().product()];
    bytemuck::cast_slice_mut::<T, u8>(&mut values).copy_from_slice(view.data());
    Tensor::from_vec(values, view.shape())
}

/// A contiguous tensor and its bytes, as safetensors wants them.
struct Bytes {
    dtype: Dtype,
    shape: Shape,
    data: Vec<u8>,
}

impl View for &Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The bytes of a safetensors file with these tensors. The same tensors give the same bytes, as long as there is no more
/// than one entry of metadata: the safetensors crate writes those in any order.
///
/// # Errors
/// If the tensors cannot be serialised.
pub fn serialize(tensors: &NamedTensors, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let views: Vec<(&str, Bytes)> = tensors.iter().map(|(name, tensor)| (name.as_str(), to_bytes(tensor))).collect();
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
    safetensors::serialize(views.iter().map(|(name, bytes)| (*name, bytes)), metadata).map_err(|e| {
        TensorError::Safetensors { path: "(in memory)".into(), what: format!("cannot be serialised: {e}") }
    })
}

fn to_bytes(tensor: &Tensor) -> Bytes {
    let dtype = match tensor.dtype() {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::BF16 => Dtype::BF16,
        DType::U32 => Dtype::U32,
        DType::I32 => Dtype::I32,
    };
    let data = for_any!(tensor.dtype(), T => {
        bytemuck::cast_slice::<T, u8>(&tensor.to_vec::<T>().expect("T is the tensor's dtype")).to_vec()
    });
    Bytes { dtype, shape: tensor.shape().clone(), data }
}

/// Writes a safetensors file. Not atomic: callers that replace a file write beside it and rename.
///
/// # Errors
/// If the file cannot be written.
pub fn save(path: &Path, tensors: &NamedTensors, metadata: &BTreeMap<String, String>) -> Result<()> {
    let bytes = serialize(tensors, metadata)?;
    std::fs::write(path, bytes).map_err(|source| TensorError::Io { path: path.to_owned(), source })
}
