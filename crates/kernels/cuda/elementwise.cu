// Elementwise ops on views: unary, binary, copy, cast, accumulate, scale, fill.
//
// Views as in views.cuh; outputs are contiguous unless they have strides of their own (accumulate). Elements are taken in
// units of W: `vectorized` is the number of leading elements that go in units, a multiple of W (0 if an address or a size
// forbids it); with rank above 1 no unit may cross a row, so n0 is a multiple of W there.
//
// Reads the operands, writes the output, keeps nothing. Arithmetic in fp32; one rounding at the store.
// Launch: any one-dimensional grid of 256 threads (grid-stride loop); results do not depend on it.

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

// Calls body.run<W>(i) for units and body.run<1>(i) for what remains.
template <int W, typename Body> DEVICE void for_each_unit(u64 total, u64 vectorized, Body body) {
    u64 threads = thread_count();
#pragma unroll 2
    for (u64 i = thread_index() * W; i < vectorized; i += threads * W) body.template run<W>(i);
    for (u64 i = vectorized + thread_index(); i < total; i += threads) body.template run<1>(i);
}

// ------------------------------------------------------------------------------------------------ unary

enum { NEGATE, EXP, LOG, SQRT, RECIPROCAL, SQUARE, SIGMOID, TANH, SILU, AFFINE };

template <int W> DEVICE void apply_unary(u32 op, float scale, float shift, float (&x)[W]) {
#define EACH(result)                                                                                                     \
    _Pragma("unroll") for (int k = 0; k < W; k++) x[k] = (result);                                                        \
    break
    switch (op) {
        case NEGATE: EACH(-x[k]);
        case EXP: EACH(expf(x[k]));
        case LOG: EACH(logf(x[k]));
        case SQRT: EACH(sqrtf(x[k]));
        case RECIPROCAL: EACH(1.0f / x[k]);
        case SQUARE: EACH(x[k] * x[k]);
        case SIGMOID: EACH(sigmoid(x[k]));
        case TANH: EACH(tanhf(x[k]));
        case SILU: EACH(x[k] * sigmoid(x[k]));
        case AFFINE: EACH(fmaf(x[k], scale, shift));
    }
#undef EACH
}

template <typename T> struct UnaryBody {
    const T* __restrict__ x;
    T* __restrict__ out;
    u32 op, rank;
    float scale, shift;
    u32 shape[RANK];
    u64 strides[1][RANK];

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at[1];
        locate<1>(i, rank, shape, strides, at);
        Unit<T, W> unit;
        unit.load(x + at[0], strides[0][0]);
        float values[W];
        unit.unpack(values);
        apply_unary<W>(op, scale, shift, values);
        unit.pack(values);
        unit.store(out + i);
    }
};

#define UNARY(name, T)                                                                                                   \
    KERNEL name(const T* x, T* out, u64 total, u64 vectorized, u32 op, float scale, float shift, u32 rank, SHAPE_ARGS(n),     \
                STRIDE_ARGS(s)) {                                                                                        \
        for_each_unit<Widest<T>::width>(total, vectorized,                                                               \
                                        UnaryBody<T>{x, out, op, rank, scale, shift, SHAPE(n), {STRIDES(s)}});               \
    }
UNARY(unary_f32, float)
UNARY(unary_bf16, bf16)

// ------------------------------------------------------------------------------------------------ binary

enum { ADD, SUBTRACT, MULTIPLY, DIVIDE };

template <typename T> struct BinaryBody {
    const T* __restrict__ a;
    const T* __restrict__ b;
    T* __restrict__ out;
    u32 op, rank;
    u32 shape[RANK];
    u64 strides[2][RANK];

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at[2];
        locate<2>(i, rank, shape, strides, at);
        Unit<T, W> unit, right;
        unit.load(a + at[0], strides[0][0]);
        right.load(b + at[1], strides[1][0]);
        float x[W], y[W];
        unit.unpack(x);
        right.unpack(y);
#define EACH(result)                                                                                                     \
    _Pragma("unroll") for (int k = 0; k < W; k++) x[k] = (result);                                                        \
    break
        switch (op) {
            case ADD: EACH(x[k] + y[k]);
            case SUBTRACT: EACH(x[k] - y[k]);
            case MULTIPLY: EACH(x[k] * y[k]);
            case DIVIDE: EACH(x[k] / y[k]);
        }
#undef EACH
        unit.pack(x);
        unit.store(out + i);
    }
};

#define BINARY(name, T)                                                                                                  \
    KERNEL name(const T* a, const T* b, T* out, u64 total, u64 vectorized, u32 op, u32 rank, SHAPE_ARGS(n), STRIDE_ARGS(s),   \
                STRIDE_ARGS(t)) {                                                                                        \
        for_each_unit<Widest<T>::width>(total, vectorized,                                                               \
                                        BinaryBody<T>{a, b, out, op, rank, SHAPE(n), {STRIDES(s), STRIDES(t)}});             \
    }
