// Stick-breaking and softmax attention in float32, forward and backward: plain FMA arithmetic (no tf32), for checks and
// for small float32 training. Formulas: src/attention/{stick_breaking,softmax}/mod.rs.
//
// Reads   q, o, d_o [tokens, heads, head_dim], k, v [tokens, kv_heads, head_dim] with token strides; `tiles`, one int4
//         per tile of TILE tokens of a document, in order: {first token of the document, its length, number of the tile
//         in it, where its state begins (in key tiles, counted from the first tile of its chunk)}.
// Writes  forward: o, and rem, log2_rem (or lse) [tokens, heads]; backward: dq [tokens, heads, head_dim], dk and dv
//         [tokens, kv_heads, head_dim], contiguous. dk and dv are added to where `add` is set.
// Keeps   stick-breaking: first_key_tiles [heads, tiles], the oldest key tile that was visited (early exit). From the dq
//         kernel to the dkv kernel: the stick before (newer than) each key tile and the sum over older keys,
//         [heads, pairs of a query tile and a key tile, TILE] each, for the query tiles of one chunk. Softmax: D [tokens, heads].
// Accumulates in float32 (the logarithm of the remainder in float64, once per tile). Nothing is rounded.
// Launch  256 threads, grid (tiles, heads) or (tiles, kv_heads), dynamic shared memory SHARED_*.
//
// A block holds a TILE x TILE square of scores: thread (ty, tx) has the queries ty * ROWS + r and the keys tx * ROWS + j,
// so that a row lies in 16 neighbouring lanes, keys in order, and a scan along it is 4 shuffles. In shared memory the key
// tx * ROWS + j is row j * 16 + tx: 16-byte reads of 16 lanes then meet no bank twice.
//
// -DWIDTH: head_dim rounded up to 32, 64, 128 or 256.

#ifndef WIDTH
#define WIDTH 64
#endif
#if WIDTH <= 64
#define ROWS 4
#elif WIDTH <= 128
#define ROWS 2
#else
#define ROWS 1
#endif
#define TILE (16 * ROWS)
#define PITCH (WIDTH + 4)
#define SCORE_PITCH (TILE + 4)
#define COLUMNS (WIDTH / 16)
#define GROUP (COLUMNS < 4 ? COLUMNS : 4)

extern __shared__ float4 shared_memory[];

struct Thread {
    int tx, ty;
};
DEVICE Thread thread() { return {(int)threadIdx.x & 15, (int)threadIdx.x >> 4}; }

// ------------------------------------------------------------------------------------------------ tiles

// Shared-memory row of a tile's key.
DEVICE int key_slot(int key) { return key % ROWS * 16 + key / ROWS; }

// Copies the rows first .. first + TILE of one head to shared memory; zeros beyond `length` and beyond head_dim.
template <bool KEYS>
DEVICE void load_tile(float* to, const float* from, i64 stride, int first, int length, int head_dim, bool vectors) {
    for (int i = threadIdx.x; i < TILE * (WIDTH / 4); i += 256) {
        int row = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + row < length) {
            const float* p = from + (first + row) * stride + column;
            if (vectors) {
                if (column < head_dim) x = *(const float4*)p;
            } else {
                if (column < head_dim) x.x = p[0];
                if (column + 1 < head_dim) x.y = p[1];
                if (column + 2 < head_dim) x.z = p[2];
                if (column + 3 < head_dim) x.w = p[3];
            }
        }
        *(float4*)(to + (KEYS ? key_slot(row) : row) * PITCH + column) = x;
    }
}

// z[r][j] = query (ty * ROWS + r) . key (tx * ROWS + j)
DEVICE void scores(float (&z)[ROWS][ROWS], const float* queries, const float* keys, int head_dim) {
    Thread t = thread();
    queries += t.ty * ROWS * PITCH;
    keys += t.tx * PITCH;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < ROWS; j++) z[r][j] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < head_dim; d += 4) {
        float4 x[ROWS], y[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            x[r] = *(const float4*)(queries + r * PITCH + d);
            y[r] = *(const float4*)(keys + r * 16 * PITCH + d);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                z[r][j] = fmaf(x[r].x, y[j].x, z[r][j]);
                z[r][j] = fmaf(x[r].y, y[j].y, z[r][j]);
                z[r][j] = fmaf(x[r].z, y[j].z, z[r][j]);
                z[r][j] = fmaf(x[r].w, y[j].w, z[r][j]);
            }
    }
}

