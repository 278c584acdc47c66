// Causal softmax attention on tensor cores (mma.sync, sm_80 and later), bf16 with float accumulation.
// Formulas: src/attention/softmax/mod.rs. Tiled as in FlashAttention-2 (Dao, arXiv 2307.08691).
//
// Reads   q, o, d_o [tokens, heads, HEAD_DIM], k, v [tokens, kv_heads, HEAD_DIM] in bf16 with token strides (multiples of
//         8, addresses multiples of 16), slopes [heads] or null (ALiBi); tile lists of int4 {first token of the document,
//         its length, the tile's first row in it, 0}, of FORWARD_ROWS and DQ_ROWS queries and of DKV_KEYS keys.
// Writes  forward: o, lse [tokens, heads] (natural logarithm, float). backward: means D_i = do_i . o_i [tokens, heads],
//         dq [tokens, heads, HEAD_DIM], dk and dv [tokens, kv_heads, HEAD_DIM], contiguous.
// Keeps   lse, for the backward pass.
// Rounds  the weights A and dz to bf16, as operands of products, and the outputs, once. Everything else is float.
//
// Passes  forward  one block per query tile and head; keys from the newest block down, so that only the first blocks are masked.
//         means    D, which both gradient passes read.
//         dq       one block per query tile and head.
//         dkv      one block per key tile and key head, over all later queries of all heads of the group. It computes the
//                  scores transposed (keys are rows): weights and dz are then left operands of the products for dv and dk
//                  as they lie in registers.
// Nothing is added up through memory: each output is written once, in a fixed order.
//
// Launch  4 warps per block (means: 8), grid (tiles, heads) or (tiles, kv_heads, DKV_PARTS), dynamic shared memory as
//         src/attention/softmax/cuda.rs computes from the same constants.

// Row tiles (of 16) per warp and the length of a block of keys (queries in dkv). The accumulators and scores of a warp are
// to fit in 255 registers per thread: 32 rows where they do, because each matrix that is loaded from shared memory is
// then used twice.
constexpr int WARPS = 4, THREADS = 128;
constexpr int FORWARD_ROW_TILES = HEAD_DIM > 128 ? 1 : 2, FORWARD_KEYS = HEAD_DIM > 112 && HEAD_DIM <= 128 ? 32 : 64;
constexpr int DQ_ROW_TILES = HEAD_DIM > 128 ? 1 : 2, DQ_KEYS = HEAD_DIM > 64 ? 32 : HEAD_DIM > 48 ? 48 : 64;
constexpr int DKV_ROW_TILES = HEAD_DIM > 64 ? 1 : 2, DKV_QUERIES = HEAD_DIM > 64 && HEAD_DIM <= 128 ? 64 : 32;
constexpr int FORWARD_ROWS = WARPS * 16 * FORWARD_ROW_TILES, DQ_ROWS = WARPS * 16 * DQ_ROW_TILES,
              DKV_KEYS = WARPS * 16 * DKV_ROW_TILES;
// Above 128 dimensions dk and dv do not fit in registers together: blocks of their own compute them.
constexpr int DKV_PARTS = HEAD_DIM > 128 ? 2 : 1;
// Blocks per multiprocessor that registers are to leave room for.
constexpr int BLOCKS = 2;

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

struct Tile {
    int start, length, first;
};
DEVICE Tile read_tile(const int4* tiles, int index) {
    int4 tile = tiles[index];
    return {tile.x, tile.y, tile.z};
}

// `d` is the lane's query - key at accumulator (0, 0, 0). Where rows are queries it grows by 16 i + 8 (x >> 1) and shrinks by
// 8 j + (x & 1); where they are keys, the other way round.
template <bool query_rows> DEVICE int behind(int d, int i, int j, int x) {
    int row = 16 * i + 8 * (x >> 1), column = 8 * j + (x & 1);
    return query_rows ? d + row - column : d + column - row;
}
template <bool query_rows, int row_tiles, int column_tiles>
DEVICE void hide_future(float (&z)[row_tiles][column_tiles][4], int d) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < column_tiles; j++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                if (behind<query_rows>(d, i, j, x) < 0) z[i][j][x] = -INFINITY_F;
}

