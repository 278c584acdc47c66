use half::bf16;
use stickbreak_kernels::adamw::cuda::Guard;
use stickbreak_kernels::adamw::{self, AdamW};
use stickbreak_kernels::cross_entropy::cuda::{RowsSpec, row_gradients, row_losses};
use stickbreak_kernels::cuda::{DeviceType, DeviceView, Queue, Scratch};
use stickbreak_kernels::elementwise::{self, BinaryOp, UnaryOp};
use stickbreak_kernels::embedding::{self, EmbeddingSpec};
use stickbreak_kernels::group_norm::{self, GroupNormSpec};
use stickbreak_kernels::reduce::{self, Reduction};
use stickbreak_kernels::rms_norm::{self, RmsNormSpec};
use stickbreak_kernels::rope::{self, RopeSpec};
use stickbreak_kernels::swiglu;

use crate::support::*;

/// Zeroed memory of `len` elements.
fn memory<T: Number>(queue: &Queue, len: usize) -> Scratch {
    let mut memory = queue.scratch(T::TYPE, len).unwrap();
    queue.zero(&mut memory.as_mut()).unwrap();
    memory
}

/// Runs something a few times and prints its time, and the speed at which it moves `bytes`.
fn measure(queue: &Queue, name: &str, bytes: usize, mut body: impl FnMut()) {
    for _ in 0..3 {
        body();
    }
    let rounds = 20;
    let timer = queue.timer().unwrap();
    let host = std::time::Instant::now();
    for _ in 0..rounds {
        body();
    }
    let host = host.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);
    let ms = timer.milliseconds().unwrap() / f64::from(rounds);
    println!("{name:46} {ms:9.4} ms {:8.0} GB/s {host:7.1} us on the host", bytes as f64 / ms * 1e-6);
}

