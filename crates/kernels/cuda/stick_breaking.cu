// Stick-breaking attention on tensor cores (mma.sync, sm_80 and later), bf16 with float accumulation.
//
// For query row i and key j of one head in one document, j < i (j <= i with attend_current):
//     e_ij = 2^(scale log2(e) q_i.k_j),   A_ij = e_ij prod_{j <= k visible} 1/(1 + e_ik),   o_i = sum_j A_ij v_j,
//     rem_i = prod_j 1/(1 + e_ij).
// That is beta = e / (1 + e) in odds form: no logarithm, and 1 - beta = 1 / (1 + e) never comes from a subtraction.
//
// A warp holds the scores of 16 (or 32) query rows and KEYS keys. The keys of a tile lie permuted in shared memory
// (attention.cuh), so that each lane of a quad owns KEYS/4 contiguous keys of a row: the product along a row is serial
// within a lane and takes three shuffles across the quad.
//
// State. Rows are cut into pieces of 64 from the start of each document, keys into blocks of KEYS. For piece m and block b
// that some row of the piece may see, `sticks[head][entry(m, b)][64]` is what each row has left past block b (its older
// edge), so the last one visited holds rem. With these numbers every (piece, block) pair can be rebuilt alone, in any
// order; they are kept in 16 bits (stick_breaking.cuh). The backward pass runs from the oldest key up with them and writes
// `sums` of the same shape in float: for each row
// drem rem + sum of A (do.v) over the blocks older than b. entry(m, b) = the document's first entry + m (m + 1) / 2 * 64 /
// KEYS + b.
//
// Passes, one block of threads per tile of the tile list (the longest rows first):
//   forward   reads q, k, v; writes o, and if not null rem, log2_rem [tokens, heads] and the state; the oldest visited
//             block of each piece. Walks the keys from the newest block to the oldest and stops, with early exit, when all
//             rows of the tile are below the threshold.
//   sticks    the same walk without values: rebuilds the state when the forward pass did not keep it.
//   backward_dq    one tile of queries, oldest block first: dq, and `sums`.
//   backward_dkdv  one block of keys, over all pieces that see it and all query heads of the group: dk, dv.
// Nothing is added up through memory: each output is written once, by one thread block, in a fixed order.
// bf16 appears in the inputs, in A and dz as operands of products, and in outputs; all else is float.

// Warps and row tiles (of 16) per warp, and stages of the copies, of each pass.
#ifndef FORWARD_WARPS
#define FORWARD_WARPS 4
#endif
#ifndef FORWARD_ROW_TILES
#define FORWARD_ROW_TILES (HEAD_DIM > 128 ? 1 : 2)
#endif
// Keys that the forward pass takes at a time; the state has one entry per KEYS keys whatever this is.
#ifndef FORWARD_KEYS
#define FORWARD_KEYS (HEAD_DIM > 64 ? 32 : KEYS)
#endif
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 2
#endif
#ifndef STICKS_BLOCKS
#define STICKS_BLOCKS (HEAD_DIM > 64 ? 3 : 4)
#endif
#ifndef DQ_WARPS
#define DQ_WARPS 4
#endif
#ifndef DQ_ROW_TILES
#define DQ_ROW_TILES 1
#endif
#ifndef DQ_BLOCKS
#define DQ_BLOCKS (STAGES > 1 && (HEAD_DIM == 16 || HEAD_DIM == 32 || HEAD_DIM == 64) ? 3 : 2)
#endif
#ifndef DKDV_BLOCKS
#define DKDV_BLOCKS (STAGES > 1 && (HEAD_DIM == 16 || HEAD_DIM == 32 || HEAD_DIM == 64) ? 3 : 2)
#endif
#ifndef STAGES
#define STAGES 2
#endif

constexpr int TILE_BYTES = KEYS * ROW_BYTES;
static_assert(KEYS % FORWARD_KEYS == 0 && PIECE % KEYS == 0, "blocks of keys must nest");

// Hides from each row the keys from its own on (or past its own): their odds become 0 (factor is not 0). `row` is the lane's row of tile 0,
// `key` its first key, both counted in the document.
template <int row_tiles, int keys>
DEVICE void hide_future(float (&z)[row_tiles][keys / 8][4], int row, int key, int own_key, float factor) {
    const float hidden = factor < 0.0f ? INFINITY_F : -INFINITY_F;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < keys / 8; j++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                if (key + 2 * j + (x & 1) >= row + 16 * i + 8 * (x >> 1) + own_key) z[i][j][x] = hidden;
}

// ------------------------------------------------------------------------------------------------ forward

// log2(1 + x), accurate for tiny x too.
DEVICE float log2_of_one_plus(float x) {
    float series = 0.16029947f;
    series = fmaf(series, -x, 0.18033688f);
    series = fmaf(series, -x, 0.20609929f);
    series = fmaf(series, -x, 0.24044917f);
    series = fmaf(series, -x, 0.28853901f);
    series = fmaf(series, -x, 0.36067376f);
    series = fmaf(series, -x, 0.48089835f);
    series = fmaf(series, -x, 0.72134752f);
    series = fmaf(series, -x, 1.44269504f);
    return x < 0.25f ? x * series : __log2f(1.0f + x);
}