// Scores scaled in place, with their position bias: for ALiBi, and for a scale that is not positive (whose maximum is not
// that of q . k). All in units of log2.
template <bool query_rows, int row_tiles, int column_tiles>
DEVICE void scale_scores(float (&z)[row_tiles][column_tiles][4], float factor, const float* slopes, int head, int d) {
    const float slope = slopes != nullptr ? slopes[head] * LOG2_E : 0.0f;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < column_tiles; j++)
#pragma unroll
            for (int x = 0; x < 4; x++)
                z[i][j][x] = fmaf(-slope, (float)behind<query_rows>(d, i, j, x), z[i][j][x] * factor);
}

template <int row_tiles, int column_tiles> DEVICE void clear(float (&d)[row_tiles][column_tiles][4]) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < column_tiles; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) d[i][j][x] = 0.0f;
}

// Columns 16 step .. 16 step + 15 of accumulators, as a left operand.
template <int row_tiles, int column_tiles>
DEVICE void pack_operand(u32 (&a)[row_tiles][4], const float (&d)[row_tiles][column_tiles][4], int step) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const float* pair = &d[i][2 * step + (x >> 1)][2 * (x & 1)];
            a[i][x] = pack_bf16(pair[0], pair[1]);
        }
}

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

extern __shared__ __align__(128) u8 shared_memory[];

// ------------------------------------------------------------------------------------------------ forward

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_forward_bf16(const bf16* q, const bf16* k, const bf16* v, const float* slopes, bf16* o, float* lse, const int4* tiles,
                     int heads, int group, int query_stride, int key_stride, int value_stride, int output_stride,
                     float factor) {
    constexpr int rows = FORWARD_ROWS, keys = FORWARD_KEYS, row_tiles = FORWARD_ROW_TILES, column_tiles = keys / 8;
    const int head = blockIdx.y, kv_head = head / group;
    // Late tiles are the longest: they go first.
    const Tile tile = read_tile(tiles, gridDim.x - 1 - blockIdx.x);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int valid = min(rows, tile.length - tile.first), blocks = (tile.first + valid + keys - 1) / keys;
    const int warp_row = tile.first + warp * row_tiles * 16;
    const u32 q_shared = shared_address(shared_memory), k_shared = q_shared + rows * ROW_BYTES,
              v_shared = k_shared + keys * ROW_BYTES;
    k += (i64)tile.start * key_stride + kv_head * HEAD_DIM;
    v += (i64)tile.start * value_stride + kv_head * HEAD_DIM;

    clear_padding<THREADS>(shared_memory, rows + 2 * keys);
    copy_tile<rows, THREADS, false>(q_shared, q + (i64)(tile.start + tile.first) * query_stride + head * HEAD_DIM,
                                    query_stride, valid);
    copy_tile<keys, THREADS, false>(k_shared, k + (i64)(blocks - 1) * keys * key_stride, key_stride,
                                    tile.length - (blocks - 1) * keys);
    copies_commit();
    const bool biased = slopes != nullptr || !(factor > 0.0f);
    const float unit = biased ? 1.0f : factor;
    const u32 q_lane = q_shared + warp * row_tiles * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 k_lane = k_shared + units_first(ROW_BYTES), v_lane = v_shared + rows_first(ROW_BYTES);

    // Weights are relative to 2^(unit * origin), near the largest score of the row so far. They may exceed it by 2^8 before
    // the origin is raised and the sums are rescaled, which happens to few blocks but the first. The start is below any
    // score but finite: a row that sees nothing of its first block would meet infinity - infinity.
    float sums[row_tiles][2 * DIM_STEPS][4], origin[row_tiles][2], total[row_tiles][2];
    clear(sums);
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) origin[i][r] = -1e30f, total[i][r] = 0.0f;

    for (int b = blocks - 1; b >= 0; b--) {
        // The keys have come, and all warps are done with the values of the block before.
        copies_wait<0>();
        __syncthreads();
        copy_tile<keys, THREADS, false>(v_shared, v + (i64)b * keys * value_stride, value_stride, tile.length - b * keys);
        copies_commit();
        // Whether the warp's last row sees the block's first key.
        const bool seen = b * keys < warp_row + row_tiles * 16;
        float z[row_tiles][column_tiles][4];
        if (seen) multiply_rows<row_tiles, keys>(z, q_lane, k_lane);
        copies_wait<0>();
        __syncthreads();
        if (b > 0) {
            copy_tile<keys, THREADS, false>(k_shared, k + (i64)(b - 1) * keys * key_stride, key_stride, keys);
            copies_commit();
        }
        if (!seen) continue;
        const int d = warp_row + g - b * keys - 2 * c;
        if (biased) scale_scores<true>(z, factor, slopes, head, d);
        if ((b + 1) * keys > warp_row + 1) hide_future<true>(z, d);
        float most[row_tiles][2];
        bool raise = false;
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[i][r] = z[i][0][2 * r];
#pragma unroll
                for (int j = 0; j < column_tiles; j++) {
                    most[i][r] = fmaxf(most[i][r], z[i][j][2 * r]);
                    most[i][r] = fmaxf(most[i][r], z[i][j][2 * r + 1]);
                }
                raise |= (most[i][r] - origin[i][r]) * unit > 8.0f;
            }
        if (__any_sync(FULL_MASK, raise)) {
#pragma unroll
            for (int i = 0; i < row_tiles; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float higher = fmaxf(origin[i][r], quad_max(most[i][r]));
                    const float shrink = exp2_approx((origin[i][r] - higher) * unit);
                    origin[i][r] = higher;
                    total[i][r] *= shrink;
#pragma unroll
                    for (int j = 0; j < 2 * DIM_STEPS; j++) sums[i][j][2 * r] *= shrink, sums[i][j][2 * r + 1] *= shrink;
                }
        }
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float shift = origin[i][r] * unit;
                // This lane's share of the row; the quad's are added up at the end.