// The head dim of a thread's column c: GROUP neighbours, then the next 16 * GROUP.
DEVICE int column_of(int c) { return c / GROUP * 16 * GROUP + thread().tx * GROUP + c % GROUP; }

DEVICE void load_columns(float (&x)[COLUMNS], const float* row) {
    row += thread().tx * GROUP;
#if WIDTH == 32
    float2 v = *(const float2*)row;
    x[0] = v.x; x[1] = v.y;
#else
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 4) {
        float4 v = *(const float4*)(row + c * 16);
        x[c] = v.x; x[c + 1] = v.y; x[c + 2] = v.z; x[c + 3] = v.w;
    }
#endif
}

DEVICE void clear(float (&sums)[ROWS][COLUMNS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = 0.0f;
}

// The square of weights, [query][key].
DEVICE void store_weights(float* weights, const float (&x)[ROWS][ROWS]) {
    Thread t = thread();
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < ROWS; j++) weights[(t.ty * ROWS + r) * SCORE_PITCH + t.tx * ROWS + j] = x[r][j];
}

// sums[r] += sum over the tile's keys of weights[query ty * ROWS + r][key] * row of the key
DEVICE void add_keys(float (&sums)[ROWS][COLUMNS], const float* weights, const float* keys) {
    weights += thread().ty * ROWS * SCORE_PITCH;
    for (int key = 0; key < TILE; key += 4) {
        float w[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) load_vector(weights + r * SCORE_PITCH + key, w[r]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x[COLUMNS];
            load_columns(x, keys + key_slot(key + i) * PITCH);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) sums[r][c] = fmaf(w[r][i], x[c], sums[r][c]);
        }
    }
}

// sums[r] += sum over the tile's queries of weights[query][key ty * ROWS + r] * row of the query
DEVICE void add_queries(float (&sums)[ROWS][COLUMNS], const float* weights, const float* queries) {
    weights += thread().ty * ROWS;
#pragma unroll 4
    for (int query = 0; query < TILE; query++) {
        float w[ROWS], x[COLUMNS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) w[r] = weights[query * SCORE_PITCH + r];
        load_columns(x, queries + query * PITCH);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = fmaf(w[r], x[c], sums[r][c]);
    }
}

// Writes factor[r] * sums[r] to the rows first + ty * ROWS + r of one head, or adds it to them.
DEVICE void write_rows(float* to, i64 stride, int first, int length, int head_dim, const float (&sums)[ROWS][COLUMNS],
                       const float (&factor)[ROWS], bool add) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = first + thread().ty * ROWS + r;
        if (row >= length) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            int column = column_of(c);
            if (column >= head_dim) continue;
            float* p = to + row * stride + column;
            *p = add ? *p + sums[r][c] * factor[r] : sums[r][c] * factor[r];
        }
    }
}

// ------------------------------------------------------------------------------------------------ rows of 16 lanes

// Product of x over the lanes with newer keys; `total` becomes the product over all.
DEVICE float newer_product(float x, float& total) {
    int tx = thread().tx;
#pragma unroll
    for (int distance = 1; distance < 16; distance <<= 1) {
        float y = __shfl_down_sync(FULL_MASK, x, distance, 16);
        if (tx + distance < 16) x *= y;
    }
    total = __shfl_sync(FULL_MASK, x, 0, 16);
    float newer = __shfl_down_sync(FULL_MASK, x, 1, 16);
    return tx == 15 ? 1.0f : newer;
}

// Sum of x over the lanes with older keys; `total` becomes the sum over all.
DEVICE float older_sum(float x, float& total) {
    int tx = thread().tx;
#pragma unroll
    for (int distance = 1; distance < 16; distance <<= 1) {
        float y = __shfl_up_sync(FULL_MASK, x, distance, 16);
        if (tx >= distance) x += y;
    }
    total = __shfl_sync(FULL_MASK, x, 15, 16);
    float older = __shfl_up_sync(FULL_MASK, x, 1, 16);
    return tx == 0 ? 0.0f : older;
}