// Keys of one row that share a reciprocal: their product of 1 + e is formed first.
template <bool want_weights> constexpr __device__ int chunk_length() { return want_weights ? 4 : 8; }

// The odds replace the scores; `inverse` takes the inverse products of 1 + e of each lane's chunks of keys. False if such a
// product is so large somewhere that it or its inverse could leave the range of a float (or is NaN): then nothing here is
// of use. `log2_left`: the binary logarithm of what the lane's keys leave, if wanted.
template <int row_tiles, int keys, bool want_weights, bool want_log>
DEVICE bool take_odds(float (&z)[row_tiles][keys / 8][4], float factor,
                      float (&inverse)[row_tiles][2][keys / 4 / chunk_length<want_weights>()],
                      float (&log2_left)[row_tiles][2]) {
    constexpr int length = chunk_length<want_weights>(), chunks = keys / 4 / length;
    // Times a stick of more than 2^-60, the smallest inverse is still a normal float. Without weights only the product of
    // sticks is formed.
    constexpr float least = want_weights ? 8.6736174e-19f : 7.5231638e-37f;  // 2^-60, 2^-120
    bool fine = true;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            log2_left[i][r] = 0.0f;
#pragma unroll
            for (int ch = 0; ch < chunks; ch++) {
                float w = 1.0f, grown = 0.0f;
#pragma unroll
                for (int x = length * ch; x < length * ch + length; x++) {
                    float& e = z[i][x >> 1][2 * r + (x & 1)];
                    e = exp2_approx(e * factor);
                    w = x == length * ch ? 1.0f + e : fmaf(w, e, w);
                    if (want_log) grown = fmaf(grown, e, grown + e);
                }
                inverse[i][r][ch] = rcp_approx(w);
                fine = fine && inverse[i][r][ch] >= least;
                if (want_log) log2_left[i][r] -= log2_of_one_plus(grown);
            }
        }
    return fine;
}

// From the odds and inverse products: `stick` is what newer keys leave and becomes what these keys leave, `log2_stick` its
// logarithm if wanted; the weights A, packed, if wanted.
template <int row_tiles, int keys, bool want_weights, bool want_log>
DEVICE void break_sticks(const float (&z)[row_tiles][keys / 8][4],
                         const float (&inverse)[row_tiles][2][keys / 4 / chunk_length<want_weights>()],
                         const float (&log2_left)[row_tiles][2], float (&stick)[row_tiles][2],
                         float (&log2_stick)[row_tiles][2], u32 (&weights)[keys / 16][row_tiles][4]) {
    constexpr int chunks = keys / 4 / chunk_length<want_weights>();
    float left[row_tiles][2];
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = inverse[i][r][0];
#pragma unroll
            for (int ch = 1; ch < chunks; ch++) total *= inverse[i][r][ch];
            float newer, all;
            scan_products(total, newer, all);
            left[i][r] = stick[i][r] * newer;
            stick[i][r] *= all;
            if (want_log) {
                float older, sum;
                scan_sums(log2_left[i][r], older, sum);
                log2_stick[i][r] += sum;
            }
        }
    if (want_weights) {
#pragma unroll
        for (int ch = chunks - 1; ch >= 0; ch--)
#pragma unroll
            for (int i = 0; i < row_tiles; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    left[i][r] *= inverse[i][r][ch];
                    float s = left[i][r], a[4];
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        a[x] = z[i][2 * ch + (x >> 1)][2 * r + (x & 1)] * s;
                        if (x < 3) s += a[x];
                    }
                    weights[ch][i][r] = pack_bf16(a[0], a[1]);
                    weights[ch][i][2 + r] = pack_bf16(a[2], a[3]);
                }
    }
}

// The same for any scores, with one reciprocal per key.
template <int row_tiles, int keys, bool want_weights, bool want_log>
DEVICE void break_saturated_sticks(float (&z)[row_tiles][keys / 8][4], float factor, float (&stick)[row_tiles][2],
                                   float (&log2_stick)[row_tiles][2], u32 (&weights)[keys / 16][row_tiles][4]) {
    constexpr int count = keys / 4;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float keep[count];
            float total = 1.0f, log = 0.0f;
#pragma unroll
            for (int x = 0; x < count; x++) {
                float& e = z[i][x >> 1][2 * r + (x & 1)];
                float t = e * factor;
                e = exp2_approx(clamp(t, ODDS_LIMIT));
                if (want_log) log += log2_of_one_plus(e) + fmaxf(t - ODDS_LIMIT, 0.0f);
                keep[x] = rcp_approx(1.0f + e);
                total *= keep[x];
            }
            float newer, all;
            scan_products(total, newer, all);
            float left = stick[i][r] * newer;
            stick[i][r] *= all;
            if (want_log) {
                float older, sum;
                scan_sums(log, older, sum);
                log2_stick[i][r] -= sum;
            }
            if (want_weights) {
#pragma unroll
                for (int x = count - 2; x >= 0; x -= 2) {
                    left *= keep[x + 1];
                    float second = z[i][x >> 1][2 * r + 1] * left;
                    left *= keep[x];
                    weights[x / 4][i][(x & 2) + r] = pack_bf16(z[i][x >> 1][2 * r] * left, second);
                }
            }
        }
}

