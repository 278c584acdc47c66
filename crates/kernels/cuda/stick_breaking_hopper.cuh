// What the sm_90a kernels of stick-breaking attention share. Put after hopper.cuh and stick_breaking.cuh.

// A place in a ring of stages.
struct Place {
    int stage;
    u32 parity;
    template <int stages> __device__ __forceinline__ void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The rows of a tile of keys that lie inside the tensor, zeros behind, by ordinary loads of one warp. `from` is the tile's
// first row; `valid` rows exist.
template <int keys> DEVICE void copy_last_tile(u8* to, const bf16* from, int stride, int valid) {
    const int lane = threadIdx.x & 31, unit = lane & 7;
    from += unit * 8;
    // The producer has few registers.
#pragma unroll 1
    for (int row = lane >> 3; row < keys; row += 4) {
        const int key = permuted_key<keys>(row);
#pragma unroll
        for (int chunk = 0; chunk < HEAD_DIM / 64; chunk++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (key < valid) x = *(const uint4*)(from + (i64)key * stride + chunk * 64);
            *(uint4*)(to + chunk * keys * 128 + row * 128 + ((unit ^ (row & 7)) << 4)) = x;
        }
    }
}

// Where the scores keep key x (of the lane's 32) of row r (of the lane's two: g and g + 8).
constexpr __device__ int score_at(int r, int x) { return 4 * (x >> 1) + 2 * r + (x & 1); }

// Four words per lane, of four 8-column tiles, become the four words of tile c, one from each lane of the quad.
DEVICE void transpose_quad(u32 (&w)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 got = __shfl_xor_sync(FULL_MASK, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 got = __shfl_xor_sync(FULL_MASK, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = got;
    }
}

// ------------------------------------------------------------------------------------------------ backward

// Hides from the lane's two rows the keys from `visible` (and 8 further) of its KEYS / 4 on: their odds become 0 (factor is
// not 0).
DEVICE void hide_keys(float (&z)[KEYS / 2], int visible, float factor) {
    const float hidden = factor < 0.0f ? INFINITY_F : -INFINITY_F;
#pragma unroll
    for (int x = 0; x < KEYS / 4; x++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (x >= visible + 8 * r) z[score_at(r, x)] = hidden;
}

// The odds replace the scores z; `keep` takes 1 - beta = 1 / (1 + e) of each key, two of them from one reciprocal, and
// `left` what keys newer than the lane's leave of the stick.
DEVICE void take_odds(float (&z)[KEYS / 2], float (&keep)[KEYS / 2], float factor, const float (&stick)[2], float (&left)[2]) {
    const int c = threadIdx.x & 3;
    float total[2];
#pragma unroll
    for (int x = 0; x < KEYS / 4; x += 2)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float& e0 = z[score_at(r, x)];
            float& e1 = z[score_at(r, x + 1)];
            e0 = exp2_approx(clamp(e0 * factor, ODDS_LIMIT));
            e1 = exp2_approx(clamp(e1 * factor, ODDS_LIMIT));
            const float u0 = 1.0f + e0, u1 = 1.0f + e1;
            // At least 2^-120: a normal float.
            const float both = rcp_approx(u0 * u1);
            keep[score_at(r, x)] = both * u1;
            keep[score_at(r, x + 1)] = both * u0;
            total[r] = x == 0 ? both : total[r] * both;
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float next = __shfl_down_sync(FULL_MASK, total[r], 1, 4);
        if (c == 3) next = 1.0f;
        float second = __shfl_down_sync(FULL_MASK, total[r] * next, 2, 4);
        if (c >= 2) second = 1.0f;
        left[r] = stick[r] * (next * second);
    }
}

// From the odds, `keep` and `left` of take_odds, g = do.v, and `sum` over older keys, which grows by the sum over these: the
// odds become dz and g becomes the weights A times g.
DEVICE void score_gradients(float (&e)[KEYS / 2], float (&g)[KEYS / 2], const float (&keep)[KEYS / 2], float (&left)[2],
                            float (&sum)[2]) {
    float grown[2] = {0.0f, 0.0f}, before[2];
#pragma unroll
    for (int x = KEYS / 4 - 1; x >= 0; x--)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            left[r] *= keep[score_at(r, x)];
            g[score_at(r, x)] *= e[score_at(r, x)] * left[r];
            grown[r] += g[score_at(r, x)];
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float older, all;
        scan_sums(grown[r], older, all);
        before[r] = sum[r] + older;
        sum[r] += all;
    }
#pragma unroll
    for (int x = 0; x < KEYS / 4; x++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float& z = e[score_at(r, x)];
            // dz = keep a - beta before, with beta = e keep.
            z = keep[score_at(r, x)] * fmaf(-z, before[r], g[score_at(r, x)]);
            before[r] += g[score_at(r, x)];
        }
}