DEVICE float row_sum(float x) {
#pragma unroll
    for (int offset = 8; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}
DEVICE float row_max(float x) {
#pragma unroll
    for (int offset = 8; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// ------------------------------------------------------------------------------------------------ stick-breaking

// beta = sigmoid(z) and keep = 1 - beta = sigmoid(-z), neither by a subtraction: saturated scores lose nothing.
DEVICE void split_stick(float z, float& beta, float& keep) {
    float e = expf(-fabsf(z));
    float large = 1.0f / (1.0f + e), small = e * large;
    beta = z >= 0.0f ? large : small;
    keep = z >= 0.0f ? small : large;
}

// Key tiles that the rows of a query tile see.
DEVICE int key_tiles_of(int first_row, int length, int own_key) {
    int end = first_row + TILE < length ? first_row + TILE : length;
    return (end - 1 + own_key + TILE - 1) / TILE;
}

// From scores to weights: x becomes A, and `stick` what the keys leave of it. `visible`: keys of this tile that row 0 of
// the thread sees; the next rows see one more each.
DEVICE void break_stick(float (&x)[ROWS][ROWS], float (&beta)[ROWS][ROWS], float (&keep)[ROWS][ROWS], float (&stick)[ROWS],
                        float scale, int visible) {
    int first_key = thread().tx * ROWS;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float left = 1.0f;
#pragma unroll
        for (int j = ROWS - 1; j >= 0; j--) {
            split_stick(scale * x[r][j], beta[r][j], keep[r][j]);
            if (first_key + j >= visible + r) beta[r][j] = 0.0f, keep[r][j] = 1.0f;
            x[r][j] = beta[r][j] * left;
            left *= keep[r][j];
        }
        float total;
        float before = newer_product(left, total) * stick[r];
#pragma unroll
        for (int j = 0; j < ROWS; j++) x[r][j] *= before;
        stick[r] *= total;
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
stick_breaking_forward_f32(const float* q, const float* k, const float* v, float* o, float* rem, float* log2_rem,
                           u32* first_key_tiles, const int4* tiles, int heads, int kv_heads, int head_dim,
                           int query_stride, int key_stride, int value_stride, int output_stride, float scale, int own_key,
                           float threshold, int vectors) {
    Thread t = thread();
    // Late tiles are the longest: they go first.
    int index = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int4 tile = tiles[index];
    int length = tile.y, first_row = tile.z * TILE, own_row = first_row + t.ty * ROWS;
    float* queries = (float*)shared_memory;
    float* keys = queries + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    q += (i64)tile.x * query_stride + head * head_dim;
    k += (i64)tile.x * key_stride + kv_head * head_dim;
    v += (i64)tile.x * value_stride + kv_head * head_dim;

    float sums[ROWS][COLUMNS], stick[ROWS];
    double nats[ROWS];
    clear(sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        // Rows that do not exist have no stick, so they keep nobody from leaving early.
        stick[r] = own_row + r < length ? 1.0f : 0.0f;
        nats[r] = 0.0;
    }
    load_tile<false>(queries, q, query_stride, first_row, length, head_dim, vectors);
    int key_tile = key_tiles_of(first_row, length, own_key);
    bool done = false;
    while (key_tile > 0 && !done) {
        key_tile--;
        __syncthreads();
        load_tile<true>(keys, k, key_stride, key_tile * TILE, length, head_dim, vectors);
        load_tile<true>(values, v, value_stride, key_tile * TILE, length, head_dim, vectors);
        __syncthreads();
        float x[ROWS][ROWS], beta[ROWS][ROWS], keep[ROWS][ROWS];
        int visible = own_row + own_key - key_tile * TILE;
        scores(x, queries, keys, head_dim);
        if (log2_rem) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    float z = scale * x[r][j];
                    float softplus = fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
                    sum += t.tx * ROWS + j < visible + r ? softplus : 0.0f;
                }
                nats[r] += (double)row_sum(sum);
            }
        }
        break_stick(x, beta, keep, stick, scale, visible);
        store_weights(weights, x);
        bool used_up = true;
#pragma unroll
        for (int r = 0; r < ROWS; r++) used_up = used_up && stick[r] < threshold;
        done = __syncthreads_and(used_up);
        add_keys(sums, weights, values);
    }
    float factor[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        factor[r] = 1.0f;
        if (t.tx == 0 && own_row + r < length) {
            i64 at = (i64)(tile.x + own_row + r) * heads + head;
            if (rem) rem[at] = stick[r];
            if (log2_rem) log2_rem[at] = (float)(nats[r] * -1.4426950408889634);
        }
    }
    if (first_key_tiles && threadIdx.x == 0) first_key_tiles[head * gridDim.x + index] = key_tile;
    write_rows(o + (i64)tile.x * output_stride + head * head_dim, output_stride, first_row, length, head_dim, sums, factor,
               false);
}

// One query tile: walks from the newest key tile down and notes the stick before each, then up again for dz and dq.
extern "C" __global__ void __launch_bounds__(256, 1)
stick_breaking_dq_f32(const float* q, const float* k, const float* v, const float* d_o, const float* d_rem,
                      const u32* first_key_tiles, float* sticks, float* deltas, float* dq, const int4* tiles, int tile_count,
                      int first_tile, int pairs, int heads, int kv_heads, int head_dim, int query_stride, int key_stride,
                      int value_stride, int output_stride, float scale, int own_key, int vectors) {
    Thread t = thread();
    int index = first_tile + gridDim.x - 1 - blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int4 tile = tiles[index];
    int length = tile.y, first_row = tile.z * TILE, own_row = first_row + t.ty * ROWS;
    float* queries = (float*)shared_memory;
    float* gradients = queries + TILE * PITCH;
    float* keys = gradients + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    q += (i64)tile.x * query_stride + head * head_dim;
    k += (i64)tile.x * key_stride + kv_head * head_dim;
    v += (i64)tile.x * value_stride + kv_head * head_dim;
    d_o += (i64)tile.x * output_stride + head * head_dim;
    i64 state = ((i64)head * pairs + tile.w) * TILE + t.ty * ROWS;

    load_tile<false>(queries, q, query_stride, first_row, length, head_dim, vectors);
    load_tile<false>(gradients, d_o, output_stride, first_row, length, head_dim, vectors);
    float stick[ROWS], delta[ROWS], one[ROWS], sums[ROWS][COLUMNS];
    clear(sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) stick[r] = own_row + r < length ? 1.0f : 0.0f;
    int first = first_key_tiles ? first_key_tiles[head * tile_count + index] : 0;
    int end = key_tiles_of(first_row, length, own_key);
    for (int key_tile = end - 1; key_tile >= first; key_tile--) {
        __syncthreads();
        load_tile<true>(keys, k, key_stride, key_tile * TILE, length, head_dim, vectors);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (t.tx == 0) sticks[state + (i64)key_tile * TILE + r] = stick[r];
        float x[ROWS][ROWS], beta[ROWS][ROWS], keep[ROWS][ROWS];
        scores(x, queries, keys, head_dim);
        break_stick(x, beta, keep, stick, scale, own_row + own_key - key_tile * TILE);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        one[r] = scale;
        delta[r] = 0.0f;
        if (d_rem && own_row + r < length) delta[r] = d_rem[(i64)(tile.x + own_row + r) * heads + head] * stick[r];
    }
    // What lane 0 wrote is read by its neighbours below; the barriers of the loop lie between.
    for (int key_tile = first; key_tile < end; key_tile++) {
        __syncthreads();
        load_tile<true>(keys, k, key_stride, key_tile * TILE, length, head_dim, vectors);
        load_tile<true>(values, v, value_stride, key_tile * TILE, length, head_dim, vectors);
        __syncthreads();
        float x[ROWS][ROWS], g[ROWS][ROWS], beta[ROWS][ROWS], keep[ROWS][ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) stick[r] = sticks[state + (i64)key_tile * TILE + r];
        scores(x, queries, keys, head_dim);
        break_stick(x, beta, keep, stick, scale, own_row + own_key - key_tile * TILE);
        scores(g, gradients, values, head_dim);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (t.tx == 0) deltas[state + (i64)key_tile * TILE + r] = delta[r];
            float sum = 0.0f, total;
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                g[r][j] *= x[r][j];
                sum += g[r][j];
            }
            float older = delta[r] + older_sum(sum, total);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                float a = g[r][j];
                g[r][j] = fmaf(keep[r][j], a, -beta[r][j] * older);
                older += a;
            }
            delta[r] += total;
        }
        store_weights(weights, g);
        __syncthreads();
        add_keys(sums, weights, keys);
    }
    i64 width = (i64)heads * head_dim;
    write_rows(dq + tile.x * width + head * head_dim, width, first_row, length, head_dim, sums, one, false);
}