struct Forward {
    const bf16 *q, *k, *v;
    bf16* o;
    float *rem, *log2_rem;
    Stick* sticks;
    int* first_blocks;
    const int* tiles;
    int query_stride, key_stride, value_stride, output_stride;
    int heads, group, first_head;
    // State entries and pieces of one head.
    int entries, pieces;
    int own_key;
    float factor, threshold;
};

template <bool want_values, bool want_log, int warps, int row_tiles, int keys> DEVICE void forward(const Forward& p) {
    constexpr int threads = warps * 32, rows = warps * row_tiles * 16, tile_bytes = keys * ROW_BYTES;
    extern __shared__ __align__(128) u8 shared[];
    u8* q_tile = shared;
    const u32 q_shared = shared_address(q_tile), k_shared = q_shared + rows * ROW_BYTES,
              v_shared = k_shared + STAGES * tile_bytes;
    const Tile tile = read_tile(p.tiles, blockIdx.x);
    const int head = p.first_head + blockIdx.y, kv_head = head / p.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int valid = min(rows, tile.length - tile.first);
    const int blocks = visible_blocks<keys>(tile.first + valid, p.own_key);

    const bf16* k = p.k + (i64)tile.start * p.key_stride + kv_head * HEAD_DIM;
    const bf16* v = p.v + (i64)tile.start * p.value_stride + kv_head * HEAD_DIM;
    auto copy_block = [&](int b) {
        int stage = STAGES == 1 ? 0 : b & 1, left = tile.length - b * keys;
        copy_tile<keys, threads, true>(k_shared + stage * tile_bytes, k + (i64)b * keys * p.key_stride, p.key_stride, left);
        if (want_values)
            copy_tile<keys, threads, true>(v_shared + stage * tile_bytes, v + (i64)b * keys * p.value_stride, p.value_stride, left);
    };
    clear_padding<threads>(shared, rows + (want_values ? 2 : 1) * STAGES * keys);
    copy_tile<rows, threads, false>(q_shared, p.q + (i64)(tile.start + tile.first) * p.query_stride + head * HEAD_DIM,
                                    p.query_stride, valid);
    if (STAGES > 1 && blocks > 0) copy_block(blocks - 1);
    copies_commit();

    // The warp's rows, counted in the document; this lane's rows are row, row + 8 (, row + 16, row + 24).
    const int warp_row = tile.first + warp * row_tiles * 16, row = warp_row + g;
    const int piece = warp_row / PIECE;
    const int piece_blocks = visible_blocks(min((piece + 1) * PIECE, tile.length), p.own_key);
    const bool exists = warp_row < tile.length;
    Stick* sticks = nullptr;
    if (p.sticks != nullptr && exists)
        sticks = p.sticks + ((i64)blockIdx.y * p.entries + first_entry(tile, piece)) * PIECE + (row & (PIECE - 1));
    float stick[row_tiles][2], log2_stick[row_tiles][2];
    float o[row_tiles][2 * DIM_STEPS][4];
    bool alive = false;
#pragma unroll
    for (int i = 0; i < row_tiles; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Rows past the document's end have no stick, so they never keep a tile alive.
            stick[i][r] = row + 16 * i + 8 * r < tile.length ? 1.0f : 0.0f;
            log2_stick[i][r] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 2 * DIM_STEPS; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) o[i][j][x] = 0.0f;
    }
    const u32 q_lane = q_shared + warp * row_tiles * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 k_lane = k_shared + units_first(ROW_BYTES), v_lane = v_shared + rows_first(ROW_BYTES);

    // After a sticks pass the oldest block is known; in a forward pass it is found.
    int oldest = 0;
    const bool find_exit = want_values && p.threshold > 0.0f;
    if (!want_values && p.first_blocks != nullptr) {
        oldest = blocks * keys / KEYS + 1;
#pragma unroll
        for (int s = 0; s < (rows + PIECE - 1) / PIECE; s++)
            if (tile.first + s * PIECE < tile.length)
                oldest = min(oldest, p.first_blocks[(i64)head * p.pieces + tile.piece + tile.first / PIECE + s]);
        oldest *= KEYS / keys;
    }
    int b = blocks - 1;
    for (; b >= oldest; b--) {
        if (STAGES == 1) {
            __syncthreads();
            copy_block(b);
            copies_commit();
        }
        copies_wait<0>();
        if (find_exit && b < blocks - 1 && (b + 1) * keys % KEYS == 0) {
            if (!__syncthreads_or(alive)) break;
        } else {
            __syncthreads();
        }
        if (STAGES > 1 && b > oldest) {
            copy_block(b - 1);
            copies_commit();
        }
        const int stage = STAGES == 1 ? 0 : b & 1;
        if (b * keys < warp_row + row_tiles * 16 - 1 + p.own_key) {
            float z[row_tiles][keys / 8][4], log2_left[row_tiles][2];
            float inverse[row_tiles][2][keys / 4 / chunk_length<want_values>()];
            u32 weights[keys / 16][row_tiles][4];
            auto score = [&]() {
                multiply_rows<row_tiles, keys>(z, q_lane, k_lane + stage * tile_bytes);
                if ((b + 1) * keys > warp_row + p.own_key)
                    hide_future<row_tiles, keys>(z, row, b * keys + c * (keys / 4), p.own_key, p.factor);
            };
            score();
            bool fine = take_odds<row_tiles, keys, want_values, want_log>(z, p.factor, inverse, log2_left);
            if (__all_sync(FULL_MASK, fine)) {
                break_sticks<row_tiles, keys, want_values, want_log>(z, inverse, log2_left, stick, log2_stick, weights);
            } else {
                score();
                break_saturated_sticks<row_tiles, keys, want_values, want_log>(z, p.factor, stick, log2_stick, weights);
            }
            if (want_values) {
#pragma unroll
                for (int ch = keys / 16 - 1; ch >= 0; ch--)
                    multiply_weights<row_tiles, DIM_STEPS>(o, weights[ch], v_lane + stage * tile_bytes + ch * 16 * ROW_BYTES);
            }
        }
        if (b * keys % KEYS != 0) continue;
        if (sticks != nullptr && c == 0 && b * keys / KEYS < piece_blocks) {
#pragma unroll
            for (int i = 0; i < row_tiles; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) sticks[(i64)(b * keys / KEYS) * PIECE + 16 * i + 8 * r] = pack_stick(stick[i][r]);
        }
        if (find_exit) {
            alive = false;
#pragma unroll
            for (int i = 0; i < row_tiles; i++) alive |= !(stick[i][0] < p.threshold) || !(stick[i][1] < p.threshold);
        }
    }
    if (!want_values) return;

    if (p.first_blocks != nullptr && exists && (warp_row & (PIECE - 1)) == 0 && lane == 0)
        p.first_blocks[(i64)head * p.pieces + tile.piece + piece] = min((b + 1) * keys / KEYS, piece_blocks);
    if (blocks == 0) {
        copies_wait<0>();
        __syncthreads();
    }
    if (!exists) return;
    if (c == 0) {
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int at = row + 16 * i + 8 * r;
                if (at < tile.length) {
                    i64 index = (i64)(tile.start + at) * p.heads + head;
                    if (p.rem != nullptr) p.rem[index] = stick[i][r];
                    if (want_log) p.log2_rem[index] = log2_stick[i][r];
                }
            }
    }
    // The warp's own rows of the query tile are free now; no other warp reads them.
    u8* own = q_tile + warp * row_tiles * 16 * ROW_BYTES;
    __syncwarp();
    store_fragments(own, o, 1.0f, ROW_BYTES);
    __syncwarp();
    write_tile<row_tiles * 16, 32, false>(p.o + (i64)(tile.start + warp_row) * p.output_stride + head * HEAD_DIM,
                                          p.output_stride, tile.length - warp_row, own, lane);
}

