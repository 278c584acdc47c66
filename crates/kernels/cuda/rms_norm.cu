// RMSNorm over rows: y = x r weight, r = 1 / sqrt(mean(x^2) + epsilon). Optionally fused with the residual add before it.
//
// forward: reads x [rows, width] (and, fused, residual of the same type), weight [width]; writes y and inverse_rms [rows]
//   fp32; fused, it writes sum = x + residual, rounded, and normalises that rounded sum, which is what backward sees.
// backward: reads x, weight, inverse_rms, dout (and optionally dresidual, the gradient that comes past the norm); writes
//   dx = r (g - x r^2 mean(g x)) + dresidual with g = dout weight, rounded once, and partial sums of dout x r over rows,
//   fp32 [blocks, width], which reduce.cu's `across` adds up.
// Accumulation in fp32. A row is held in registers, so it is read once.
//
// Launch: `group` threads share a row, 32 or the whole block, at most 512; each holds up to 32 elements, in units of 16
// bytes. A block has blockDim.x / group rows at a time; the grid covers them (backward: see there). The narrow kernels are
// for addresses and widths that are not multiples of 16 bytes: one block a row.

#define MOST 32   // elements of a row that one thread holds
#define KERNEL extern "C" __global__ void __launch_bounds__(512)

// Keeps the compiler from moving loads of the next phase up here, where their registers would cost occupancy.
#define PHASE asm volatile("" ::: "memory")

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
    PHASE;
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

// Any width and address: the block shares a row and reads it again from the cache instead of holding it.
template <typename T, typename P, bool RESIDUAL>
DEVICE void rms_forward_narrow(const T* x, const T* residual, const P* weight, T* sum_out, T* y, float* inverse_rms,
                               u32 width, float inverse_width, float epsilon) {
    __shared__ float scratch[32];
    u64 start = (u64)blockIdx.x * width;
    float squares = 0.0f;
    for (u32 column = threadIdx.x; column < width; column += blockDim.x) {
        float value = to_float(x[start + column]);
        if (RESIDUAL) {
            store(sum_out + start + column, value + to_float(residual[start + column]));
            value = to_float(sum_out[start + column]);
        }
        squares = fmaf(value, value, squares);
    }
    float r = 1.0f / sqrtf(block_sum(squares, scratch) * inverse_width + epsilon);
    if (threadIdx.x == 0) inverse_rms[blockIdx.x] = r;
    const T* from = RESIDUAL ? sum_out : x;
    for (u32 column = threadIdx.x; column < width; column += blockDim.x)
        store(y + start + column, to_float(from[start + column]) * r * to_float(weight[column]));
}

