// Reductions of a view over some axes, and sums over flat arrays.
//
// `along`: the threads of a group share one output and walk its terms; good where the terms are dense in memory.
// `across`: neighbouring threads have neighbouring outputs, each walks the terms; good where the outputs are.
// Both read the view, accumulate in fp32 (Max keeps NaN) and write out[part][output], rounded to the type of `out`: with
// several parts `out` is fp32 and `across` is launched again to combine them. The order of every sum depends on the shape
// alone.
//
// `sum_partial`, `sum_final`: sum of x or of its squares over a flat array, in fp64 throughout, rounded to fp32 at the end.

enum { SUM, MAX };

DEVICE float nothing(u32 op) { return op == SUM ? 0.0f : -INFINITY_F; }
DEVICE float combine(u32 op, float a, float b) { return op == SUM ? a + b : max_or_nan(a, b); }

DEVICE float warp_combine(u32 op, float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = combine(op, x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// One thread's share of the terms first .. last: units first + lane * W, then every lanes * W.
template <typename T, int W>
DEVICE float walk_terms(u32 op, const T* x, u64 first, u64 last, u32 lane, u32 lanes, u32 rank, const u32 (&shape)[RANK],
                        const u64 (&strides)[1][RANK]) {
    float sums[W];
#pragma unroll
    for (int k = 0; k < W; k++) sums[k] = nothing(op);
#pragma unroll 4
    for (u64 i = first + lane * W; i < last; i += lanes * W) {
        u64 at[1];
        locate<1>(i, rank, shape, strides, at);
        Unit<T, W> unit;
        unit.load(x + at[0]);
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] = combine(op, sums[k], unit.get(k));
    }
    float sum = sums[0];
#pragma unroll
    for (int k = 1; k < W; k++) sum = combine(op, sum, sums[k]);
    return sum;
}

// Grid (ceil(outputs / (256 / group)), parts), 256 threads; `group` is 32 or 256. `vector`: terms come in units, whose
// rows are a multiple of W unless the terms have rank 1; per_part is a multiple of W.
template <typename X, typename Y>
DEVICE void reduce_along(const X* x, Y* out, u32 op, u64 outputs, u64 terms, u64 per_part, u32 group, u32 vector,
                         u32 kept_rank, const u32 (&kept)[RANK], const u64 (&kept_strides)[1][RANK], u32 rank,
                         const u32 (&shape)[RANK], const u64 (&strides)[1][RANK]) {
    enum { W = Widest<X>::width };
    u32 lane = threadIdx.x % group;
    u64 output = (u64)blockIdx.x * (256 / group) + threadIdx.x / group;
    if (output >= outputs) return;  // a whole group at once, and a group of 256 is the block
    u64 first = blockIdx.y * per_part, last = first + per_part < terms ? first + per_part : terms;
    u64 base[1];
    locate<1>(output, kept_rank, kept, kept_strides, base);
    x += base[0];
    float sum = nothing(op);
    if (vector) {
        u64 middle = first + (last - first) / W * W;
        sum = walk_terms<X, W>(op, x, first, middle, lane, group, rank, shape, strides);
        first = middle;
    }
    sum = combine(op, sum, walk_terms<X, 1>(op, x, first, last, lane, group, rank, shape, strides));
    sum = warp_combine(op, sum);
    if (group == 256) {
        __shared__ float scratch[8];
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = scratch[0];
#pragma unroll
        for (int w = 1; w < 8; w++) sum = combine(op, sum, scratch[w]);
    }
    if (lane == 0) store(out + blockIdx.y * outputs + output, sum);
}

// One thread's W neighbouring outputs over the terms first + row, first + row + rows, ...
template <typename T, int W>
DEVICE void walk_columns(u32 op, const T* x, u64 first, u64 last, u32 row, u32 rows, u32 rank, const u32 (&shape)[RANK],
                         const u64 (&strides)[1][RANK], float (&sums)[W]) {
#pragma unroll
    for (int k = 0; k < W; k++) sums[k] = nothing(op);
#pragma unroll 4
    for (u64 i = first + row; i < last; i += rows) {
        u64 at[1];
        locate<1>(i, rank, shape, strides, at);
        Unit<T, W> unit;
        unit.load(x + at[0]);
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] = combine(op, sums[k], unit.get(k));
    }
}

// Grid (ceil(outputs / (32 W)), parts); blocks of (32 lanes, blockDim.x / 32 rows), at most 1024 threads. Lane l has the
// outputs of unit l.
template <typename X, typename Y, int W>
DEVICE void reduce_across(const X* x, Y* out, u32 op, u64 outputs, u64 terms, u64 per_part, u32 kept_rank,
                          const u32 (&kept)[RANK], const u64 (&kept_strides)[1][RANK], u32 rank, const u32 (&shape)[RANK],
                          const u64 (&strides)[1][RANK], float (&scratch)[32][33]) {
    u32 lane = threadIdx.x % 32, row = threadIdx.x / 32, rows = blockDim.x / 32;
    u64 output = ((u64)blockIdx.x * 32 + lane) * W;
    u64 first = blockIdx.y * per_part, last = first + per_part < terms ? first + per_part : terms;
    float sums[W];
    if (output < outputs) {
        u64 base[1];
        locate<1>(output, kept_rank, kept, kept_strides, base);
        walk_columns<X, W>(op, x + base[0], first, last, row, rows, rank, shape, strides, sums);
    }
#pragma unroll
    for (int k = 0; k < W; k++) {
        scratch[row][lane] = sums[k];
        __syncthreads();
        if (row == 0) {
            float sum = scratch[0][lane];
            for (u32 r = 1; r < rows; r++) sum = combine(op, sum, scratch[r][lane]);
            if (output + k < outputs) store(out + blockIdx.y * outputs + output + k, sum);
        }
        __syncthreads();
    }
}

