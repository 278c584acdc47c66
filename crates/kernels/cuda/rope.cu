// Rotary position embedding, dimension d paired with d + head_dim / 2: (a, b) -> (a cos - b sin, b cos + a sin), with
// angle = position theta^(-2d / head_dim).
//
// Reads x [tokens, heads, head_dim] with token rows x_stride apart, positions [tokens] u32; writes out, rows out_stride
// apart; x and out may be the same memory. `direction` is 1, or -1 to rotate back (the backward pass).
// The angle is taken in fp64 as a number of half turns, reduced to -1 .. 1, and only then rounded to fp32: its error is below
// 2^-24 half turns at any position. Rotation in fp32, one rounding at the store.
//
// Launch: 128 threads, a thread per token and W neighbouring pairs; it walks heads blockIdx.y, blockIdx.y + gridDim.y, ...
// Grid (ceil(tokens * head_dim / 2 / W / 128), any).

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

// The frequency of pair d, in half turns per position, is 2^(exponent d) / pi.
template <typename T, int W>
DEVICE void rotate(const T* x, T* out, const u32* positions, u32 tokens, u32 heads, u32 head_dim, u64 x_stride,
                   u64 out_stride, double exponent, float direction) {
    u32 half = head_dim / 2, units = half / W;
    u32 index = (u32)thread_index();  // the host sees to it that tokens * units is below 2^32
    u32 token = index / units, d = (index - token * units) * W;
    if (token >= tokens) return;
    double position = positions[token];
    float sines[W], cosines[W];
#pragma unroll
    for (int k = 0; k < W; k++) {
        double turns = position * (exp2(exponent * (d + k)) * 0.31830988618379067154);
        turns -= 2.0 * rint(0.5 * turns);
        sincospif((float)turns, &sines[k], &cosines[k]);
        sines[k] *= direction;
    }
    x += token * x_stride + d;
    out += token * out_stride + d;
    for (u32 head = blockIdx.y; head < heads; head += gridDim.y) {
        u64 at = (u64)head * head_dim;
        Unit<T, W> low, high;
        low.load(x + at);
        high.load(x + at + half);
        float first[W], second[W];
#pragma unroll
        for (int k = 0; k < W; k++) {
            float a = low.get(k), b = high.get(k);
            first[k] = a * cosines[k] - b * sines[k];
            second[k] = b * cosines[k] + a * sines[k];
        }
        low.pack(first);
        high.pack(second);
        low.store(out + at);
        high.store(out + at + half);
    }
}

#define ROPE(name, T, W)                                                                                                 \
    KERNEL rope_rotate_##name(const T* x, T* out, const u32* positions, u32 tokens, u32 heads, u32 head_dim, u64 x_stride, \
                              u64 out_stride, double exponent, float direction) {                                        \
        rotate<T, W>(x, out, positions, tokens, heads, head_dim, x_stride, out_stride, exponent, direction);              \
    }
ROPE(f32, float, 4)
ROPE(bf16, bf16, 8)
ROPE(half_bf16, bf16, 4)
ROPE(narrow_f32, float, 1)
ROPE(narrow_bf16, bf16, 1)
