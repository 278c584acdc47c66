// GroupNorm with one group per head: y = (x - mean) s weight + bias, s = 1 / sqrt(variance + epsilon).
//
// forward: reads x [tokens, heads, head_dim], weight and bias [heads, head_dim]; writes y, and mean and s [tokens, heads]
//   in fp32.
// backward: reads x, weight, mean, s, dout; with n = (x - mean) s and g = dout weight it writes
//   dx = s (g - mean(g) - n mean(g n)), and partial sums of dout n and of dout over tokens, fp32 [slices, heads, head_dim],
//   which reduce.cu's `across` adds up. Each of the three may be null.
// Statistics and accumulation in fp32 (two passes over the registers for the variance); one rounding at the store.
//
// Launch: 128 threads; `group` threads share a head, a power of two up to 32; each holds N units of W elements, which cover
// head_dim. A block has 128 / group places: `heads_here` neighbouring heads of as many tokens as fit.
// Grid (slices of the tokens, ceil(heads / heads_here)).

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

DEVICE float group_sum(float x, u32 group) {
    for (u32 offset = group / 2; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

// Where a thread works: its head (heads or more: none), its first token and the step to the next one.
struct Place {
    u32 lane, head, token, step;
};

DEVICE Place place_of_thread(u32 heads_here, u32 group) {
    u32 seat = threadIdx.x / group, tokens_here = 128 / group / heads_here;
    Place place;
    place.lane = threadIdx.x % group;
    place.head = blockIdx.y * heads_here + seat % heads_here;
    place.token = blockIdx.x * tokens_here + seat / heads_here;
    place.step = gridDim.x * tokens_here;
    if (seat >= heads_here * tokens_here) place.head = 0xffffffffu;
    return place;
}

template <typename T, typename P, int W, int N>
DEVICE void group_forward(const T* x, const P* weight, const P* bias, T* y, float* mean, float* inverse_std, u32 tokens,
                          u32 heads, u32 head_dim, float inverse_dim, float epsilon, u32 heads_here, u32 group) {
    Place place = place_of_thread(heads_here, group);
    // Threads without work stay for the shuffles.
    for (u32 first = blockIdx.x * (128 / group / heads_here); first < tokens; first += place.step, place.token += place.step) {
        bool here = place.head < heads && place.token < tokens;
        u64 at = (u64)place.token * heads + place.head;
        Unit<T, W> held[N];
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + place.lane) * W;
            if (here && column < head_dim) held[n].load(x + at * head_dim + column);
            else held[n].clear();
#pragma unroll
            for (int k = 0; k < W; k++) sum += held[n].get(k);
        }
        float center = group_sum(sum, group) * inverse_dim, squares = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
            if ((n * group + place.lane) * W < head_dim) {
#pragma unroll
                for (int k = 0; k < W; k++) {
                    float difference = held[n].get(k) - center;
                    squares = fmaf(difference, difference, squares);
                }
            }
        }
        float s = 1.0f / sqrtf(group_sum(squares, group) * inverse_dim + epsilon);
        if (!here) continue;
        if (place.lane == 0) {
            mean[at] = center;
            inverse_std[at] = s;
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + place.lane) * W;
            if (column < head_dim) {
                Unit<P, W> factors, shifts;
                factors.load(weight + place.head * head_dim + column);
                shifts.load(bias + place.head * head_dim + column);
                float values[W];
#pragma unroll
                for (int k = 0; k < W; k++)
                    values[k] = fmaf((held[n].get(k) - center) * s, factors.get(k), shifts.get(k));
                held[n].pack(values);
                held[n].store(y + at * head_dim + column);
            }
        }
    }
}

