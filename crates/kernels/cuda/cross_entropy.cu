// Cross-entropy of rows of logits, and its gradient in place.
//
// Reads logits [rows, vocabulary] (rows `stride` elements apart, fp32 or bf16), labels i32 [rows] (-100: ignored); writes
// losses fp32 [rows], -ln softmax(scale logits)[label] in nats, 0 where ignored; with gradient_scale it overwrites the logits
// with gradient_scale (softmax - onehot), 0 where ignored. What follows a row up to its stride is left alone.
// A label that is neither -100 nor a class gives a loss of NaN (nothing outside of the row is read) and a gradient of 0.
// Two passes over the row: largest and sum online in fp32, then the gradient; the second pass mostly hits the L2 cache.
//
// Launch: one block of 512 threads a row.

#define THREADS 512
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define IGNORED (-100)

// Running largest of t = scale * log2(e) * logit, and the sum of 2^(t - largest).
struct Running {
    float largest, sum;

    template <int W> DEVICE_MEMBER void add(const float (&t)[W]) {
        float top = t[0];
#pragma unroll
        for (int k = 1; k < W; k++) top = fmaxf(top, t[k]);
        if (top > largest) {
            sum *= exp2_approx(largest - top);
            largest = top;
        }
        // NaN stays in the sum; -infinity everywhere must not become NaN.
        float base = largest == -INFINITY_F ? 0.0f : largest;
#pragma unroll
        for (int k = 0; k < W; k++) sum += exp2_approx(t[k] - base);
    }
};

template <typename T, int W, bool GRADIENT>
DEVICE void row_loss(T* logits, const int* labels, float* losses, u32 vocabulary, u64 stride, float scale,
                     float gradient_scale) {
    __shared__ float scratch[32];
    const float LOG2E = 1.4426950408889634f;
    u32 row = blockIdx.x;
    logits += row * stride;
    int label = labels[row];
    bool valid = label >= 0 && (u32)label < vocabulary;
    u32 units = vocabulary / W * W;
    if (!valid) {
        if (threadIdx.x == 0) losses[row] = label == IGNORED ? 0.0f : __int_as_float(0x7fffffff);
        if (GRADIENT) {
            Unit<T, W> zero;
            zero.clear();
            for (u32 i = threadIdx.x * W; i < units; i += THREADS * W) zero.store(logits + i);
            for (u32 i = units + threadIdx.x; i < vocabulary; i += THREADS) store(logits + i, 0.0f);
        }
        return;
    }
    float factor = scale * LOG2E, correct = 0.0f;
    if (threadIdx.x == 0) correct = factor * to_float(logits[label]);

    Running running = {-INFINITY_F, 0.0f};
#pragma unroll 2
    for (u32 i = threadIdx.x * W; i < units; i += THREADS * W) {
        Unit<T, W> unit;
        unit.load(logits + i);
        float t[W];
#pragma unroll
        for (int k = 0; k < W; k++) t[k] = factor * unit.get(k);
        running.add<W>(t);
    }
    for (u32 i = units + threadIdx.x; i < vocabulary; i += THREADS) {
        float t[1] = {factor * to_float(logits[i])};
        running.add<1>(t);
    }
    float largest = block_max(running.largest, scratch);
    float weight = running.largest == -INFINITY_F ? 1.0f : exp2_approx(running.largest - largest);
    float sum = block_sum(running.sum * weight, scratch);
    if (threadIdx.x == 0) losses[row] = logf(sum) + (largest - correct) * 0.6931471805599453f;

    if (GRADIENT) {
        // The loss above has read the label's logit before the barriers of block_sum.
        float each = gradient_scale / sum;
#pragma unroll 2
        for (u32 i = threadIdx.x * W; i < units; i += THREADS * W) {
            Unit<T, W> unit;
            unit.load(logits + i);
            float values[W];
#pragma unroll
            for (int k = 0; k < W; k++) {
                values[k] = each * exp2_approx(factor * unit.get(k) - largest);
                if (i + k == label) values[k] -= gradient_scale;
            }
            unit.pack(values);
            unit.store(logits + i);
        }
        for (u32 i = units + threadIdx.x; i < vocabulary; i += THREADS) {
            float value = each * exp2_approx(factor * to_float(logits[i]) - largest);
            store(logits + i, i == label ? value - gradient_scale : value);
        }
    }
}

#define CROSS_ENTROPY(name, T, W)                                                                                        \
    KERNEL cross_entropy_loss_##name(const T* logits, const int* labels, float* losses, u32 vocabulary, u64 stride,       \
                                     float scale) {                                                                      \
        row_loss<T, W, false>((T*)logits, labels, losses, vocabulary, stride, scale, 0.0f);                               \
    }                                                                                                                    \
    KERNEL cross_entropy_gradient_##name(T* logits, const int* labels, float* losses, u32 vocabulary, u64 stride,         \
                                         float scale, float gradient_scale) {                                            \
        row_loss<T, W, true>(logits, labels, losses, vocabulary, stride, scale, gradient_scale);                          \
    }
CROSS_ENTROPY(f32, float, 4)
CROSS_ENTROPY(bf16, bf16, 8)
CROSS_ENTROPY(narrow_f32, float, 1)
CROSS_ENTROPY(narrow_bf16, bf16, 1)