// One key tile: all query tiles of the chunk that see it, for all heads that read its key head, in order.
extern "C" __global__ void __launch_bounds__(256, 1)
stick_breaking_dkv_f32(const float* q, const float* k, const float* v, const float* d_o, const u32* first_key_tiles,
                       const float* sticks, const float* deltas, float* dk, float* dv, const int4* tiles, int tile_count,
                       int first_tile, int end_tile, int pairs, int heads, int kv_heads, int head_dim, int query_stride,
                       int key_stride, int value_stride, int output_stride, float scale, int own_key, int vectors, int add) {
    Thread t = thread();
    int index = blockIdx.x, kv_head = blockIdx.y, group = heads / kv_heads;
    int4 tile = tiles[index];
    int length = tile.y, key_tile = tile.z;
    float* queries = (float*)shared_memory;
    float* gradients = queries + TILE * PITCH;
    float* keys = gradients + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    load_tile<true>(keys, k + (i64)tile.x * key_stride + kv_head * head_dim, key_stride, key_tile * TILE, length, head_dim,
                    vectors);
    load_tile<true>(values, v + (i64)tile.x * value_stride + kv_head * head_dim, value_stride, key_tile * TILE, length,
                    head_dim, vectors);
    float dk_sums[ROWS][COLUMNS], dv_sums[ROWS][COLUMNS];
    clear(dk_sums);
    clear(dv_sums);
    // The document's query tile n is number index - key_tile + n of the list.
    int last = index - key_tile + (length + TILE - 1) / TILE;
    int begin = index > first_tile ? index : first_tile, end = last < end_tile ? last : end_tile;
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int other = begin; other < end; other++) {
            int4 query_tile = tiles[other];
            int first_row = query_tile.z * TILE, own_row = first_row + t.ty * ROWS;
            int first = first_key_tiles ? first_key_tiles[head * tile_count + other] : 0;
            if (key_tile < first || key_tile >= key_tiles_of(first_row, length, own_key)) continue;
            i64 state = (((i64)head * pairs + query_tile.w) + key_tile) * TILE + t.ty * ROWS;
            __syncthreads();
            load_tile<false>(queries, q + (i64)tile.x * query_stride + head * head_dim, query_stride, first_row, length,
                             head_dim, vectors);
            load_tile<false>(gradients, d_o + (i64)tile.x * output_stride + head * head_dim, output_stride, first_row,
                             length, head_dim, vectors);
            __syncthreads();
            float x[ROWS][ROWS], g[ROWS][ROWS], beta[ROWS][ROWS], keep[ROWS][ROWS], stick[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) stick[r] = sticks[state + r];
            scores(x, queries, keys, head_dim);
            break_stick(x, beta, keep, stick, scale, own_row + own_key - key_tile * TILE);
            store_weights(weights, x);
            __syncthreads();
            add_queries(dv_sums, weights, gradients);
            scores(g, gradients, values, head_dim);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = 0.0f, total;
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    g[r][j] *= x[r][j];
                    sum += g[r][j];
                }
                float older = deltas[state + r] + older_sum(sum, total);
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    float a = g[r][j];
                    g[r][j] = fmaf(keep[r][j], a, -beta[r][j] * older);
                    older += a;
                }
            }
            __syncthreads();
            store_weights(weights, g);
            __syncthreads();
            add_queries(dk_sums, weights, queries);
        }
    }
    float one[ROWS], scales[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) one[r] = 1.0f, scales[r] = scale;
    i64 width = (i64)kv_heads * head_dim, at = tile.x * width + kv_head * head_dim;
    write_rows(dk + at, width, key_tile * TILE, length, head_dim, dk_sums, scales, add);
    write_rows(dv + at, width, key_tile * TILE, length, head_dim, dv_sums, one, add);
}