#pragma unroll
                for (int j = 0; j < column_tiles; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& x = z[i][j][2 * r + e];
                        x = exp2_approx(fmaf(x, unit, -shift));
                        total[i][r] += x;
                    }
            }
#pragma unroll
        for (int step = 0; step < keys / 16; step++) {
            u32 weights[row_tiles][4];
            pack_operand(weights, z, step);
            multiply_weights<row_tiles, DIM_STEPS>(sums, weights, v_lane + step * 16 * ROW_BYTES);
        }
    }
    if (warp_row >= tile.length) return;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float sum = quad_sum(total[i][r]), inverse = 1.0f / sum;
            const int row = warp_row + g + 16 * i + 8 * r;
            if (c == 0 && row < tile.length)
                lse[(i64)(tile.start + row) * heads + head] = (origin[i][r] * unit + log2f(sum)) * LN_2;
#pragma unroll
            for (int j = 0; j < 2 * DIM_STEPS; j++) sums[i][j][2 * r] *= inverse, sums[i][j][2 * r + 1] *= inverse;
        }
    // The warp's own rows of the query tile are free now; no other warp reads them.
    u8* own = shared_memory + warp * row_tiles * 16 * ROW_BYTES;
    __syncwarp();
    store_fragments(own, sums, 1.0f, ROW_BYTES);
    __syncwarp();
    write_tile<row_tiles * 16, 32, false>(o + (i64)(tile.start + warp_row) * output_stride + head * HEAD_DIM, output_stride,
                                          tile.length - warp_row, own, lane);
}

// ------------------------------------------------------------------------------------------------ backward