template <typename T, typename P, int W, int N>
DEVICE void group_backward(const T* x, const P* weight, const float* mean, const float* inverse_std, const T* dout, T* dx,
                           float* dweight, float* dbias, u32 tokens, u32 heads, u32 head_dim, float inverse_dim,
                           u32 heads_here, u32 group) {
    Place place = place_of_thread(heads_here, group);
    u32 tokens_here = 128 / group / heads_here;
    u32 slice = place.token;
    float weight_sum[N * W], bias_sum[N * W];
#pragma unroll
    for (int i = 0; i < N * W; i++) weight_sum[i] = bias_sum[i] = 0.0f;
    for (u32 first = blockIdx.x * tokens_here; first < tokens; first += place.step, place.token += place.step) {
        bool here = place.head < heads && place.token < tokens;
        u64 at = (u64)place.token * heads + place.head;
        float center = here ? mean[at] : 0.0f, s = here ? inverse_std[at] : 0.0f;
        Unit<T, W> xs[N], douts[N];
        float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + place.lane) * W;
            if (here && column < head_dim) {
                xs[n].load(x + at * head_dim + column);
                douts[n].load(dout + at * head_dim + column);
                Unit<P, W> factors;
                factors.load(weight + place.head * head_dim + column);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    float normal = (xs[n].get(k) - center) * s, d = douts[n].get(k), g = d * factors.get(k);
                    sum_g += g;
                    sum_gn = fmaf(g, normal, sum_gn);
                    weight_sum[n * W + k] = fmaf(d, normal, weight_sum[n * W + k]);
                    bias_sum[n * W + k] += d;
                }
            }
        }
        if (!dx) continue;
        float mean_g = group_sum(sum_g, group) * inverse_dim, mean_gn = group_sum(sum_gn, group) * inverse_dim;
        if (!here) continue;
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 column = (n * group + place.lane) * W;
            if (column < head_dim) {
                Unit<P, W> factors;
                factors.load(weight + place.head * head_dim + column);
                float values[W];
#pragma unroll
                for (int k = 0; k < W; k++) {
                    float normal = (xs[n].get(k) - center) * s;
                    values[k] = s * (douts[n].get(k) * factors.get(k) - mean_g - normal * mean_gn);
                }
                xs[n].pack(values);
                xs[n].store(dx + at * head_dim + column);
            }
        }
    }
    if (place.head >= heads) return;
    // One slice per token seat: [gridDim.x * tokens_here, heads, head_dim].
    u64 row = ((u64)slice * heads + place.head) * head_dim;
#pragma unroll
    for (int n = 0; n < N; n++) {
        u32 column = (n * group + place.lane) * W;
        if (column < head_dim) {
#pragma unroll
            for (int k = 0; k < W; k++) {
                if (dweight) dweight[row + column + k] = weight_sum[n * W + k];
                if (dbias) dbias[row + column + k] = bias_sum[n * W + k];
            }
        }
    }
}

#define GROUP_NORM(name, T, P, W, N)                                                                                     \
    KERNEL group_norm_forward_##name(const T* x, const P* weight, const P* bias, T* y, float* mean, float* inverse_std,   \
                                     u32 tokens, u32 heads, u32 head_dim, float inverse_dim, float epsilon,              \
                                     u32 heads_here, u32 group) {                                                        \
        group_forward<T, P, W, N>(x, weight, bias, y, mean, inverse_std, tokens, heads, head_dim, inverse_dim, epsilon,   \
                                  heads_here, group);                                                                    \
    }                                                                                                                    \
    KERNEL group_norm_backward_##name(const T* x, const P* weight, const float* mean, const float* inverse_std,           \
                                      const T* dout, T* dx, float* dweight, float* dbias, u32 tokens, u32 heads,          \
                                      u32 head_dim, float inverse_dim, u32 heads_here, u32 group) {                      \
        group_backward<T, P, W, N>(x, weight, mean, inverse_std, dout, dx, dweight, dbias, tokens, heads, head_dim,       \
                                   inverse_dim, heads_here, group);                                                      \
    }
// Wide: one unit of 16 bytes of x a thread. Narrow: any head up to 512, any address.
GROUP_NORM(f32_f32, float, float, 4, 1)
GROUP_NORM(bf16_f32, bf16, float, 8, 1)
GROUP_NORM(bf16_bf16, bf16, bf16, 8, 1)
GROUP_NORM(narrow_f32_f32, float, float, 1, 16)
GROUP_NORM(narrow_bf16_f32, bf16, float, 1, 16)
GROUP_NORM(narrow_bf16_bf16, bf16, bf16, 1, 16)