#[test]
#[ignore = "needs an NVIDIA GPU; prints times"]
fn speed() {
    let queue = &queue();
    println!("{}", queue.gpu().name());
    let (rows, width) = (32768, 1024);
    let size = rows * width;
    let activations = |queue| memory::<bf16>(queue, size);
    let (x, r, mut y, mut z) = (activations(queue), activations(queue), activations(queue), activations(queue));
    let single = memory::<f32>(queue, size);
    let mut single_out = memory::<f32>(queue, size);
    let (flat, by_rows, by_columns): (&[usize], &[usize], &[usize]) = (&[1], &[width, 1], &[1, width]);

    measure(queue, "device copy", 4 * size, || queue.copy(x.as_ref(), &mut y.as_mut()).unwrap());
    let view = DeviceView::new(x.as_ref(), flat);
    measure(queue, "copy bf16", 4 * size, || elementwise::cuda::copy(queue, &[size], view, &mut y.as_mut()).unwrap());
    let heads = DeviceView::new(x.as_ref(), &[64, 16 * 64, 1]);
    measure(queue, "copy bf16 [16, 32768, 64] of [32768, 16, 64]", 4 * size, || {
        elementwise::cuda::copy(queue, &[16, rows, 64], heads, &mut y.as_mut()).unwrap();
    });
    let turned = DeviceView::new(x.as_ref(), by_columns);
    measure(queue, "copy bf16 transposed", 4 * size, || {
        elementwise::cuda::copy(queue, &[width, rows], turned, &mut y.as_mut()).unwrap();
    });
    measure(queue, "cast bf16 to f32", 6 * size, || {
        elementwise::cuda::cast(queue, &[size], view, &mut single_out.as_mut()).unwrap();
    });
    let single_view = DeviceView::new(single.as_ref(), flat);
    measure(queue, "cast f32 to bf16", 6 * size, || {
        elementwise::cuda::cast(queue, &[size], single_view, &mut y.as_mut()).unwrap();
    });
    measure(queue, "silu bf16", 4 * size, || {
        elementwise::cuda::unary(queue, UnaryOp::Silu, &[size], view, &mut y.as_mut()).unwrap();
    });
    measure(queue, "tanh f32", 8 * size, || {
        elementwise::cuda::unary(queue, UnaryOp::Tanh, &[size], single_view, &mut single_out.as_mut()).unwrap();
    });
    let other = DeviceView::new(r.as_ref(), flat);
    measure(queue, "add bf16", 6 * size, || {
        elementwise::cuda::binary(queue, BinaryOp::Add, &[size], view, other, &mut y.as_mut()).unwrap();
    });
    let (matrix, row) = (DeviceView::new(x.as_ref(), by_rows), DeviceView::new(r.as_ref(), &[0, 1]));
    measure(queue, "multiply bf16 by a row", 4 * size, || {
        elementwise::cuda::binary(queue, BinaryOp::Multiply, &[rows, width], matrix, row, &mut y.as_mut()).unwrap();
    });
    let column = DeviceView::new(r.as_ref(), &[1, 0]);
    measure(queue, "multiply bf16 by a column", 4 * size, || {
        elementwise::cuda::binary(queue, BinaryOp::Multiply, &[rows, width], matrix, column, &mut y.as_mut()).unwrap();
    });
    measure(queue, "accumulate bf16 into bf16", 6 * size, || {
        elementwise::cuda::accumulate(queue, &[size], 1.0, view, &mut y.as_mut(), flat).unwrap();
    });
    measure(queue, "accumulate bf16 into f32", 10 * size, || {
        elementwise::cuda::accumulate(queue, &[size], 1.0, view, &mut single_out.as_mut(), flat).unwrap();
    });
    measure(queue, "scale f32", 8 * size, || {
        elementwise::cuda::scale_in_place(queue, 1.0, &mut single_out.as_mut()).unwrap();
    });
    measure(queue, "fill f32", 4 * size, || elementwise::cuda::fill(queue, 0.0, &mut single_out.as_mut()).unwrap());

    let mut scalar = memory::<f32>(queue, 1);
    let mut columns = memory::<f32>(queue, width);
    let mut per_row = memory::<f32>(queue, rows);
    for (name, axes, out) in
        [("all", &[0, 1][..], &mut scalar), ("columns", &[0][..], &mut columns), ("rows", &[1][..], &mut per_row)]
    {
        measure(queue, &format!("sum bf16 over {name}"), 2 * size, || {
            reduce::cuda::reduce(queue, Reduction::Sum, &[rows, width], matrix, axes, &mut out.as_mut()).unwrap();
        });
    }

    let weight = memory::<f32>(queue, width);
    let mut inverse_rms = memory::<f32>(queue, rows);
    for width in [1024, 2048] {
        let rows = size / width;
        let spec = RmsNormSpec { rows, width, epsilon: 1e-5 };
        let weight = memory::<f32>(queue, width);
        let mut inverse_rms = memory::<f32>(queue, rows);
        let mut dweight = memory::<f32>(queue, width);
        let w = weight.as_ref();
        measure(queue, &format!("rms_norm forward {width}"), 4 * size, || {
            let (y, s) = (&mut y.as_mut(), &mut inverse_rms.as_mut());
            rms_norm::cuda::forward(queue, &spec, x.as_ref(), w, y, s).unwrap();
        });
        measure(queue, &format!("rms_norm forward + residual {width}"), 8 * size, || {
            let (y, z, s) = (&mut y.as_mut(), &mut z.as_mut(), &mut inverse_rms.as_mut());
            rms_norm::cuda::forward_residual(queue, &spec, x.as_ref(), r.as_ref(), w, z, y, s).unwrap();
        });
        measure(queue, &format!("rms_norm backward + residual {width}"), 8 * size, || {
            let (s, past) = (inverse_rms.as_ref(), Some(r.as_ref()));
            let (dx, dw) = (&mut y.as_mut(), &mut dweight.as_mut());
            rms_norm::cuda::backward(queue, &spec, x.as_ref(), w, s, z.as_ref(), past, Some(dx), Some(dw)).unwrap();
        });
    }
    {
        let spec = GroupNormSpec { tokens: rows, heads: 16, head_dim: 64, epsilon: 1e-5 };
        let (mut mean, mut std) = (memory::<f32>(queue, rows * 16), memory::<f32>(queue, rows * 16));
        let (mut dweight, mut dbias) = (memory::<f32>(queue, width), memory::<f32>(queue, width));
        let w = weight.as_ref();
        measure(queue, "group_norm forward 16 x 64", 4 * size + 8 * 16 * rows, || {
            let (y, m, s) = (&mut y.as_mut(), &mut mean.as_mut(), &mut std.as_mut());
            group_norm::cuda::forward(queue, &spec, x.as_ref(), w, w, y, m, s).unwrap();
        });
        measure(queue, "group_norm backward 16 x 64", 6 * size + 8 * 16 * rows, || {
            let (m, s) = (mean.as_ref(), std.as_ref());
            let (dx, dw, db) = (&mut y.as_mut(), &mut dweight.as_mut(), &mut dbias.as_mut());
            let (dx, dw, db) = (Some(dx), Some(dw), Some(db));
            group_norm::cuda::backward(queue, &spec, x.as_ref(), w, m, s, r.as_ref(), dx, dw, db).unwrap();
        });
        let positions = queue.upload(&(0..rows as u32).collect::<Vec<_>>()).unwrap();
        let spec = RopeSpec { tokens: rows, heads: 16, head_dim: 64, theta: 1e4 };
        measure(queue, "rope 16 x 64", 4 * size, || {
            let (p, x, y) = (positions.as_ref(), x.as_ref(), &mut y.as_mut());
            rope::cuda::rotate(queue, &spec, p, false, x, width, y, width).unwrap();
        });
        measure(queue, "rope in place 16 x 64", 4 * size, || {
            rope::cuda::rotate_in_place(queue, &spec, positions.as_ref(), false, &mut y.as_mut(), width).unwrap();
        });
    }
    {
        let ffn = 2816;
        let part = || memory::<bf16>(queue, rows * ffn);
        let (gate, up, dout, mut out, mut dgate) = (part(), part(), part(), part(), part());
        let bytes = 2 * rows * ffn;
        measure(queue, "swiglu forward 2816", 3 * bytes, || {
            swiglu::cuda::forward(queue, gate.as_ref(), up.as_ref(), &mut out.as_mut()).unwrap();
        });
        measure(queue, "swiglu backward 2816", 5 * bytes, || {
            let (dg, du) = (&mut dgate.as_mut(), &mut out.as_mut());
            swiglu::cuda::backward(queue, gate.as_ref(), up.as_ref(), dout.as_ref(), Some(dg), Some(du)).unwrap();
        });
        let (packed, mut dpacked) = (memory::<bf16>(queue, 2 * rows * ffn), memory::<bf16>(queue, 2 * rows * ffn));
        measure(queue, "swiglu forward packed 2816", 3 * bytes, || {
            swiglu::cuda::forward_packed(queue, rows, ffn, packed.as_ref(), &mut out.as_mut()).unwrap();
        });
        measure(queue, "swiglu backward packed 2816", 5 * bytes, || {
            let d = &mut dpacked.as_mut();
            swiglu::cuda::backward_packed(queue, rows, ffn, packed.as_ref(), dout.as_ref(), d).unwrap();
        });
    }
    {
        let vocabulary = 50304;
        let spec = EmbeddingSpec { tokens: rows, vocabulary, width };
        let table = memory::<bf16>(queue, vocabulary * width);
        let mut dtable = memory::<f32>(queue, vocabulary * width);
        // As text: the n-th most frequent word has a share of about 1/n.
        let zipf: Vec<u32> = random_ids(7, rows, 1 << 16)
            .iter()
            .map(|&x| f64::from(vocabulary as u32).powf(f64::from(x) / 65536.0) as u32 - 1)
            .collect();
        for (name, ids) in
            [("text", zipf), ("uniform", random_ids(1, rows, vocabulary as u32)), ("one id", vec![5; rows])]
        {
            let ids = queue.upload(&ids).unwrap();
            measure(queue, &format!("embedding forward, {name}"), 4 * size, || {
                embedding::cuda::forward(queue, &spec, ids.as_ref(), table.as_ref(), &mut y.as_mut()).unwrap();
            });
            measure(queue, &format!("embedding backward, {name} (bytes of dout)"), 2 * size, || {
                embedding::cuda::backward(queue, &spec, ids.as_ref(), x.as_ref(), &mut dtable.as_mut()).unwrap();
            });
        }
        let chunk = 4096;
        let mut logits = memory::<bf16>(queue, chunk * vocabulary);
        let labels = queue.upload(&vec![7i32; chunk]).unwrap();
        let mut losses = queue.scratch(DeviceType::F32, chunk).unwrap();
        let spec = RowsSpec { rows: chunk, vocabulary, stride: vocabulary, logit_scale: 1.0 };
        let bytes = 2 * chunk * vocabulary;
        measure(queue, "cross-entropy losses 4096 x 50304", bytes, || {
            row_losses(queue, &spec, logits.as_ref(), labels.as_ref(), &mut losses.as_mut()).unwrap();
        });
        measure(queue, "cross-entropy gradients 4096 x 50304", 2 * bytes, || {
            let (d, l) = (&mut logits.as_mut(), &mut losses.as_mut());
            row_gradients(queue, &spec, 1.0, d, labels.as_ref(), l).unwrap();
        });
        measure(queue, "sum of 32768 losses", 4 * rows, || {
            reduce::cuda::sum(queue, 1.0, inverse_rms.as_ref(), &mut scalar.as_mut()).unwrap();
        });
        measure(queue, "device add of 1 row (launch overhead)", 6 * width, || {
            let (a, b) = (view_of(&x, width), view_of(&r, width));
            elementwise::cuda::binary(queue, BinaryOp::Add, &[width], a, b, &mut y.as_mut().slice_mut(0..width))
                .unwrap();
        });
        queue.zero(&mut inverse_rms.as_mut()).unwrap();
    }
    {
        let parameters = 360_000_000;
        let part = || memory::<f32>(queue, parameters);
        let (mut p, grads, mut m, mut v) = (part(), part(), part(), part());
        let mut copy = memory::<bf16>(queue, parameters);
        let mut squares = memory::<f32>(queue, 1);
        measure(queue, "sum_of_squares f32 360e6", 4 * parameters, || {
            reduce::cuda::sum_of_squares(queue, grads.as_ref(), &mut squares.as_mut()).unwrap();
        });
        let spec = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step: 10,
            grad_scale: 1.0,
        };
        let guard = Guard { sum_of_squares: Some(squares.as_ref()), clip: 1.0, finite: None };
        measure(queue, "adamw f32 gradients 360e6", 30 * parameters, || {
            let (p, m, v) = (&mut p.as_mut(), &mut m.as_mut(), &mut v.as_mut());
            adamw::cuda::step(queue, &spec, &guard, p, grads.as_ref(), m, v, Some(&mut copy.as_mut())).unwrap();
        });
    }
}

fn view_of(x: &Scratch, len: usize) -> DeviceView<'_> {
    DeviceView::new(x.as_ref().slice(0..len), &[1])
}