// ------------------------------------------------------------------------------------------------ softmax

// z of one pair: scaled, with its position bias; -infinity for a key that the row does not see. `behind`: query - key.
DEVICE float bias_score(float x, float scale, float slope, int behind) {
    return behind < 0 ? -INFINITY_F : fmaf(-slope, (float)behind, scale * x);
}

extern "C" __global__ void __launch_bounds__(256, 1)
softmax_forward_f32(const float* q, const float* k, const float* v, const float* slopes, float* o, float* lse,
                    const int4* tiles, int heads, int kv_heads, int head_dim, int query_stride, int key_stride,
                    int value_stride, int output_stride, float scale, int vectors) {
    Thread t = thread();
    int index = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int4 tile = tiles[index];
    int length = tile.y, first_row = tile.z * TILE, own_row = first_row + t.ty * ROWS;
    float slope = slopes ? slopes[head] : 0.0f;
    float* queries = (float*)shared_memory;
    float* keys = queries + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    q += (i64)tile.x * query_stride + head * head_dim;
    k += (i64)tile.x * key_stride + kv_head * head_dim;
    v += (i64)tile.x * value_stride + kv_head * head_dim;

    float sums[ROWS][COLUMNS], largest[ROWS], total[ROWS];
    clear(sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) largest[r] = -INFINITY_F, total[r] = 0.0f;
    load_tile<false>(queries, q, query_stride, first_row, length, head_dim, vectors);
    int end = key_tiles_of(first_row, length, 1);
    // Oldest tile first: every row sees its document's first key, so the maximum is finite from the start.
    for (int key_tile = 0; key_tile < end; key_tile++) {
        __syncthreads();
        load_tile<true>(keys, k, key_stride, key_tile * TILE, length, head_dim, vectors);
        load_tile<true>(values, v, value_stride, key_tile * TILE, length, head_dim, vectors);
        __syncthreads();
        float x[ROWS][ROWS];
        scores(x, queries, keys, head_dim);
        int behind = own_row - key_tile * TILE - t.tx * ROWS;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float most = largest[r], sum = 0.0f;
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                x[r][j] = bias_score(x[r][j], scale, slope, behind + r - j);
                most = fmaxf(most, x[r][j]);
            }
            most = row_max(most);
            float shrink = expf(largest[r] - most);
            largest[r] = most;
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                x[r][j] = expf(x[r][j] - most);
                sum += x[r][j];
            }
            total[r] = fmaf(total[r], shrink, row_sum(sum));
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) sums[r][c] *= shrink;
        }
        store_weights(weights, x);
        __syncthreads();
        add_keys(sums, weights, values);
    }
    float factor[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        factor[r] = 1.0f / total[r];
        if (t.tx == 0 && own_row + r < length)
            lse[(i64)(tile.x + own_row + r) * heads + head] = largest[r] + logf(total[r]);
    }
    write_rows(o + (i64)tile.x * output_stride + head * head_dim, output_stride, first_row, length, head_dim, sums, factor,
               false);
}