// ------------------------------------------------------------------------------------------------ backward

// Per row: from the scores z, g = do.v, what newer keys leave (`stick`) and the sum over older keys (`sum`, which grows by
// the sum over these): z becomes dz. The weights A go to `keep_weights(chunk, i, x, low, high)`: the halves of register x
// of row tile i as a left operand of 16 keys.
template <int row_tiles, typename Weights>
DEVICE void score_gradients(float (&z)[row_tiles][KEYS / 8][4], float (&g)[row_tiles][KEYS / 8][4], float factor,
                            const float (&stick)[row_tiles][2], float (&sum)[row_tiles][2], Weights keep_weights) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // keep = 1 - beta.
            float keep[KEYS / 4];
            float total = 1.0f;
#pragma unroll
            for (int ch = 0; ch < KEYS / 16; ch++) {
                float part = 1.0f;
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float& e = z[i][2 * ch + (x >> 1)][2 * r + (x & 1)];
                    e = exp2_approx(clamp(e * factor, ODDS_LIMIT));
                    float inverse = rcp_approx(1.0f + e);
                    keep[4 * ch + x] = inverse;
                    part = x == 0 ? inverse : part * inverse;
                }
                total *= part;
            }
            float newer, all;
            scan_products(total, newer, all);
            float left = stick[i][r] * newer, grown = 0.0f;
#pragma unroll
            for (int ch = KEYS / 16 - 1; ch >= 0; ch--) {
                float a[4];
#pragma unroll
                for (int x = 3; x >= 0; x--) {
                    left *= keep[4 * ch + x];
                    a[x] = z[i][2 * ch + (x >> 1)][2 * r + (x & 1)] * left;
                    float& ag = g[i][2 * ch + (x >> 1)][2 * r + (x & 1)];
                    ag *= a[x];
                    grown += ag;
                }
                keep_weights(ch, i, r, a[0], a[1]);
                keep_weights(ch, i, 2 + r, a[2], a[3]);
            }
            float older, grown_all;
            scan_sums(grown, older, grown_all);
            float before = sum[i][r] + older;
            sum[i][r] += grown_all;
#pragma unroll
            for (int ch = 0; ch < KEYS / 16; ch++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float& e = z[i][2 * ch + (x >> 1)][2 * r + (x & 1)];
                    float ag = g[i][2 * ch + (x >> 1)][2 * r + (x & 1)];
                    // dz = keep a - beta before, with beta = e keep.
                    e = keep[4 * ch + x] * fmaf(-e, before, ag);
                    before += ag;
                }
        }
}