#define REDUCE(name, X, Y)                                                                                               \
    KERNEL(256) reduce_along_##name(const X* x, Y* out, u32 op, u64 outputs, u64 terms, u64 per_part, u32 group,          \
                                    u32 vector, u32 kept_rank, SHAPE_ARGS(m), STRIDE_ARGS(s), u32 rank, SHAPE_ARGS(n),    \
                                    STRIDE_ARGS(t)) {                                                                    \
        const u32 kept[RANK] = SHAPE(m), shape[RANK] = SHAPE(n);                                                          \
        const u64 kept_strides[1][RANK] = {STRIDES(s)}, strides[1][RANK] = {STRIDES(t)};                                  \
        reduce_along(x, out, op, outputs, terms, per_part, group, vector, kept_rank, kept, kept_strides, rank, shape,     \
                     strides);                                                                                           \
    }                                                                                                                    \
    KERNEL(1024) reduce_across_##name(const X* x, Y* out, u32 op, u64 outputs, u64 terms, u64 per_part, u32 vector,        \
                                      u32 kept_rank, SHAPE_ARGS(m), STRIDE_ARGS(s), u32 rank, SHAPE_ARGS(n),              \
                                      STRIDE_ARGS(t)) {                                                                  \
        __shared__ float scratch[32][33];                                                                                \
        const u32 kept[RANK] = SHAPE(m), shape[RANK] = SHAPE(n);                                                          \
        const u64 kept_strides[1][RANK] = {STRIDES(s)}, strides[1][RANK] = {STRIDES(t)};                                  \
        if (vector) {                                                                                                    \
            reduce_across<X, Y, Widest<X>::width>(x, out, op, outputs, terms, per_part, kept_rank, kept, kept_strides,     \
                                                  rank, shape, strides, scratch);                                        \
        } else {                                                                                                         \
            reduce_across<X, Y, 1>(x, out, op, outputs, terms, per_part, kept_rank, kept, kept_strides, rank, shape,       \
                                   strides, scratch);                                                                    \
        }                                                                                                                \
    }
REDUCE(f32_to_f32, float, float)
REDUCE(f32_to_bf16, float, bf16)
REDUCE(bf16_to_f32, bf16, float)
REDUCE(bf16_to_bf16, bf16, bf16)

// ------------------------------------------------------------------------------------------------ flat sums

DEVICE double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

// Sum over a block of 256 threads, in thread 0.
DEVICE double block_sum_256(double x) {
    __shared__ double scratch[8];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int w = 1; w < 8; w++) x += scratch[w];
    return x;
}

template <typename T, bool SQUARES> DEVICE double sum_share(const T* x, u64 total, u64 vectorized) {
    enum { W = Widest<T>::width };
    double sum = 0.0;
    u64 threads = thread_count();
#pragma unroll 4
    for (u64 i = thread_index() * W; i < vectorized; i += threads * W) {
        Unit<T, W> unit;
        unit.load(x + i);
#pragma unroll
        for (int k = 0; k < W; k++) {
            double value = unit.get(k);
            sum = SQUARES ? fma(value, value, sum) : sum + value;
        }
    }
    for (u64 i = vectorized + thread_index(); i < total; i += threads) {
        double value = to_float(x[i]);
        sum = SQUARES ? fma(value, value, sum) : sum + value;
    }
    return sum;
}

// partials[block], 256 threads a block; the number of blocks is part of the result, so the host derives it from the length.
#define SUM_PARTIAL(name, T, SQUARES)                                                                                    \
    KERNEL(256) name(const T* x, u64 total, u64 vectorized, double* partials) {                                           \
        double sum = block_sum_256(sum_share<T, SQUARES>(x, total, vectorized));                                          \
        if (threadIdx.x == 0) partials[blockIdx.x] = sum;                                                                \
    }
SUM_PARTIAL(sum_partial_f32, float, false)
SUM_PARTIAL(sum_partial_bf16, bf16, false)
SUM_PARTIAL(sum_of_squares_partial_f32, float, true)
SUM_PARTIAL(sum_of_squares_partial_bf16, bf16, true)

// out[0] = factor * sum of the partials; one block.
KERNEL(256) sum_final(const double* partials, u32 count, double factor, float* out) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += 256) sum += partials[i];
    sum = block_sum_256(sum);
    if (threadIdx.x == 0) out[0] = (float)(factor * sum);
}
