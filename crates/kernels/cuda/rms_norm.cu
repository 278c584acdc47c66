// RMSNorm over rows: y = x r weight, r = 1 / sqrt(mean(x^2) + epsilon). Optionally fused with the residual add before it.
//
// forward: reads x [rows, width] (and, fused, residual of the same type), weight [width]; writes y and inverse_rms [rows]
//   fp32; fused, it writes sum = x + residual, rounded, and normalises that rounded sum, which is what backward sees.
// backward: reads x, weight, inverse_rms, dout (and optionally dresidual, the gradient that comes past the norm); writes
//   dx = r (g - x r^2 mean(g x)) + dresidual with g = dout weight, rounded once, and partial sums of dout x r over rows,
//   fp32 [blocks, width], which reduce.cu's `across` adds up.
// Accumulation in fp32. A row is held in registers, so it is read once.
//
// Launch: `group` threads share a row, 32 or the whole block, at most 512; each holds up to 32 elements, in units of W
// (W = 1 if an address or the width forbids more). A block has blockDim.x / group rows at a time.

#define MOST 32   // elements of a row that one thread holds
#define KERNEL extern "C" __global__ void __launch_bounds__(512)

// Sum over the threads that share a row.
DEVICE float group_sum(float x, u32 group, float* scratch) { return group == 32 ? warp_sum(x) : block_sum(x, scratch); }

template <typename T, typename P, int W, bool RESIDUAL>
DEVICE void rms_forward(const T* x, const T* residual, const P* weight, T* sum_out, T* y, float* inverse_rms, u32 rows,
                        u32 width, float inverse_width, float epsilon, u32 group) {
    enum { N = MOST / W };
    __shared__ float scratch[32];
    u32 lane = threadIdx.x % group;
    u32 row = blockIdx.x * (blockDim.x / group) + threadIdx.x / group;
    if (row >= rows) return;  // whole warps, or the whole block
    u64 start = (u64)row * width;
    Unit<T, W> held[N];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
        u32 column = (n * group + lane) * W;
        if (column < width) held[n].load(x + start + column);
    }
    if (RESIDUAL) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + lane) * W;
            if (column < width) {
                Unit<T, W> other;
                other.load(residual + start + column);
                float values[W];
#pragma unroll
                for (int k = 0; k < W; k++) values[k] = held[n].get(k) + other.get(k);
                held[n].pack(values);
                held[n].store(sum_out + start + column);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        if ((n * group + lane) * W < width) {
#pragma unroll
            for (int k = 0; k < W; k++) squares = fmaf(held[n].get(k), held[n].get(k), squares);
        }
    }
    float r = 1.0f / sqrtf(group_sum(squares, group, scratch) * inverse_width + epsilon);
    if (lane == 0) inverse_rms[row] = r;
#pragma unroll
    for (int n = 0; n < N; n++) {
        u32 column = (n * group + lane) * W;
        if (column < width) {
            Unit<P, W> factors;
            factors.load(weight + column);
            float values[W];
#pragma unroll
            for (int k = 0; k < W; k++) values[k] = held[n].get(k) * r * factors.get(k);
            held[n].pack(values);
            held[n].store(y + start + column);
        }
    }
}

#define FORWARD(name, T, P)                                                                                              \
    KERNEL rms_norm_forward_##name(const T* x, const P* weight, T* y, float* inverse_rms, u32 rows, u32 width,            \
                                   float inverse_width, float epsilon, u32 group, u32 vector) {                          \
        if (vector)                                                                                                      \
            rms_forward<T, P, Widest<T>::width, false>(x, 0, weight, 0, y, inverse_rms, rows, width, inverse_width,       \
                                                       epsilon, group);                                                  \
        else                                                                                                             \
            rms_forward<T, P, 1, false>(x, 0, weight, 0, y, inverse_rms, rows, width, inverse_width, epsilon, group);     \
    }                                                                                                                    \
    KERNEL rms_norm_forward_residual_##name(const T* x, const T* residual, const P* weight, T* sum, T* y,                 \
                                            float* inverse_rms, u32 rows, u32 width, float inverse_width, float epsilon,  \
                                            u32 group, u32 vector) {                                                     \
        if (vector)                                                                                                      \
            rms_forward<T, P, Widest<T>::width, true>(x, residual, weight, sum, y, inverse_rms, rows, width,              \
                                                      inverse_width, epsilon, group);                                    \
        else                                                                                                             \
            rms_forward<T, P, 1, true>(x, residual, weight, sum, y, inverse_rms, rows, width, inverse_width, epsilon,     \
                                       group);                                                                           \
    }