// Packs accumulators as left operands of 16 keys each.
template <int row_tiles>
DEVICE void pack_chunk(u32 (&packed)[row_tiles][4], const float (&d)[row_tiles][KEYS / 8][4], int ch) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++) {
        packed[i][0] = pack_bf16(d[i][2 * ch][0], d[i][2 * ch][1]);
        packed[i][1] = pack_bf16(d[i][2 * ch][2], d[i][2 * ch][3]);
        packed[i][2] = pack_bf16(d[i][2 * ch + 1][0], d[i][2 * ch + 1][1]);
        packed[i][3] = pack_bf16(d[i][2 * ch + 1][2], d[i][2 * ch + 1][3]);
    }
}

struct Backward {
    const bf16 *q, *k, *v, *d_o;
    const float* drem;
    const Stick* sticks;
    float* sums;
    const int* first_blocks;
    bf16 *dq, *dk, *dv;
    const int* tiles;
    int query_stride, key_stride, value_stride, output_stride;
    int heads, group, first_head;
    int entries, pieces;
    int own_key;
    float factor, scale;
};

template <int warps, int row_tiles> DEVICE void backward_dq(const Backward& p) {
    constexpr int threads = warps * 32, rows = warps * row_tiles * 16;
    extern __shared__ __align__(128) u8 shared[];
    const u32 q_shared = shared_address(shared), g_shared = q_shared + rows * ROW_BYTES,
              k_shared = g_shared + rows * ROW_BYTES, v_shared = k_shared + STAGES * TILE_BYTES;
    const Tile tile = read_tile(p.tiles, blockIdx.x);
    const int head = p.first_head + blockIdx.y, kv_head = head / p.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int valid = min(rows, tile.length - tile.first);
    const int blocks = visible_blocks(tile.first + valid, p.own_key);

    const bf16* keys = p.k + (i64)tile.start * p.key_stride + kv_head * HEAD_DIM;
    const bf16* values = p.v + (i64)tile.start * p.value_stride + kv_head * HEAD_DIM;
    auto copy_block = [&](int b) {
        int stage = STAGES == 1 ? 0 : b & 1, left = tile.length - b * KEYS;
        copy_tile<KEYS, threads, true>(k_shared + stage * TILE_BYTES, keys + (i64)b * KEYS * p.key_stride, p.key_stride, left);
        copy_tile<KEYS, threads, true>(v_shared + stage * TILE_BYTES, values + (i64)b * KEYS * p.value_stride, p.value_stride, left);
    };
    const i64 first_token = tile.start + tile.first;
    clear_padding<threads>(shared, 2 * rows + 2 * STAGES * KEYS);
    copy_tile<rows, threads, false>(q_shared, p.q + first_token * p.query_stride + head * HEAD_DIM, p.query_stride, valid);
    copy_tile<rows, threads, false>(g_shared, p.d_o + first_token * p.output_stride + head * HEAD_DIM, p.output_stride, valid);

    const int warp_row = tile.first + warp * row_tiles * 16, row = warp_row + g;
    const int piece = warp_row / PIECE;
    const int piece_blocks = visible_blocks(min((piece + 1) * PIECE, tile.length), p.own_key);
    const bool exists = warp_row < tile.length;
    // The oldest block that this warp's piece visited, and the oldest of the whole tile.
    int piece_oldest = 0, oldest = 0;
    if (p.first_blocks != nullptr) {
        oldest = blocks;
#pragma unroll
        for (int s = 0; s < (rows + PIECE - 1) / PIECE; s++)
            if (tile.first + s * PIECE < tile.length)
                oldest = min(oldest, p.first_blocks[(i64)head * p.pieces + tile.piece + tile.first / PIECE + s]);
        if (exists) piece_oldest = p.first_blocks[(i64)head * p.pieces + tile.piece + piece];
    }
    if (STAGES > 1 && oldest < blocks) copy_block(oldest);
    copies_commit();

    const i64 state = ((i64)blockIdx.y * p.entries + first_entry(tile, piece)) * PIECE + (row & (PIECE - 1));
    float* sums = p.sums + state;
    const Stick* sticks = p.sticks + state;
    float sum[row_tiles][2];
    float dq[row_tiles][2 * DIM_STEPS][4];
    // What newer keys leave to block b.
    auto read_sticks = [&](int b, float (&stick)[row_tiles][2]) {
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bool in = row + 16 * i + 8 * r < tile.length;
                stick[i][r] = !in ? 0.0f : b + 1 >= piece_blocks ? 1.0f : to_float(sticks[(i64)(b + 1) * PIECE + 16 * i + 8 * r]);
            }
    };
