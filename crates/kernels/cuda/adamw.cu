// AdamW with decoupled weight decay, over a flat range.
//
//   g = factor grad,  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//   p = p keep - rate m / (correction sqrt(v) + epsilon)
//
// with keep = 1 - learning_rate weight_decay, rate = learning_rate / (1 - beta1^t), correction = 1 / sqrt(1 - beta2^t).
// factor = grad_scale min(1, clip / (norm + 1e-6)), norm = |grad_scale| sqrt(sum_of_squares[0]); clip 0 does not clip.
// Nothing at all is written if sum_of_squares[0] or guard[0] is not finite; each may be null.
//
// Reads and writes p, m, v (fp32), reads grad (fp32 or bf16), writes copy (p rounded to bf16; may be null).
// Launch: any one-dimensional grid of 256 threads; results do not depend on it.

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY_F; }

struct Constants {
    float factor, keep, beta1, gain1, beta2, gain2, rate, correction, epsilon;
};

template <typename G, int W>
DEVICE void update(u64 i, float* p, const G* grad, float* m, float* v, bf16* copy, const Constants& c) {
    Unit<float, W> ps, ms, vs;
    Unit<G, W> gs;
    ps.load(p + i);
    gs.load(grad + i);
    ms.load(m + i);
    vs.load(v + i);
    float new_p[W], new_m[W], new_v[W];
#pragma unroll
    for (int k = 0; k < W; k++) {
        float g = gs.get(k) * c.factor;
        new_m[k] = fmaf(c.beta1, ms.get(k), c.gain1 * g);
        new_v[k] = fmaf(c.beta2, vs.get(k), c.gain2 * g * g);
        new_p[k] = ps.get(k) * c.keep - c.rate * new_m[k] / fmaf(sqrtf(new_v[k]), c.correction, c.epsilon);
    }
    ps.pack(new_p);
    ms.pack(new_m);
    vs.pack(new_v);
    ps.store(p + i);
    ms.store(m + i);
    vs.store(v + i);
    if (copy) {
        Unit<bf16, W> rounded;
        rounded.pack(new_p);
        rounded.store(copy + i);
    }
}

template <typename G>
DEVICE void step(float* p, const G* grad, float* m, float* v, bf16* copy, u64 total, u64 vectorized,
                 const float* sum_of_squares, const float* guard, float clip, Constants c) {
    if (guard && !is_finite(guard[0])) return;
    if (sum_of_squares) {
        float squares = sum_of_squares[0];
        if (!is_finite(squares)) return;
        if (clip > 0.0f) c.factor *= fminf(1.0f, clip / (fabsf(c.factor) * sqrtf(squares) + 1e-6f));
    }
    u64 threads = thread_count();
    for (u64 i = thread_index() * 4; i < vectorized; i += threads * 4) update<G, 4>(i, p, grad, m, v, copy, c);
    for (u64 i = vectorized + thread_index(); i < total; i += threads) update<G, 1>(i, p, grad, m, v, copy, c);
}

#define ADAMW(name, G)                                                                                                   \
    KERNEL adamw_step_##name(float* p, const G* grad, float* m, float* v, bf16* copy, u64 total, u64 vectorized,          \
                             const float* sum_of_squares, const float* guard, float clip, float grad_scale, float keep,   \
                             float beta1, float gain1, float beta2, float gain2, float rate, float correction,            \
                             float epsilon) {                                                                            \
        step(p, grad, m, v, copy, total, vectorized, sum_of_squares, guard, clip,                                        \
             Constants{grad_scale, keep, beta1, gain1, beta2, gain2, rate, correction, epsilon});                        \
    }
ADAMW(f32, float)
ADAMW(bf16, bf16)