extern "C" __global__ void __launch_bounds__(256, 1)
softmax_dq_f32(const float* q, const float* k, const float* v, const float* slopes, const float* o, const float* lse,
               const float* d_o, float* means, float* dq, const int4* tiles, int heads, int kv_heads, int head_dim,
               int query_stride, int key_stride, int value_stride, int output_stride, float scale, int vectors) {
    Thread t = thread();
    int index = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int4 tile = tiles[index];
    int length = tile.y, first_row = tile.z * TILE, own_row = first_row + t.ty * ROWS;
    float slope = slopes ? slopes[head] : 0.0f;
    float* queries = (float*)shared_memory;
    float* gradients = queries + TILE * PITCH;
    float* keys = gradients + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    q += (i64)tile.x * query_stride + head * head_dim;
    k += (i64)tile.x * key_stride + kv_head * head_dim;
    v += (i64)tile.x * value_stride + kv_head * head_dim;
    o += (i64)tile.x * output_stride + head * head_dim;
    d_o += (i64)tile.x * output_stride + head * head_dim;

    load_tile<false>(queries, q, query_stride, first_row, length, head_dim, vectors);
    load_tile<false>(gradients, d_o, output_stride, first_row, length, head_dim, vectors);
    load_tile<false>(keys, o, output_stride, first_row, length, head_dim, vectors);
    __syncthreads();
    float sums[ROWS][COLUMNS], mean[ROWS], own_lse[ROWS], scales[ROWS];
    clear(sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row = t.ty * ROWS + r;
        float sum = 0.0f;
        for (int d = t.tx; d < WIDTH; d += 16) sum = fmaf(keys[row * PITCH + d], gradients[row * PITCH + d], sum);
        mean[r] = row_sum(sum);
        scales[r] = scale;
        bool exists = own_row + r < length;
        i64 at = (i64)(tile.x + own_row + r) * heads + head;
        // Rows that do not exist get no weight.
        own_lse[r] = exists ? lse[at] : INFINITY_F;
        if (exists && t.tx == 0) means[at] = mean[r];
    }
    int end = key_tiles_of(first_row, length, 1);
    for (int key_tile = 0; key_tile < end; key_tile++) {
        __syncthreads();
        load_tile<true>(keys, k, key_stride, key_tile * TILE, length, head_dim, vectors);
        load_tile<true>(values, v, value_stride, key_tile * TILE, length, head_dim, vectors);
        __syncthreads();
        float x[ROWS][ROWS], g[ROWS][ROWS];
        scores(x, queries, keys, head_dim);
        scores(g, gradients, values, head_dim);
        int behind = own_row - key_tile * TILE - t.tx * ROWS;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                float weight = expf(bias_score(x[r][j], scale, slope, behind + r - j) - own_lse[r]);
                g[r][j] = weight * (g[r][j] - mean[r]);
            }
        store_weights(weights, g);
        __syncthreads();
        add_keys(sums, weights, keys);
    }
    i64 width = (i64)heads * head_dim;
    write_rows(dq + tile.x * width + head * head_dim, width, first_row, length, head_dim, sums, scales, false);
}

