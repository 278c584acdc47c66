//! Tensors on a GPU: transfers, views, conversions, errors.

use half::bf16;
use stickbreak_tensor::{DType, Device, Tensor};

const CUDA: Device = Device::Cuda(0);

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn there_and_back_is_the_same_for_every_type_and_view() {
    for dtype in [DType::F32, DType::BF16, DType::U32, DType::I32] {
        let host = Tensor::randn(3.0, 2.0, [5, 7, 3], DType::F64, 1).unwrap().to_dtype(dtype).unwrap();
        let device = host.to_device(CUDA).unwrap();
        assert_eq!(device.device(), CUDA);
        let check = |view: &dyn Fn(&Tensor) -> Tensor| {
            assert_eq!(view(&device).to_f64_vec().unwrap(), view(&host).to_f64_vec().unwrap(), "{dtype}");
        };
        check(&|t| t.clone());
        check(&|t| t.transpose(0, 2).unwrap());
        check(&|t| t.narrow(1, 2, 4).unwrap());
        check(&|t| t.narrow(0, 1, 1).unwrap().broadcast_to([4, 7, 3]).unwrap());
        check(&|t| t.permute(&[1, 0, 2]).unwrap().reshape([105]).unwrap());
        check(&|t| t.narrow(2, 1, 0).unwrap());
    }
    // Larger than all of the staging memory, which is used twice over.
    let large = Tensor::randn(0.0, 1.0, [9_000_001], DType::F32, 2).unwrap();
    assert_eq!(large.to_device(CUDA).unwrap().to_vec::<f32>().unwrap(), large.to_vec::<f32>().unwrap());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn memory_that_processes_share_is_used_like_any_other_and_given_back() {
    let gpu = std::sync::Arc::clone(stickbreak_tensor::cuda::queue(0).unwrap().gpu());
    let before = gpu.memory().unwrap();
    let host = Tensor::randn(0.0, 1.0, [5_000_003], DType::F32, 4).unwrap();
    let shared = Tensor::zeros_shareable_on([5_000_003], DType::F32, CUDA).unwrap();
    assert!(shared.is_shareable() && !host.to_device(CUDA).unwrap().is_shareable());
    assert!(gpu.memory().unwrap().reserved >= before.reserved + 4 * 5_000_003);
    shared.copy_assign(&host.to_device(CUDA).unwrap()).unwrap();
    assert_eq!(shared.to_vec::<f32>().unwrap(), host.to_vec::<f32>().unwrap());
    // Used by work that is still to come when the last reference goes.
    let sum = shared.narrow(0, 1, 5_000_002).unwrap().sum_all().unwrap();
    let held = gpu.memory().unwrap();
    drop(shared);
    assert!(sum.to_scalar().unwrap().is_finite());
    assert!(gpu.memory().unwrap().used + 4 * 5_000_003 <= held.used);
    let message = Tensor::zeros_shareable_on([1 << 40], DType::F32, CUDA).unwrap_err().to_string();
    assert!(message.contains("GiB are free"), "{message}");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn conversions_round_as_on_the_cpu() {
    let host = Tensor::randn(0.0, 1e3, [10_001], DType::F32, 3).unwrap();
    let device = host.to_device(CUDA).unwrap();
    let bits = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_vec::<bf16>().unwrap();
    assert_eq!(bits(&device), bits(&host));
    let back = device.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    assert_eq!(back.to_f64_vec().unwrap(), host.to_dtype(DType::BF16).unwrap().to_f64_vec().unwrap());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn mixed_devices_and_types_are_refused_with_both_names() {
    let host = Tensor::ones([2, 2], DType::F32);
    let device = host.to_device(CUDA).unwrap();
    let message = device.add(&host).unwrap_err().to_string();
    assert!(message.contains("cuda:0") && message.contains("cpu"), "{message}");
    let message = device.matmul(&host).unwrap_err().to_string();
    assert!(message.contains("cuda:0") && message.contains("cpu"), "{message}");
    let message = device.read::<f32>().err().unwrap().to_string();
    assert!(message.contains("cuda:0"), "{message}");
    let message = Tensor::zeros_on([2], DType::F64, CUDA).unwrap_err().to_string();
    assert!(message.contains("f64"), "{message}");
    // More memory than any card has: an error that says how much there is, and everything goes on.
    let message = Tensor::zeros_on([1 << 40], DType::F32, CUDA).unwrap_err().to_string();
    assert!(message.contains("GiB are free"), "{message}");
    assert_eq!(device.sum_all().unwrap().to_scalar().unwrap(), 4.0);
}

#[test]
fn without_a_gpu_the_error_names_the_library() {
    if let Err(error) = CUDA.check_available() {
        let message = error.to_string();
        assert!(message.contains("cuda:0"), "{message}");
    }
}
