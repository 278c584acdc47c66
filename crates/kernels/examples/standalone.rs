//! Stick-breaking attention, forward and backward, on memory and a stream of the caller's own: raw cudarc slices, no other
//! crate of the workspace. Compares a few numbers with the CPU implementation.
//!
//! `cargo run --release -p stickbreak-kernels --example standalone`

use cudarc::driver::CudaContext;
use half::bf16;
use stickbreak_kernels::attention::stick_breaking::{StickBreakingOutputs, StickBreakingSpec, cpu, cuda::Plan};
use stickbreak_kernels::attention::{AttentionGradients, AttentionInputs, AttentionLayout};
use stickbreak_kernels::cuda::{DeviceMut, DeviceRef, DeviceType, Gpu, Queue};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Two documents of 300 and 212 tokens, 4 query heads of 64 that share 2 key/value heads.
    let layout = AttentionLayout::contiguous(512, 4, 2, 64);
    let (spec, cu_seqlens) = (StickBreakingSpec::new(layout), [0, 300, 512]);
    let wave =
        |len: usize, pitch: f32| -> Vec<bf16> { (0..len).map(|i| bf16::from_f32((i as f32 * pitch).sin())).collect() };
    let (wide, narrow) = (512 * 4 * 64, 512 * 2 * 64);
    let [q, k, v, d_o] =
        [(wide, 0.37), (narrow, 0.53), (narrow, 0.71), (wide, 0.97)].map(|(len, pitch)| wave(len, pitch));

    // The caller's context, stream and memory.
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let queue = Queue::new(Gpu::with_context(context)?, stream.clone());
    let [q_gpu, k_gpu, v_gpu, d_o_gpu] = [&q, &k, &v, &d_o].map(|host| stream.clone_htod(host));
    let (q_gpu, k_gpu, v_gpu, d_o_gpu) = (q_gpu?, k_gpu?, v_gpu?, d_o_gpu?);
    let (mut o, mut dq) = (stream.alloc_zeros::<bf16>(wide)?, stream.alloc_zeros::<bf16>(wide)?);
    let (mut dk, mut dv) = (stream.alloc_zeros::<bf16>(narrow)?, stream.alloc_zeros::<bf16>(narrow)?);

    let plan = Plan::new(&queue, &spec, &cu_seqlens, DeviceType::Bf16)?;
    let read = |slice| DeviceRef::new(slice, &stream);
    let (q_view, k_view, v_view) = (read(&q_gpu), read(&k_gpu), read(&v_gpu));
    let saved = plan.forward(&queue, q_view, k_view, v_view, &mut DeviceMut::new(&mut o, &stream), None, None, true)?;
    let saved = saved.ok_or("save was asked for")?;
    let [mut dq_view, mut dk_view, mut dv_view] =
        [&mut dq, &mut dk, &mut dv].map(|slice| DeviceMut::new(slice, &stream));
    let (dq_out, dk_out, dv_out) = (&mut dq_view, &mut dk_view, &mut dv_view);
    plan.backward(&queue, q_view, k_view, v_view, read(&d_o_gpu), None, &saved, dq_out, dk_out, dv_out)?;

    // The same in float64 on the CPU.
    let [q, k, v, d_o] = [&q, &k, &v, &d_o].map(|x| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens: &cu_seqlens };
    let (mut o_cpu, mut dq_cpu) = (vec![0.0; wide], vec![0.0; wide]);
    let (mut dk_cpu, mut dv_cpu) = (vec![0.0; narrow], vec![0.0; narrow]);
    let outputs = StickBreakingOutputs { o: &mut o_cpu, rem: None, log2_rem: None };
    let saved = cpu::forward(&spec, &inputs, outputs)?;
    let gradients = AttentionGradients { dq: &mut dq_cpu, dk: &mut dk_cpu, dv: &mut dv_cpu };
    cpu::backward(&spec, &inputs, &d_o, None, &saved, gradients)?;
    for (name, gpu, cpu) in [("o", &o, &o_cpu), ("dq", &dq, &dq_cpu), ("dk", &dk, &dk_cpu), ("dv", &dv, &dv_cpu)] {
        let gpu = stream.clone_dtoh(gpu)?;
        let square = |sum: f64, x: f64| sum + x * x;
        let error = gpu.iter().zip(cpu).map(|(&x, y)| f64::from(x) - y).fold(0.0, square).sqrt();
        let error = error / cpu.iter().copied().fold(0.0, square).sqrt();
        println!("{name}: relative error {error:.1e}");
        assert!(error < 5e-3, "{name}");
    }
    Ok(())
}