#define FORWARD(name, T, P)                                                                                              \
    KERNEL rms_norm_forward_##name(const T* x, const P* weight, T* y, float* inverse_rms, u32 rows, u32 width,            \
                                   float inverse_width, float epsilon, u32 group) {                                      \
        rms_forward<T, P, Widest<T>::width, false>(x, 0, weight, 0, y, inverse_rms, rows, width, inverse_width, epsilon,  \
                                                   group);                                                               \
    }                                                                                                                    \
    KERNEL rms_norm_forward_residual_##name(const T* x, const T* residual, const P* weight, T* sum, T* y,                 \
                                            float* inverse_rms, u32 rows, u32 width, float inverse_width, float epsilon,  \
                                            u32 group) {                                                                 \
        rms_forward<T, P, Widest<T>::width, true>(x, residual, weight, sum, y, inverse_rms, rows, width, inverse_width,   \
                                                  epsilon, group);                                                       \
    }                                                                                                                    \
    KERNEL rms_norm_forward_narrow_##name(const T* x, const P* weight, T* y, float* inverse_rms, u32 rows, u32 width,     \
                                          float inverse_width, float epsilon, u32 group) {                               \
        rms_forward_narrow<T, P, false>(x, 0, weight, 0, y, inverse_rms, width, inverse_width, epsilon);                  \
    }                                                                                                                    \
    KERNEL rms_norm_forward_residual_narrow_##name(const T* x, const T* residual, const P* weight, T* sum, T* y,          \
                                                   float* inverse_rms, u32 rows, u32 width, float inverse_width,         \
                                                   float epsilon, u32 group) {                                           \
        rms_forward_narrow<T, P, true>(x, residual, weight, sum, y, inverse_rms, width, inverse_width, epsilon);          \
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
    extern __shared__ __align__(16) float combined[];
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
        PHASE;
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

// The same for fp32 and for any width and address: the block shares a row, reads it twice (the second time from the cache),
// and each thread keeps the sums of its own columns in shared memory (`combined`, always width floats).
template <typename T, typename P, int W>
DEVICE void rms_backward_streamed(const T* x, const P* weight, const float* inverse_rms, const T* dout,
                                  const T* dresidual, T* dx, float* partials, u32 rows, u32 width, float inverse_width) {
    __shared__ float scratch[32];
    extern __shared__ __align__(16) float combined[];
    u32 first = threadIdx.x * W, step = blockDim.x * W;
    for (u32 column = first; column < width; column += step) {
#pragma unroll
        for (int k = 0; k < W; k++) combined[column + k] = 0.0f;
    }
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        u64 start = (u64)row * width;
        float r = inverse_rms[row], dot = 0.0f;
        for (u32 column = first; column < width; column += step) {
            Unit<T, W> xs, douts;
            Unit<P, W> factors;
            Unit<float, W> sums;
            xs.load(x + start + column);
            douts.load(dout + start + column);
            factors.load(weight + column);
            sums.load(combined + column);
            float values[W];
#pragma unroll
            for (int k = 0; k < W; k++) {
                float product = xs.get(k) * douts.get(k);
                dot = fmaf(product, factors.get(k), dot);
                values[k] = fmaf(product, r, sums.get(k));
            }
            sums.pack(values);
            sums.store(combined + column);
        }
        if (!dx) continue;
        float slope = block_sum(dot, scratch) * inverse_width * r * r;
        for (u32 column = first; column < width; column += step) {
            Unit<T, W> xs, douts, past;
            Unit<P, W> factors;
            xs.load(x + start + column);
            douts.load(dout + start + column);
            factors.load(weight + column);
            past.clear();
            if (dresidual) past.load(dresidual + start + column);
            float values[W];
#pragma unroll
            for (int k = 0; k < W; k++)
                values[k] = r * (douts.get(k) * factors.get(k) - xs.get(k) * slope) + past.get(k);
            douts.pack(values);
            douts.store(dx + start + column);
        }
    }
    if (!partials) return;
    for (u32 column = first; column < width; column += step) {
        Unit<float, W> sums;
        sums.load(combined + column);
        sums.store(partials + (u64)blockIdx.x * width + column);
    }
}

#define BACKWARD_ARGS(T, P)                                                                                              \
    const T *x, const P *weight, const float *inverse_rms, const T *dout, const T *dresidual, T *dx, float *partials,      \
        u32 rows, u32 width, float inverse_width, u32 group
KERNEL rms_norm_backward_bf16_f32(BACKWARD_ARGS(bf16, float)) {
    rms_backward<bf16, float, 8>(x, weight, inverse_rms, dout, dresidual, dx, partials, rows, width, inverse_width, group);
}
KERNEL rms_norm_backward_bf16_bf16(BACKWARD_ARGS(bf16, bf16)) {
    rms_backward<bf16, bf16, 8>(x, weight, inverse_rms, dout, dresidual, dx, partials, rows, width, inverse_width, group);
}
#define STREAMED(name, T, P, W)                                                                                          \
    KERNEL rms_norm_backward_##name(BACKWARD_ARGS(T, P)) {                                                               \
        rms_backward_streamed<T, P, W>(x, weight, inverse_rms, dout, dresidual, dx, partials, rows, width,               \
                                       inverse_width);                                                                   \
    }
STREAMED(f32_f32, float, float, 4)
STREAMED(narrow_f32_f32, float, float, 1)
STREAMED(narrow_bf16_f32, bf16, float, 1)
STREAMED(narrow_bf16_bf16, bf16, bf16, 1)