// D of every token and head: a few lanes per row, 256 threads.
extern "C" __global__ void __launch_bounds__(256)
softmax_means_bf16(const bf16* o, const bf16* d_o, float* means, i64 rows, int heads, int output_stride) {
    constexpr int lanes = next_power_of_two(ROW_UNITS);
    const int unit = threadIdx.x % lanes;
    const i64 row = (i64)blockIdx.x * (256 / lanes) + threadIdx.x / lanes;
    float sum = 0.0f;
    if (row < rows && unit < ROW_UNITS) {
        const i64 at = row / heads * output_stride + row % heads * HEAD_DIM + unit * 8;
        float a[8], b[8];
        load_vector(o + at, a);
        load_vector(d_o + at, b);
#pragma unroll
        for (int x = 0; x < 8; x++) sum = fmaf(a[x], b[x], sum);
    }
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, offset);
    if (row < rows && unit == 0) means[row] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_dq_bf16(const bf16* q, const bf16* k, const bf16* v, const float* slopes, const float* lse, const float* means,
                const bf16* d_o, bf16* dq, const int4* tiles, int heads, int group, int query_stride, int key_stride,
                int value_stride, int output_stride, float factor, float scale) {
    constexpr int rows = DQ_ROWS, keys = DQ_KEYS, row_tiles = DQ_ROW_TILES, column_tiles = keys / 8;
    constexpr int stage_bytes = 2 * keys * ROW_BYTES;
    const int head = blockIdx.y, kv_head = head / group;
    const Tile tile = read_tile(tiles, gridDim.x - 1 - blockIdx.x);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int valid = min(rows, tile.length - tile.first), blocks = (tile.first + valid + keys - 1) / keys;
    const int warp_row = tile.first + warp * row_tiles * 16;
    const u32 q_shared = shared_address(shared_memory), g_shared = q_shared + rows * ROW_BYTES,
              k_shared = g_shared + rows * ROW_BYTES;
    k += (i64)tile.start * key_stride + kv_head * HEAD_DIM;
    v += (i64)tile.start * value_stride + kv_head * HEAD_DIM;
    auto copy_block = [&](int b) {
        const u32 to = k_shared + (b & 1) * stage_bytes;
        copy_tile<keys, THREADS, false>(to, k + (i64)b * keys * key_stride, key_stride, tile.length - b * keys);
        copy_tile<keys, THREADS, false>(to + keys * ROW_BYTES, v + (i64)b * keys * value_stride, value_stride,
                                        tile.length - b * keys);
        copies_commit();
    };

    clear_padding<THREADS>(shared_memory, 2 * rows + 4 * keys);
    const i64 first_token = tile.start + tile.first;
    copy_tile<rows, THREADS, false>(q_shared, q + first_token * query_stride + head * HEAD_DIM, query_stride, valid);
    copy_tile<rows, THREADS, false>(g_shared, d_o + first_token * output_stride + head * HEAD_DIM, output_stride, valid);
    copy_block(0);
    const bool biased = slopes != nullptr || !(factor > 0.0f);
    const float unit = biased ? 1.0f : factor;
    float sums[row_tiles][2 * DIM_STEPS][4], shift[row_tiles][2], mean[row_tiles][2];
    clear(sums);
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = warp_row + g + 16 * i + 8 * r;
            const bool exists = row < tile.length;
            const i64 at = (i64)(tile.start + row) * heads + head;
            // Rows that do not exist get no weight.
            shift[i][r] = exists ? lse[at] * LOG2_E : INFINITY_F;
            mean[i][r] = exists ? means[at] : 0.0f;
        }
    const u32 warp_offset = warp * row_tiles * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 q_lane = q_shared + warp_offset, g_lane = g_shared + warp_offset;
    const u32 k_lane = k_shared + units_first(ROW_BYTES), k_rows = k_shared + rows_first(ROW_BYTES);

    for (int b = 0; b < blocks; b++) {
        copies_wait<0>();
        __syncthreads();
        if (b + 1 < blocks) copy_block(b + 1);
        if (b * keys >= warp_row + row_tiles * 16) continue;
        const u32 stage = (b & 1) * stage_bytes;
        float z[row_tiles][column_tiles][4], dz[row_tiles][column_tiles][4];
        multiply_rows<row_tiles, keys>(z, q_lane, k_lane + stage);
        const int d = warp_row + g - b * keys - 2 * c;
        if (biased) scale_scores<true>(z, factor, slopes, head, d);
        if ((b + 1) * keys > warp_row + 1) hide_future<true>(z, d);
        multiply_rows<row_tiles, keys>(dz, g_lane, k_lane + stage + keys * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < row_tiles; i++)
#pragma unroll
            for (int j = 0; j < column_tiles; j++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const float weight = exp2_approx(fmaf(z[i][j][x], unit, -shift[i][x >> 1]));
                    dz[i][j][x] = weight * (dz[i][j][x] - mean[i][x >> 1]);
                }
#pragma unroll
        for (int step = 0; step < keys / 16; step++) {
            u32 left[row_tiles][4];
            pack_operand(left, dz, step);
            multiply_weights<row_tiles, DIM_STEPS>(sums, left, k_rows + stage + step * 16 * ROW_BYTES);
        }
    }
    if (warp_row >= tile.length) return;
    u8* own = shared_memory + warp * row_tiles * 16 * ROW_BYTES;
    __syncwarp();
    store_fragments(own, sums, scale, ROW_BYTES);
    __syncwarp();
    write_tile<row_tiles * 16, 32, false>(dq + ((i64)(tile.start + warp_row) * heads + head) * HEAD_DIM,
                                          (i64)heads * HEAD_DIM, tile.length - warp_row, own, lane);
}

