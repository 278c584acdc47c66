// One query per sequence against a cache of keys and values, for both attentions, f32 and bf16.
// Formulas: src/attention/{stick_breaking,softmax}/mod.rs; semantics: their decode.rs.
//
// Reads   q [sequences, heads, head_dim], k, v [sequences, capacity, kv_heads, head_dim] with strides, lengths [sequences]
//         (keys that each query sees, cut to 0 .. capacity), slopes [heads] or null (ALiBi).
// Writes  o [sequences, heads, head_dim], and for stick-breaking rem [sequences, heads], contiguous; rem is float.
// Keeps   partial results in float, from the first kernel to the second: o [sequences, heads, pieces, head_dim] and two
//         numbers [sequences, heads, pieces, 2]: the stick that a piece leaves (of a whole one), or the largest score and
//         the sum of its weights relative to it.
//
// The keys are cut into pieces of `piece` (a multiple of TILE), counted from the oldest; a block takes one piece of one key
// head, for HEADS query heads that read it, from its newest tile down. With early exit it stops when all its sticks are
// below the threshold: what it leaves out is at most that share of them. Nothing depends on when another block runs.
// The second kernel joins the pieces of a row, newest first: o += rem * o_piece, rem *= rem_piece; or by the largest scores.
// All arithmetic is in float; the result is rounded once.
//
// Launch  pieces: 128 threads, grid (pieces, kv_heads * ceil(group / HEADS), sequences), no dynamic shared memory.
//         join: 128 threads, grid (heads, sequences).
//
// -DWIDTH: head_dim rounded up to 32, 64, 128 or 256. -DHEADS: 1 or 4.

#ifndef WIDTH
#define WIDTH 64
#endif
#ifndef HEADS
#define HEADS 1
#endif

constexpr int THREADS = 128, WARPS = 4, TILE = 64;

// How a row of WIDTH elements is spread over lanes: `chunks` times `width` neighbouring elements each.
template <typename T> struct Row {
    static constexpr int width = Vector<T>::width, lanes = WIDTH / width < 32 ? WIDTH / width : 32,
                         chunks = WIDTH / (width * lanes), at_once = THREADS / lanes;
};

// Elements of a row from `at` on; zeros beyond head_dim.
template <typename T>
DEVICE void load_part(const T* row, int at, int head_dim, bool vectors, float (&x)[Vector<T>::width]) {
    if (vectors && at < head_dim) {
        load_vector(row + at, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < Vector<T>::width; i++) x[i] = at + i < head_dim ? to_float(row[at + i]) : 0.0f;
}

struct Decode {
    const float* slopes;
    const int* lengths;
    float *part_o, *part_rows;
    int capacity, heads, kv_heads, head_dim, query_stride, cache_stride;
    i64 sequence_stride;
    int piece;
    float scale, threshold;
    bool vectors;
};

// beta = sigmoid(z) and keep = 1 - beta = sigmoid(-z), neither by a subtraction.
DEVICE void split_stick(float z, float& beta, float& keep) {
    float e = expf(-fabsf(z));
    float large = 1.0f / (1.0f + e), small = e * large;
    beta = z >= 0.0f ? large : small;
    keep = z >= 0.0f ? small : large;
}

// Replaces a tile's scores of one head by its weights, one warp, lane l having the keys 2l and 2l + 1.
DEVICE void break_stick(float2* z, float& stick) {
    int lane = threadIdx.x & 31;
    float2 x = z[lane];
    float older_beta, older_keep, beta, keep;
    split_stick(x.x, older_beta, older_keep);
    split_stick(x.y, beta, keep);
    // Keys that do not exist have a score of -infinity: beta is exactly 0 and keep exactly 1.
    float product = keep * older_keep;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        float y = __shfl_down_sync(FULL_MASK, product, distance);
        if (lane + distance < 32) product *= y;
    }
    float newer = __shfl_down_sync(FULL_MASK, product, 1);
    float left = stick * (lane == 31 ? 1.0f : newer);
    z[lane] = make_float2(older_beta * (left * keep), beta * left);
    stick *= __shfl_sync(FULL_MASK, product, 0);
}

// The same for softmax: weights relative to the largest score so far. Returns the factor for what was summed up before.
DEVICE float normalize(float2* z, float& largest, float& sum) {
    int lane = threadIdx.x & 31;
    float2 x = z[lane];
    // Every tile holds a key, so the maximum is finite.
    float most = fmaxf(largest, warp_max(fmaxf(x.x, x.y)));
    float shrink = expf(largest - most);
    x = make_float2(expf(x.x - most), expf(x.y - most));
    z[lane] = x;
    sum = fmaf(sum, shrink, warp_sum(x.x + x.y));
    largest = most;
    return shrink;
}