extern "C" __global__ void __launch_bounds__(256, 1)
softmax_dkv_f32(const float* q, const float* k, const float* v, const float* slopes, const float* lse, const float* means,
                const float* d_o, float* dk, float* dv, const int4* tiles, int heads, int kv_heads, int head_dim,
                int query_stride, int key_stride, int value_stride, int output_stride, float scale, int vectors) {
    Thread t = thread();
    int index = blockIdx.x, kv_head = blockIdx.y, group = heads / kv_heads;
    int4 tile = tiles[index];
    int length = tile.y, key_tile = tile.z;
    float* queries = (float*)shared_memory;
    float* gradients = queries + TILE * PITCH;
    float* keys = gradients + TILE * PITCH;
    float* values = keys + TILE * PITCH;
    float* weights = values + TILE * PITCH;
    load_tile<true>(keys, k + (i64)tile.x * key_stride + kv_head * head_dim, key_stride, key_tile * TILE, length, head_dim,
                    vectors);
    load_tile<true>(values, v + (i64)tile.x * value_stride + kv_head * head_dim, value_stride, key_tile * TILE, length,
                    head_dim, vectors);
    float dk_sums[ROWS][COLUMNS], dv_sums[ROWS][COLUMNS];
    clear(dk_sums);
    clear(dv_sums);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        float slope = slopes ? slopes[head] : 0.0f;
        for (int first_row = key_tile * TILE; first_row < length; first_row += TILE) {
            __syncthreads();
            load_tile<false>(queries, q + (i64)tile.x * query_stride + head * head_dim, query_stride, first_row, length,
                             head_dim, vectors);
            load_tile<false>(gradients, d_o + (i64)tile.x * output_stride + head * head_dim, output_stride, first_row,
                             length, head_dim, vectors);
            __syncthreads();
            float x[ROWS][ROWS], g[ROWS][ROWS];
            scores(x, queries, keys, head_dim);
            scores(g, gradients, values, head_dim);
            int own_row = first_row + t.ty * ROWS, behind = own_row - key_tile * TILE - t.tx * ROWS;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                bool exists = own_row + r < length;
                i64 at = (i64)(tile.x + own_row + r) * heads + head;
                float own_lse = exists ? lse[at] : INFINITY_F, mean = exists ? means[at] : 0.0f;
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    x[r][j] = expf(bias_score(x[r][j], scale, slope, behind + r - j) - own_lse);
                    g[r][j] = x[r][j] * (g[r][j] - mean);
                }
            }
            store_weights(weights, x);
            __syncthreads();
            add_queries(dv_sums, weights, gradients);
            __syncthreads();
            store_weights(weights, g);
            __syncthreads();
            add_queries(dk_sums, weights, queries);
        }
    }
    float one[ROWS], scales[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) one[r] = 1.0f, scales[r] = scale;
    i64 width = (i64)kv_heads * head_dim, at = tile.x * width + kv_head * head_dim;
    write_rows(dk + at, width, key_tile * TILE, length, head_dim, dk_sums, scales, false);
    write_rows(dv + at, width, key_tile * TILE, length, head_dim, dv_sums, one, false);
}