FORWARD(f32_f32, float, float)
FORWARD(bf16_f32, bf16, float)
FORWARD(bf16_bf16, bf16, bf16)

// Rows blockIdx.x * R + r, then every gridDim.x * R (R = blockDim.x / group): the number of blocks is part of the result of
// dweight, so the host derives it from the shape. dx, dresidual and partials may be null. Dynamic shared memory: width
// floats if partials is not null and a block has several rows at a time.
template <typename T, typename P, int W>
DEVICE void rms_backward(const T* x, const P* weight, const float* inverse_rms, const T* dout, const T* dresidual, T* dx,
                         float* partials, u32 rows, u32 width, float inverse_width, u32 group) {
    enum { N = MOST / W };
    __shared__ float scratch[32];
    extern __shared__ float combined[];
    u32 lane = threadIdx.x % group, member = threadIdx.x / group, members = blockDim.x / group;
    float dweight[MOST];
#pragma unroll
    for (int i = 0; i < MOST; i++) dweight[i] = 0.0f;

    for (u32 row = blockIdx.x * members + member; row < rows; row += gridDim.x * members) {
        u64 start = (u64)row * width;
        Unit<T, W> xs[N], douts[N];
        float r = inverse_rms[row], dot = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + lane) * W;
            if (column < width) {
                xs[n].load(x + start + column);
                douts[n].load(dout + start + column);
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + lane) * W;
            if (column < width) {
                Unit<P, W> factors;
                factors.load(weight + column);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    float product = xs[n].get(k) * douts[n].get(k);
                    dot = fmaf(product, factors.get(k), dot);
                    dweight[n * W + k] = fmaf(product, r, dweight[n * W + k]);
                }
            }
        }
        if (!dx) continue;
        float slope = group_sum(dot, group, scratch) * inverse_width * r * r;
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + lane) * W;
            if (column < width) {
                Unit<P, W> factors;
                factors.load(weight + column);
                float values[W];
#pragma unroll
                for (int k = 0; k < W; k++)
                    values[k] = r * (douts[n].get(k) * factors.get(k) - xs[n].get(k) * slope);
                if (dresidual) {
                    Unit<T, W> past;
                    past.load(dresidual + start + column);
#pragma unroll
                    for (int k = 0; k < W; k++) values[k] += past.get(k);
                }
                douts[n].pack(values);
                douts[n].store(dx + start + column);
            }
        }
    }

    if (!partials) return;
    partials += (u64)blockIdx.x * width;
    if (members == 1) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + lane) * W;
            if (column < width) {
#pragma unroll
                for (int k = 0; k < W; k++) partials[column + k] = dweight[n * W + k];
            }
        }
        return;
    }
    // The warps add their sums one after the other.
    for (u32 turn = 0; turn < members; turn++) {
        if (turn == member) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                u32 column = (n * group + lane) * W;
                if (column < width) {
#pragma unroll
                    for (int k = 0; k < W; k++)
                        combined[column + k] = turn == 0 ? dweight[n * W + k] : combined[column + k] + dweight[n * W + k];
                }
            }
        }
        __syncthreads();
    }
    for (u32 column = threadIdx.x; column < width; column += blockDim.x) partials[column] = combined[column];
}

#define BACKWARD(name, T, P)                                                                                             \
    KERNEL rms_norm_backward_##name(const T* x, const P* weight, const float* inverse_rms, const T* dout,                 \
                                    const T* dresidual, T* dx, float* partials, u32 rows, u32 width,                     \
                                    float inverse_width, u32 group) {                                                    \
        rms_backward<T, P, Widest<T>::width>(x, weight, inverse_rms, dout, dresidual, dx, partials, rows, width,          \
                                             inverse_width, group);                                                      \
    }                                                                                                                    \
    KERNEL rms_norm_backward_##name##_narrow(const T* x, const P* weight, const float* inverse_rms, const T* dout,        \
                                             const T* dresidual, T* dx, float* partials, u32 rows, u32 width,            \
                                             float inverse_width, u32 group) {                                           \
        rms_backward<T, P, 1>(x, weight, inverse_rms, dout, dresidual, dx, partials, rows, width, inverse_width, group); \
    }
BACKWARD(f32_f32, float, float)
BACKWARD(bf16_f32, bf16, float)
BACKWARD(bf16_bf16, bf16, bf16)