#pragma unroll
    for (int i = 0; i < row_tiles; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = row + 16 * i + 8 * r;
            sum[i][r] = 0.0f;
            // The oldest entry of the state is the remainder.
            if (p.drem != nullptr && at < tile.length) {
                float rem = piece_blocks > piece_oldest ? to_float(sticks[(i64)piece_oldest * PIECE + 16 * i + 8 * r]) : 1.0f;
                sum[i][r] = p.drem[(i64)(tile.start + at) * p.heads + head] * rem;
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * DIM_STEPS; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) dq[i][j][x] = 0.0f;
    }
    const u32 warp_offset = warp * row_tiles * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 q_lane = q_shared + warp_offset, g_lane = g_shared + warp_offset;
    const u32 k_lane = k_shared + units_first(ROW_BYTES), v_lane = v_shared + units_first(ROW_BYTES);
    const u32 k_rows = k_shared + rows_first(ROW_BYTES);

    for (int b = oldest; b < blocks; b++) {
        if (STAGES == 1) {
            __syncthreads();
            copy_block(b);
            copies_commit();
        }
        copies_wait<0>();
        __syncthreads();
        if (STAGES > 1 && b + 1 < blocks) {
            copy_block(b + 1);
            copies_commit();
        }
        const int stage = STAGES == 1 ? 0 : b & 1;
        if (!exists || b < piece_oldest || b >= piece_blocks) continue;
        if (c == 0) {
#pragma unroll
            for (int i = 0; i < row_tiles; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) sums[(i64)b * PIECE + 16 * i + 8 * r] = sum[i][r];
        }
        if (b * KEYS < warp_row + row_tiles * 16 - 1 + p.own_key) {
            float z[row_tiles][KEYS / 8][4], dp[row_tiles][KEYS / 8][4], stick[row_tiles][2];
            read_sticks(b, stick);
            multiply_rows<row_tiles, KEYS>(z, q_lane, k_lane + stage * TILE_BYTES);
            if ((b + 1) * KEYS > warp_row + p.own_key) hide_future<row_tiles, KEYS>(z, row, b * KEYS + c * (KEYS / 4), p.own_key, p.factor);
            multiply_rows<row_tiles, KEYS>(dp, g_lane, v_lane + stage * TILE_BYTES);
            score_gradients<row_tiles>(z, dp, p.factor, stick, sum, [](int, int, int, float, float) {});
#pragma unroll
            for (int ch = 0; ch < KEYS / 16; ch++) {
                u32 dz[row_tiles][4];
                pack_chunk<row_tiles>(dz, z, ch);
                multiply_weights<row_tiles, DIM_STEPS>(dq, dz, k_rows + stage * TILE_BYTES + ch * 16 * ROW_BYTES);
            }
        }
    }
    // If no block was walked the copies are still under way. Asking whether it was would keep `oldest` in a register.
    copies_wait<0>();
    __syncthreads();
    if (!exists) return;
    u8* own = shared + warp * row_tiles * 16 * ROW_BYTES;
    __syncwarp();
    store_fragments(own, dq, p.scale, ROW_BYTES);
    __syncwarp();
    write_tile<row_tiles * 16, 32, false>(p.dq + ((i64)(tile.start + warp_row) * p.heads + head) * HEAD_DIM,
                                          (i64)p.heads * HEAD_DIM, tile.length - warp_row, own, lane);
}

// Bytes of shared memory of a multiprocessor, less what each of two thread blocks reserves (sm_90).
constexpr int TWO_BLOCKS_BYTES = (228 - 2) * 1024;
constexpr __device__ int dkdv_exchanges() {
    int tiles = 2 * TILE_BYTES + 2 * STAGES * PIECE * ROW_BYTES, exchange = PIECE * (KEYS * 2 + 16);
    bool two_fit = 2 * (tiles + 2 * exchange) <= TWO_BLOCKS_BYTES, one_fits = 2 * (tiles + exchange) <= TWO_BLOCKS_BYTES;
    return one_fits && !two_fit ? 1 : 2;
}