template <typename T, bool stick_breaking> DEVICE void decode(const T* q, const T* k, const T* v, const Decode& p) {
    typedef Row<T> Row;
    constexpr int width = Row::width, chunks = Row::chunks;
    __shared__ float queries[HEADS][WIDTH];
    // Scores, then weights; afterwards the sums of the groups of threads that read the same elements.
    __shared__ float2 weights[HEADS][TILE / 2];
    __shared__ float shrinks[HEADS];
    __shared__ int used_up[HEADS];
    __shared__ float parts[WARPS][WIDTH];

    const int group = p.heads / p.kv_heads, subgroups = (group + HEADS - 1) / HEADS;
    const int sequence = blockIdx.z, kv_head = blockIdx.y / subgroups, first = blockIdx.y % subgroups * HEADS;
    const int count = min(HEADS, group - first), head = kv_head * group + first;
    const int length = min(p.lengths[sequence], p.capacity), start = blockIdx.x * p.piece, end = min(start + p.piece, length);
    if (start >= end) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = threadIdx.x % Row::lanes, slot = threadIdx.x / Row::lanes;
    k += sequence * p.sequence_stride + kv_head * p.head_dim;
    v += sequence * p.sequence_stride + kv_head * p.head_dim;
    q += (i64)sequence * p.query_stride + head * p.head_dim;
    for (int i = threadIdx.x; i < HEADS * WIDTH; i += THREADS) {
        int h = i / WIDTH, d = i % WIDTH;
        queries[h][d] = h < count && d < p.head_dim ? to_float(q[h * p.head_dim + d]) : 0.0f;
    }
    float sums[HEADS][chunks][width];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int n = 0; n < chunks; n++)
#pragma unroll
            for (int x = 0; x < width; x++) sums[h][n][x] = 0.0f;
    // Of head `warp`: the stick, or the largest score and the sum.
    float stick = 1.0f, largest = -INFINITY_F, sum = 0.0f;
    __syncthreads();

    for (int tile = (end - 1) / TILE * TILE; tile >= start; tile -= TILE) {
#pragma unroll 4
        for (int key = slot; key < TILE; key += Row::at_once) {
            const bool exists = tile + key < end;
            float x[chunks][width];
#pragma unroll
            for (int n = 0; n < chunks; n++) {
                if (exists) {
                    load_part(k + (i64)(tile + key) * p.cache_stride, (n * Row::lanes + part) * width, p.head_dim, p.vectors, x[n]);
                } else {
#pragma unroll
                    for (int i = 0; i < width; i++) x[n][i] = 0.0f;
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float z = 0.0f;
#pragma unroll
                for (int n = 0; n < chunks; n++)
#pragma unroll
                    for (int i = 0; i < width; i++) z = fmaf(x[n][i], queries[h][(n * Row::lanes + part) * width + i], z);
#pragma unroll
                for (int offset = Row::lanes / 2; offset > 0; offset >>= 1) z += __shfl_xor_sync(FULL_MASK, z, offset);
                if (part == 0) {
                    z *= p.scale;
                    if (p.slopes != nullptr && h < count) z = fmaf(p.slopes[head + h], (float)(tile + key - (length - 1)), z);
                    ((float*)weights[h])[key] = exists ? z : -INFINITY_F;
                }
            }
        }
        __syncthreads();
        if (warp < HEADS) {
            if (stick_breaking) {
                break_stick(weights[warp], stick);
                if (lane == 0) used_up[warp] = warp >= count || stick < p.threshold;
            } else {
                float shrink = normalize(weights[warp], largest, sum);
                if (lane == 0) shrinks[warp] = shrink;
            }
        }
        __syncthreads();
        if (!stick_breaking) {
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int n = 0; n < chunks; n++)
#pragma unroll
                    for (int i = 0; i < width; i++) sums[h][n][i] *= shrinks[h];
        }
#pragma unroll 4
        for (int key = slot; key < TILE; key += Row::at_once) {
            if (tile + key >= end) continue;
#pragma unroll
            for (int n = 0; n < chunks; n++) {
                float x[width];
                load_part(v + (i64)(tile + key) * p.cache_stride, (n * Row::lanes + part) * width, p.head_dim, p.vectors, x);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    float weight = ((float*)weights[h])[key];
#pragma unroll
                    for (int i = 0; i < width; i++) sums[h][n][i] = fmaf(weight, x[i], sums[h][n][i]);
                }
            }
        }
        bool done = stick_breaking;
        if (stick_breaking) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) done = done && used_up[h];
        }
        // All threads saw the same flags, so they leave together; the barrier keeps the next scores off these weights.
        __syncthreads();
        if (done) break;
    }

    const i64 row = ((i64)sequence * p.heads + head) * gridDim.x + blockIdx.x;
    if (warp < count && lane == 0) {
        float* to = p.part_rows + (row + (i64)warp * gridDim.x) * 2;
        to[0] = stick_breaking ? stick : largest;
        to[1] = sum;
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int n = 0; n < chunks; n++)
#pragma unroll
            for (int i = 0; i < width; i++) {
                float x = sums[h][n][i];
#pragma unroll
                for (int offset = Row::lanes; offset < 32; offset <<= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
                if (lane < Row::lanes) parts[warp][(n * Row::lanes + part) * width + i] = x;
            }
        __syncthreads();
        if (h < count)
            for (int d = threadIdx.x; d < p.head_dim; d += THREADS)
                p.part_o[(row + (i64)h * gridDim.x) * p.head_dim + d] = parts[0][d] + parts[1][d] + parts[2][d] + parts[3][d];
        __syncthreads();
    }
}

