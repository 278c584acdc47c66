// SwiGLU's elementwise half: out = silu(gate) up.
//
// gate and up (and their gradients) are rows of `width` elements, `stride` apart: one long row, or the two halves of packed
// rows [rows, 2 width] with the gate first. out and dout are contiguous.
// forward: reads gate, up; writes out. backward, with s = sigmoid(gate): reads gate, up, dout; writes
//   dgate = dout up s (1 + gate (1 - s)) and dup = dout gate s; either may be null.
// Arithmetic in fp32, one rounding at the store. Elements go in units of 16 bytes up to `vectorized` (see elementwise.cu).
// Launch: any one-dimensional grid of 256 threads; results do not depend on it.

#define KERNEL extern "C" __global__ void __launch_bounds__(256)

template <int W, typename Body> DEVICE void for_each_unit(u64 total, u64 vectorized, Body body) {
    u64 threads = thread_count();
    for (u64 i = thread_index() * W; i < vectorized; i += threads * W) body.template run<W>(i);
    for (u64 i = vectorized + thread_index(); i < total; i += threads) body.template run<1>(i);
}

// Where element i of the contiguous side lies in the strided one. A width of 0 stands for one long row; with several rows
// there are fewer than 2^32 elements.
DEVICE u64 in_rows(u64 i, u32 width, u64 stride) {
    if (width == 0) return i;
    u32 row = (u32)i / width;
    return row * stride + ((u32)i - row * width);
}

template <typename T> struct Forward {
    const T* __restrict__ gate;
    const T* __restrict__ up;
    T* __restrict__ out;
    u32 width;
    u64 stride;

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at = in_rows(i, width, stride);
        Unit<T, W> gates, ups;
        gates.load(gate + at);
        ups.load(up + at);
        float values[W];
#pragma unroll
        for (int k = 0; k < W; k++) {
            float g = gates.get(k);
            values[k] = g * sigmoid(g) * ups.get(k);
        }
        gates.pack(values);
        gates.store(out + i);
    }
};

template <typename T> struct Backward {
    const T* __restrict__ gate;
    const T* __restrict__ up;
    const T* __restrict__ dout;
    T* __restrict__ dgate;
    T* __restrict__ dup;
    u32 width;
    u64 stride;

    template <int W> DEVICE_MEMBER void run(u64 i) {
        u64 at = in_rows(i, width, stride);
        Unit<T, W> gates, ups, douts;
        gates.load(gate + at);
        ups.load(up + at);
        douts.load(dout + i);
        float for_gate[W], for_up[W];
#pragma unroll
        for (int k = 0; k < W; k++) {
            float g = gates.get(k), s = sigmoid(g), d = douts.get(k);
            for_gate[k] = d * ups.get(k) * s * fmaf(1.0f - s, g, 1.0f);
            for_up[k] = d * g * s;
        }
        gates.pack(for_gate);
        ups.pack(for_up);
        if (dgate) gates.store(dgate + at);
        if (dup) ups.store(dup + at);
    }
};

#define SWIGLU(name, T)                                                                                                  \
    KERNEL swiglu_forward_##name(const T* gate, const T* up, T* out, u64 total, u64 vectorized) {                         \
        for_each_unit<Widest<T>::width>(total, vectorized, Forward<T>{gate, up, out, 0, 0});                              \
    }                                                                                                                    \
    KERNEL swiglu_forward_packed_##name(const T* packed, T* out, u64 total, u64 vectorized, u32 width) {                  \
        for_each_unit<Widest<T>::width>(total, vectorized,                                                               \
                                        Forward<T>{packed, packed + width, out, width, 2 * (u64)width});                 \
    }                                                                                                                    \
    KERNEL swiglu_backward_##name(const T* gate, const T* up, const T* dout, T* dgate, T* dup, u64 total,                 \
                                  u64 vectorized) {                                                                      \
        for_each_unit<Widest<T>::width>(total, vectorized, Backward<T>{gate, up, dout, dgate, dup, 0, 0});                \
    }                                                                                                                    \
    KERNEL swiglu_backward_packed_##name(const T* packed, const T* dout, T* dpacked, u64 total, u64 vectorized,           \
                                         u32 width) {                                                                    \
        for_each_unit<Widest<T>::width>(                                                                                 \
            total, vectorized,                                                                                           \
            Backward<T>{packed, packed + width, dout, dpacked, dpacked + width, width, 2 * (u64)width});                 \
    }
SWIGLU(f32, float)
SWIGLU(bf16, bf16)