// Four warps. Scores: a warp has 16 of the piece's 64 rows, and all keys. Gradients: the warps split the keys by
// `key_warps` and the dimensions by `dim_warps`, and read A and dz of all rows from shared memory.
DEVICE void backward_dkdv(const Backward& p) {
    constexpr int threads = 128;
    constexpr int dim_warps = DIM_STEPS % 2 == 0 || KEYS == 32 ? 2 : 1, key_warps = 4 / dim_warps;
    static_assert(DIM_STEPS % dim_warps == 0, "32 keys need an even number of dimension steps");
    constexpr int key_tiles = KEYS / key_warps / 16, steps = DIM_STEPS / dim_warps;
    constexpr int score_bytes = KEYS * 2 + 16, piece_bytes = PIECE * ROW_BYTES;
    extern __shared__ __align__(128) u8 shared[];
    const u32 k_shared = shared_address(shared), v_shared = k_shared + TILE_BYTES, q_shared = v_shared + TILE_BYTES,
              g_shared = q_shared + STAGES * piece_bytes;
    u8* a_tile = shared + 2 * TILE_BYTES + 2 * STAGES * piece_bytes;
    // A and dz of all rows pass between the warps in two tiles, or one after the other in one if only that lets two thread
    // blocks share a multiprocessor.
    constexpr int exchange_bytes = PIECE * score_bytes;
    constexpr bool two_exchanges = dkdv_exchanges() == 2;
    u8* dz_tile = two_exchanges ? a_tile + exchange_bytes : a_tile;
    const Tile tile = read_tile(p.tiles, blockIdx.x);
    const int kv_head = p.first_head / p.group + blockIdx.y;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int block = tile.first / KEYS, valid = min(KEYS, tile.length - tile.first);
    const int piece_count = (tile.length + PIECE - 1) / PIECE, first_piece = tile.first / PIECE;
    // The pairs (query head, piece), heads first; `settle` moves on to a pair that was visited.
    const int head_end = kv_head * p.group + p.group;
    int head_of = kv_head * p.group, piece_of = first_piece;
    auto advance = [&]() {
        if (++piece_of == piece_count) {
            piece_of = first_piece;
            head_of++;
        }
    };
    auto settle = [&]() {
        while (head_of < head_end) {
            bool seen = visible_blocks(min((piece_of + 1) * PIECE, tile.length), p.own_key) > block;
            if (seen && p.first_blocks != nullptr)
                seen = p.first_blocks[(i64)head_of * p.pieces + tile.piece + piece_of] <= block;
            if (seen) break;
            advance();
        }
    };
    auto copy_piece = [&](int stage) {
        i64 token = tile.start + piece_of * PIECE;
        int left = tile.length - piece_of * PIECE;
        copy_tile<PIECE, threads, false>(q_shared + stage * piece_bytes, p.q + token * p.query_stride + head_of * HEAD_DIM,
                                         p.query_stride, left);
        copy_tile<PIECE, threads, false>(g_shared + stage * piece_bytes, p.d_o + token * p.output_stride + head_of * HEAD_DIM,
                                         p.output_stride, left);
    };
    const int row = warp * 16 + g;
    auto read_state = [&](float (&stick)[1][2], float (&sum)[1][2]) {
        i64 entry = (i64)(head_of - p.first_head) * p.entries + first_entry(tile, piece_of) + block;
        bool newest = block + 1 >= visible_blocks(min((piece_of + 1) * PIECE, tile.length), p.own_key);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bool in = piece_of * PIECE + row + 8 * r < tile.length;
            stick[0][r] = !in ? 0.0f : newest ? 1.0f : to_float(p.sticks[(entry + 1) * PIECE + row + 8 * r]);
            sum[0][r] = in ? p.sums[entry * PIECE + row + 8 * r] : 0.0f;
        }
    };

    clear_padding<threads>(shared, 2 * KEYS + 2 * STAGES * PIECE);
    copy_tile<KEYS, threads, true>(k_shared, p.k + (i64)(tile.start + tile.first) * p.key_stride + kv_head * HEAD_DIM,
                                   p.key_stride, valid);
    copy_tile<KEYS, threads, true>(v_shared, p.v + (i64)(tile.start + tile.first) * p.value_stride + kv_head * HEAD_DIM,
                                   p.value_stride, valid);
    settle();
    if (STAGES > 1 && head_of < head_end) copy_piece(0);
    copies_commit();

    float dk[key_tiles][2 * steps][4], dv[key_tiles][2 * steps][4];
#pragma unroll
    for (int i = 0; i < key_tiles; i++)