// Joins the pieces of one row, newest first.
template <typename T, bool stick_breaking>
DEVICE void join(const float* part_o, const float* part_rows, const int* lengths, T* o, float* rem, int capacity,
                 int heads, int head_dim, int pieces, int piece) {
    const int head = blockIdx.x, sequence = blockIdx.y, length = max(0, min(lengths[sequence], capacity));
    const int visited = (length + piece - 1) / piece;
    const i64 row = (i64)sequence * heads + head;
    part_o += row * pieces * head_dim;
    part_rows += row * pieces * 2;
    for (int d = threadIdx.x; d < head_dim; d += THREADS) {
        float sum = 0.0f, left = 1.0f, total = 0.0f, largest = -INFINITY_F;
        if (stick_breaking) {
            for (int n = visited - 1; n >= 0; n--) {
                sum = fmaf(left, part_o[(i64)n * head_dim + d], sum);
                left *= part_rows[2 * n];
            }
        } else {
            for (int n = visited - 1; n >= 0; n--) largest = fmaxf(largest, part_rows[2 * n]);
            for (int n = visited - 1; n >= 0; n--) {
                float factor = expf(part_rows[2 * n] - largest);
                total = fmaf(part_rows[2 * n + 1], factor, total);
                sum = fmaf(part_o[(i64)n * head_dim + d], factor, sum);
            }
            // A sequence without keys gets zeros.
            sum = visited > 0 ? sum / total : 0.0f;
        }
        store(o + row * head_dim + d, sum);
        if (stick_breaking && d == 0) rem[row] = left;
    }
}

#define PIECES(name, T, stick_breaking)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                             \
    name(const T* q, const T* k, const T* v, const float* slopes, const int* lengths, float* part_o, float* part_rows,   \
         int capacity, int heads, int kv_heads, int head_dim, int query_stride, int cache_stride, i64 sequence_stride,   \
         int piece, float scale, float threshold, int vectors) {                                                        \
        decode<T, stick_breaking>(q, k, v, {slopes, lengths, part_o, part_rows, capacity, heads, kv_heads, head_dim,      \
                                            query_stride, cache_stride, sequence_stride, piece, scale, threshold, vectors != 0});      \
    }
#define JOIN(name, T, stick_breaking)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                             \
    name(const float* part_o, const float* part_rows, const int* lengths, T* o, float* rem, int capacity, int heads,         \
         int head_dim, int pieces, int piece) {                                                                       \
        join<T, stick_breaking>(part_o, part_rows, lengths, o, rem, capacity, heads, head_dim, pieces, piece);          \
    }

PIECES(stick_breaking_decode_f32, float, true)
PIECES(stick_breaking_decode_bf16, bf16, true)
PIECES(softmax_decode_f32, float, false)
PIECES(softmax_decode_bf16, bf16, false)
JOIN(stick_breaking_join_f32, float, true)
JOIN(stick_breaking_join_bf16, bf16, true)
JOIN(softmax_join_f32, float, false)
JOIN(softmax_join_bf16, bf16, false)