BINARY(binary_f32, float)
BINARY(binary_bf16, bf16)

// ------------------------------------------------------------------------------------------------ copy and cast

// Bits are moved as they are if the types agree; NaN payloads survive.
template <typename X, typename Y> struct CopyBody {
    const X* __restrict__ x;
    Y* __restrict__ out;
    u32 rank;
    u32 shape[RANK];
    u64 strides[1][RANK];

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at[1];
        locate<1>(i, rank, shape, strides, at);
        Unit<X, W> unit;
        unit.load(x + at[0], strides[0][0]);
        if constexpr (sizeof(X) == sizeof(Y)) {
            unit.store(out + i);
        } else {
            float values[W];
            unit.unpack(values);
            Unit<Y, W> result;
            result.pack(values);
            result.store(out + i);
        }
    }
};

#define COPY(name, X, Y, W)                                                                                              \
    KERNEL name(const X* x, Y* out, u64 total, u64 vectorized, u32 rank, SHAPE_ARGS(n), STRIDE_ARGS(s)) {                    \
        for_each_unit<W>(total, vectorized, CopyBody<X, Y>{x, out, rank, SHAPE(n), {STRIDES(s)}});                           \
    }
COPY(copy_4_bytes, float, float, 4)
COPY(copy_2_bytes, bf16, bf16, 8)
COPY(cast_f32_to_bf16, float, bf16, 4)
COPY(cast_bf16_to_f32, bf16, float, 4)

// ------------------------------------------------------------------------------------------------ accumulate

// out += alpha * factor[0] * x, with factor a scalar in device memory (1 if null).
template <typename X, typename Y> struct AccumulateBody {
    const X* __restrict__ x;
    Y* out;
    float alpha;
    u32 rank;
    u32 shape[RANK];
    u64 strides[2][RANK];

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at[2];
        locate<2>(i, rank, shape, strides, at);
        Unit<X, W> step;
        Unit<Y, W> sum;
        step.load(x + at[0], strides[0][0]);
        sum.load(out + at[1], strides[1][0]);
        float values[W];
#pragma unroll
        for (int k = 0; k < W; k++) values[k] = fmaf(alpha, step.get(k), sum.get(k));
        sum.pack(values);
        sum.store(out + at[1], strides[1][0]);
    }
};

#define ACCUMULATE(name, X, Y, W)                                                                                        \
    KERNEL name(const X* x, Y* out, u64 total, u64 vectorized, float alpha, const float* factor, u32 rank, SHAPE_ARGS(n),     \
                STRIDE_ARGS(s), STRIDE_ARGS(t)) {                                                                        \
        if (factor) alpha *= factor[0];                                                                                  \
        for_each_unit<W>(total, vectorized, AccumulateBody<X, Y>{x, out, alpha, rank, SHAPE(n), {STRIDES(s), STRIDES(t)}}); \
    }
ACCUMULATE(accumulate_f32_into_f32, float, float, 4)
ACCUMULATE(accumulate_bf16_into_f32, bf16, float, 4)
ACCUMULATE(accumulate_bf16_into_bf16, bf16, bf16, 8)

// ------------------------------------------------------------------------------------------------ scale, fill

template <typename T> struct ScaleBody {
    T* x;
    float alpha;

    template <int W> DEVICE_MEMBER void run(u64 i) {
        Unit<T, W> unit;
        unit.load(x + i);
        float values[W];
#pragma unroll
        for (int k = 0; k < W; k++) values[k] = alpha * unit.get(k);
        unit.pack(values);
        unit.store(x + i);
    }
};

// x *= alpha * factor[0] (1 if null).
#define SCALE(name, T)                                                                                                   \
    KERNEL name(T* x, u64 total, u64 vectorized, float alpha, const float* factor) {                                      \
        if (factor) alpha *= factor[0];                                                                                  \
        for_each_unit<Widest<T>::width>(total, vectorized, ScaleBody<T>{x, alpha});                                       \
    }
SCALE(scale_f32, float)
SCALE(scale_bf16, bf16)

template <typename T> struct FillBody {
    T* x;
    u32 pattern;

    template <int W> DEVICE_MEMBER void run(u64 i) {
        Unit<T, W> unit;
#pragma unroll
        for (int k = 0; k < Unit<T, W>::words; k++) unit.bits[k] = pattern;
        unit.store(x + i);
    }
};

// Every element becomes the pattern; one of 2 bytes comes twice in it.
#define FILL(name, T)                                                                                                    \
    KERNEL name(T* x, u64 total, u64 vectorized, u32 pattern) {                                                          \
        for_each_unit<Widest<T>::width>(total, vectorized, FillBody<T>{x, pattern});                                      \
    }
FILL(fill_4_bytes, float)
FILL(fill_2_bytes, bf16)