struct KeyGradients {
    const bf16 *q, *k, *v, *d_o;
    const float *slopes, *lse, *means;
    bf16 *dk, *dv;
    const int4* tiles;
    int heads, group, query_stride, key_stride, value_stride, output_stride;
    float factor, scale;
};

template <bool want_dk, bool want_dv> DEVICE void key_gradients(const KeyGradients& p) {
    constexpr int keys = DKV_KEYS, queries = DKV_QUERIES, row_tiles = DKV_ROW_TILES, column_tiles = queries / 8;
    constexpr int stage_bytes = 2 * queries * ROW_BYTES;
    // The first tiles have the most queries before them: they go first.
    const Tile tile = read_tile(p.tiles, blockIdx.x);
    const int kv_head = blockIdx.y;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
    const int valid = min(keys, tile.length - tile.first), warp_key = tile.first + warp * row_tiles * 16;
    const u32 k_shared = shared_address(shared_memory), v_shared = k_shared + keys * ROW_BYTES,
              q_shared = v_shared + keys * ROW_BYTES;
    // [stage][logsumexp in log2, mean][query]
    float* rows = (float*)(shared_memory + 2 * keys * ROW_BYTES + 2 * stage_bytes);

    // Blocks of queries first_block .. end_block of each head of the group, one after another.
    const int first_block = tile.first / queries, end_block = (tile.length + queries - 1) / queries;
    const int first_head = kv_head * p.group, end_head = first_head + p.group;
    auto copy_block = [&](int head, int block, int stage) {
        const i64 token = tile.start + block * queries;
        const int left = tile.length - block * queries;
        const u32 to = q_shared + stage * stage_bytes;
        copy_tile<queries, THREADS, false>(to, p.q + token * p.query_stride + head * HEAD_DIM, p.query_stride, left);
        copy_tile<queries, THREADS, false>(to + queries * ROW_BYTES, p.d_o + token * p.output_stride + head * HEAD_DIM,
                                           p.output_stride, left);
        copies_commit();
    };
    auto read_row = [&](int head, int block, float& shift, float& mean) {
        const int row = block * queries + threadIdx.x;
        if (threadIdx.x >= queries) return;
        const bool exists = row < tile.length;
        const i64 at = (i64)(tile.start + row) * p.heads + head;
        // Rows that do not exist get no weight.
        shift = exists ? p.lse[at] * LOG2_E : INFINITY_F;
        mean = exists ? p.means[at] : 0.0f;
    };
    auto keep_row = [&](int stage, float shift, float mean) {
        if (threadIdx.x >= queries) return;
        rows[stage * 2 * queries + threadIdx.x] = shift;
        rows[(stage * 2 + 1) * queries + threadIdx.x] = mean;
    };

    clear_padding<THREADS>(shared_memory, 2 * keys + 4 * queries);
    copy_tile<keys, THREADS, false>(k_shared, p.k + (i64)(tile.start + tile.first) * p.key_stride + kv_head * HEAD_DIM,
                                    p.key_stride, valid);
    copy_tile<keys, THREADS, false>(v_shared, p.v + (i64)(tile.start + tile.first) * p.value_stride + kv_head * HEAD_DIM,
                                    p.value_stride, valid);
    copy_block(first_head, first_block, 0);
    float next_shift = 0.0f, next_mean = 0.0f;
    read_row(first_head, first_block, next_shift, next_mean);
    keep_row(0, next_shift, next_mean);

    const bool biased = p.slopes != nullptr || !(p.factor > 0.0f);
    const float unit = biased ? 1.0f : p.factor;
    float dk[row_tiles][2 * DIM_STEPS][4], dv[row_tiles][2 * DIM_STEPS][4];
    clear(dk);
    clear(dv);
    const u32 warp_offset = warp * row_tiles * 16 * ROW_BYTES + rows_first(ROW_BYTES);
    const u32 k_lane = k_shared + warp_offset, v_lane = v_shared + warp_offset;
    const u32 q_lane = q_shared + units_first(ROW_BYTES), q_rows = q_shared + rows_first(ROW_BYTES);

    int stage = 0;
    for (int head = first_head, block = first_block; head < end_head;) {
        copies_wait<0>();
        __syncthreads();
        const int now_head = head, now = block, now_stage = stage;
        if (++block == end_block) block = first_block, head++;
        stage ^= 1;
        if (head < end_head) {
            copy_block(head, block, stage);
            read_row(head, block, next_shift, next_mean);
        }
        // Whether the block's last query sees the warp's first key.
        if ((now + 1) * queries > warp_key) {
            const u32 offset = now_stage * stage_bytes;
            float z[row_tiles][column_tiles][4], dz[row_tiles][column_tiles][4];
            multiply_rows<row_tiles, queries>(z, k_lane, q_lane + offset);
            const int d = now * queries + 2 * c - warp_key - g;
            if (biased) scale_scores<false>(z, p.factor, p.slopes, now_head, d);
            if (now * queries < warp_key + row_tiles * 16 - 1) hide_future<false>(z, d);
            if (want_dk) multiply_rows<row_tiles, queries>(dz, v_lane, q_lane + offset + queries * ROW_BYTES);
            const float* shifts = rows + now_stage * 2 * queries + 2 * c;
#pragma unroll
            for (int j = 0; j < column_tiles; j++) {
                const float2 shift = *(const float2*)(shifts + 8 * j), mean = *(const float2*)(shifts + queries + 8 * j);
#pragma unroll
                for (int i = 0; i < row_tiles; i++)
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        z[i][j][x] = exp2_approx(fmaf(z[i][j][x], unit, x & 1 ? -shift.y : -shift.x));
                        if (want_dk) dz[i][j][x] = z[i][j][x] * (dz[i][j][x] - (x & 1 ? mean.y : mean.x));
                    }
            }
#pragma unroll
            for (int step = 0; step < queries / 16; step++) {
                const u32 at = q_rows + offset + step * 16 * ROW_BYTES;
                u32 left[row_tiles][4];
                if (want_dv) {
                    pack_operand(left, z, step);
                    multiply_weights<row_tiles, DIM_STEPS>(dv, left, at + queries * ROW_BYTES);
                }
                if (want_dk) {
                    pack_operand(left, dz, step);
                    multiply_weights<row_tiles, DIM_STEPS>(dk, left, at);
                }
            }
        }
        // The other stage's rows were last read before the barrier above.
        if (head < end_head) keep_row(stage, next_shift, next_mean);
    }
    if (warp_key >= tile.length) return;
    // A warp's own rows of the key and value tiles take the gradients; no other warp reads them.
    u8* own = shared_memory + warp * row_tiles * 16 * ROW_BYTES;
    __syncwarp();
    if (want_dk) store_fragments(own, dk, p.scale, ROW_BYTES);
    if (want_dv) store_fragments(own + keys * ROW_BYTES, dv, 1.0f, ROW_BYTES);
    __syncwarp();
    const i64 stride = (i64)(p.heads / p.group) * HEAD_DIM, to = (tile.start + warp_key) * stride + kv_head * HEAD_DIM;
    if (want_dk) write_tile<row_tiles * 16, 32, false>(p.dk + to, stride, tile.length - warp_key, own, lane);
    if (want_dv)
        write_tile<row_tiles * 16, 32, false>(p.dv + to, stride, tile.length - warp_key, own + keys * ROW_BYTES, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_dkv_bf16(const bf16* q, const bf16* k, const bf16* v, const float* slopes, const float* lse, const float* means,
                 const bf16* d_o, bf16* dk, bf16* dv, const int4* tiles, int heads, int group, int query_stride,
                 int key_stride, int value_stride, int output_stride, float factor, float scale) {
    const KeyGradients p = {q,  k,     v,     d_o,   slopes,       lse,        means,        dk,            dv,
                            tiles, heads, group, query_stride, key_stride, value_stride, output_stride, factor, scale};
    if (DKV_PARTS == 1) {
        key_gradients<true, true>(p);
    } else if (blockIdx.z == 0) {
        key_gradients<true, false>(p);
    } else {
        key_gradients<false, true>(p);
    }
}