#pragma unroll
        for (int j = 0; j < 2 * steps; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) dk[i][j][x] = dv[i][j][x] = 0.0f;
    const u32 row_offset = warp * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 k_lane = k_shared + units_first(ROW_BYTES), v_lane = v_shared + units_first(ROW_BYTES);
    const int my_keys = warp % key_warps, my_dims = warp / key_warps;
    const u32 score_offset = my_keys * key_tiles * 32 + units_first(score_bytes);
    const u32 a_lane = shared_address(a_tile) + score_offset, dz_lane = shared_address(dz_tile) + score_offset;
    const u32 dim_offset = my_dims * steps * 32 + rows_first(ROW_BYTES);

    // Where this lane writes register x of a chunk of the warp's 16 rows, for all warps to read.
    const int exchange_lane = row * score_bytes + c * 4;
    auto exchange_at = [](int ch, int x) { return (x & 1) * 8 * score_bytes + (2 * ch + (x >> 1)) * 16; };
    // d += transposed A or dz times rows of dO or Q.
    auto accumulate = [&](float (&d)[key_tiles][2 * steps][4], u32 scores, u32 rows) {
#pragma unroll
        for (int s = 0; s < PIECE / 16; s++) {
            u32 a[key_tiles][4];
#pragma unroll
            for (int i = 0; i < key_tiles; i++) load_matrices_transposed(a[i], scores + s * 16 * score_bytes + i * 32);
            multiply_weights<key_tiles, steps>(d, a, rows + s * 16 * ROW_BYTES);
        }
    };

    int stage = 0;
    float next_stick[1][2], next_sum[1][2];
    // Goes on to the next pair and starts its copies: early, or behind the scores where registers are short there.
    constexpr bool copy_late = HEAD_DIM > 96;
    auto move_on = [&]() {
        advance();
        settle();
        if (head_of >= head_end) return;
        if (STAGES > 1) {
            copy_piece(stage);
            copies_commit();
        }
        read_state(next_stick, next_sum);
    };
    if (head_of < head_end) read_state(next_stick, next_sum);
    while (head_of < head_end) {
        if (STAGES == 1) {
            __syncthreads();
            copy_piece(0);
            copies_commit();
        }
        copies_wait<0>();
        __syncthreads();
        const int first_row = piece_of * PIECE, now = STAGES == 1 ? 0 : stage;
        stage ^= 1;
        float z[1][KEYS / 8][4], dp[1][KEYS / 8][4];
        float stick[1][2] = {{next_stick[0][0], next_stick[0][1]}}, sum[1][2] = {{next_sum[0][0], next_sum[0][1]}};
        if (!copy_late) move_on();
        multiply_rows<1, KEYS>(z, q_shared + now * piece_bytes + row_offset, k_lane);
        if (tile.first + KEYS > first_row + warp * 16 + p.own_key)
            hide_future<1, KEYS>(z, first_row + row, tile.first + c * (KEYS / 4), p.own_key, p.factor);
        multiply_rows<1, KEYS>(dp, g_shared + now * piece_bytes + row_offset, v_lane);
        score_gradients<1>(z, dp, p.factor, stick, sum, [&](int ch, int, int x, float low, float high) {
            *(u32*)(a_tile + exchange_lane + exchange_at(ch, x)) = pack_bf16(low, high);
        });
        u32 dz[KEYS / 16][1][4];
#pragma unroll
        for (int ch = 0; ch < KEYS / 16; ch++) pack_chunk<1>(dz[ch], z, ch);
        auto share_dz = [&]() {
#pragma unroll
            for (int ch = 0; ch < KEYS / 16; ch++)
#pragma unroll
                for (int x = 0; x < 4; x++) *(u32*)(dz_tile + exchange_lane + exchange_at(ch, x)) = dz[ch][0][x];
        };
        if (copy_late) move_on();
        if (two_exchanges) share_dz();
        __syncthreads();
        accumulate(dv, a_lane, g_shared + now * piece_bytes + dim_offset);
        if (!two_exchanges) {
            __syncthreads();
            share_dz();
            __syncthreads();
        }
        accumulate(dk, dz_lane, q_shared + now * piece_bytes + dim_offset);
    }
    copies_wait<0>();
    __syncthreads();
    // K and V are done with: their tiles, in the same order of keys, take dK and dV.
    u8* own = shared + my_keys * key_tiles * 16 * ROW_BYTES + my_dims * steps * 32;
    store_fragments(own, dk, p.scale, ROW_BYTES);
    store_fragments(own + TILE_BYTES, dv, 1.0f, ROW_BYTES);
    __syncthreads();
    const i64 stride = (i64)(p.heads / p.group) * HEAD_DIM, to = (tile.start + tile.first) * stride + kv_head * HEAD_DIM;
    write_tile<KEYS, threads, true>(p.dk + to, stride, valid, shared, threadIdx.x);
    write_tile<KEYS, threads, true>(p.dv + to, stride, valid, shared + TILE_BYTES, threadIdx.x);
}

// ------------------------------------------------------------------------------------------------ entry points

#define FORWARD_PARAMETERS                                                                                              \
    const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *rem, float *log2_rem, Stick *sticks, int *first_blocks, \
        const int *tiles, int query_stride, int key_stride, int value_stride, int output_stride, int heads, int group,   \
        int first_head, int entries, int pieces, int own_key, float factor, float threshold
#define FORWARD_ARGUMENTS                                                                                               \
    {q, k, v, o, rem, log2_rem, sticks, first_blocks, tiles, query_stride, key_stride, value_stride, output_stride,      \
     heads, group, first_head, entries, pieces, own_key, factor, threshold}
#define BACKWARD_PARAMETERS                                                                                             \
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float *drem, const Stick *sticks, float *sums,   \
        const int *first_blocks, bf16 *dq, bf16 *dk, bf16 *dv, const int *tiles, int query_stride, int key_stride,       \
        int value_stride, int output_stride, int heads, int group, int first_head, int entries, int pieces, int own_key, \
        float factor, float scale
#define BACKWARD_ARGUMENTS                                                                                              \
    {q, k, v, d_o, drem, sticks, sums, first_blocks, dq, dk, dv, tiles, query_stride, key_stride, value_stride,          \
     output_stride, heads, group, first_head, entries, pieces, own_key, factor, scale}

extern "C" __global__ void __launch_bounds__(FORWARD_WARPS * 32, FORWARD_BLOCKS) stick_breaking_forward_bf16(FORWARD_PARAMETERS) {
    forward<true, false, FORWARD_WARPS, FORWARD_ROW_TILES, FORWARD_KEYS>(FORWARD_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(FORWARD_WARPS * FORWARD_ROW_TILES * 32, 1) stick_breaking_forward_log_bf16(FORWARD_PARAMETERS) {
    forward<true, true, FORWARD_WARPS * FORWARD_ROW_TILES, 1, FORWARD_KEYS>(FORWARD_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(FORWARD_WARPS * 32, STICKS_BLOCKS) stick_breaking_sticks_bf16(FORWARD_PARAMETERS) {
    forward<false, false, FORWARD_WARPS, FORWARD_ROW_TILES, KEYS>(FORWARD_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(DQ_WARPS * 32, DQ_BLOCKS) stick_breaking_backward_dq_bf16(BACKWARD_PARAMETERS) {
    backward_dq<DQ_WARPS, DQ_ROW_TILES>(BACKWARD_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, DKDV_BLOCKS) stick_breaking_backward_dkdv_bf16(BACKWARD_PARAMETERS) {
    backward_dkdv(BACKWARD_ARGUMENTS);
}
