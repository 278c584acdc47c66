// Embedding: out[t] = table[ids[t]], and its gradient dtable[ids[t]] += dout[t], without float atomics.
//
// An id outside of the vocabulary reads nothing: its output row is NaN, its gradient is dropped (it sorts as `vocabulary`).
//
// forward: reads ids u32 [tokens], table [vocabulary, width]; writes out [tokens, width].
// backward, in launches one after another:
//   1. `count`, `scan`, `scatter`, once per digit of 8 bits: a stable radix sort of (id, token) by id;
//   2. `chunks`: each block adds up `chunk` neighbours of the sorted list, run by run. A run that lies in one chunk is added
//      to its row of dtable; what a chunk has of a run that crosses its start or its end goes to edges[chunk][0 or 1];
//   3. `join`: for each run that crosses chunks, the chunk it begins in adds up its pieces, in order.
// Sums in fp32, in an order that depends on the ids alone; one rounding where they are added to dtable. Integer atomics are
// not needed either: positions follow from counts.

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// ------------------------------------------------------------------------------------------------ forward

// One warp a token at a time, 256 threads a block, any grid. Bits are copied.
template <typename T, int W>
DEVICE void gather(const u32* ids, const T* table, T* out, u32 tokens, u32 vocabulary, u32 width) {
    u32 lane = threadIdx.x % 32;
    for (u64 token = thread_index() / 32; token < tokens; token += thread_count() / 32) {
        u32 id = ids[token];
        const T* row = table + (u64)id * width;
        T* to = out + token * width;
#pragma unroll 4
        for (u32 column = lane * W; column < width; column += 32 * W) {
            Unit<T, W> unit;
            if (id < vocabulary) {
                unit.load(row + column);
            } else {
#pragma unroll
                for (int k = 0; k < Unit<T, W>::words; k++) unit.bits[k] = 0xffffffffu;
            }
            unit.store(to + column);
        }
    }
}

#define FORWARD(name, T, W)                                                                                              \
    KERNEL(256) embedding_forward_##name(const u32* ids, const T* table, T* out, u32 tokens, u32 vocabulary,              \
                                         u32 width) {                                                                    \
        gather<T, W>(ids, table, out, tokens, vocabulary, width);                                                        \
    }
FORWARD(f32, float, 4)
FORWARD(bf16, bf16, 8)
FORWARD(narrow_f32, float, 1)
FORWARD(narrow_bf16, bf16, 1)

// ------------------------------------------------------------------------------------------------ sort

// A block of 256 threads sorts TILE neighbours; each of its 8 warps has TILE / 8 of them, in order.
#define TILE 2048
#define WARPS 8
#define EACH_WARP (TILE / WARPS)
#define DIGITS 256

// Counts the digits of a tile by warp: counts[warp][digit]. Leaves each key's digit, and its rank among the equal digits
// before it in its warp, to `visit(item, key, digit, rank)`.
template <typename Visit>
DEVICE void rank_in_warp(const u32* keys, u32 items, u32 shift, u32 vocabulary, u32 (&counts)[WARPS][DIGITS], Visit visit) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 i = threadIdx.x; i < WARPS * DIGITS; i += 256) counts[i / DIGITS][i % DIGITS] = 0;
    __syncthreads();
    u32 first = blockIdx.x * TILE + warp * EACH_WARP;
    for (u32 i = 0; i < EACH_WARP; i += 32) {
        u32 item = first + i + lane;
        bool here = item < items;
        u32 key = here ? min(keys[item], vocabulary) : 0;
        u32 digit = here ? (key >> shift) % DIGITS : DIGITS;
        u32 equal = __match_any_sync(FULL_MASK, digit);
        u32 before = __popc(equal & ((1u << lane) - 1));
        u32 known = here ? counts[warp][digit] : 0;
        __syncwarp();
        if (here && before == 0) counts[warp][digit] = known + __popc(equal);
        __syncwarp();
        if (here) visit(item, key, digit, known + before);
    }
    __syncthreads();
}

// totals[digit][block]: how often the digit occurs in the block's tile. Grid: tiles.
KERNEL(256) embedding_sort_count(const u32* keys, u32* totals, u32 items, u32 shift, u32 vocabulary) {
    __shared__ u32 counts[WARPS][DIGITS];
    rank_in_warp(keys, items, shift, vocabulary, counts, [](u32, u32, u32, u32) {});
    u32 sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += counts[w][threadIdx.x];
    totals[threadIdx.x * gridDim.x + blockIdx.x] = sum;
}

// Replaces totals [length] by the sums of what comes before. One block of 1024 threads.
KERNEL(1024) embedding_sort_scan(u32* totals, u32 length) {
    __shared__ u32 sums[32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 carried = 0;
    for (u32 start = 0; start < length; start += 4096) {
        u32 at = start + threadIdx.x * 4;
        u32 x[4], sum = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            x[k] = at + k < length ? totals[at + k] : 0;
            sum += x[k];
        }
        u32 inclusive = sum;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            u32 other = __shfl_up_sync(FULL_MASK, inclusive, offset);
            if (lane >= offset) inclusive += other;
        }
        if (lane == 31) sums[warp] = inclusive;
        __syncthreads();
        u32 of_warps = sums[lane];
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            u32 other = __shfl_up_sync(FULL_MASK, of_warps, offset);
            if (lane >= offset) of_warps += other;
        }
        u32 all = __shfl_sync(FULL_MASK, of_warps, 31);
        u32 warps_before = __shfl_sync(FULL_MASK, of_warps, (warp + 31) % 32);
        u32 before = carried + (warp == 0 ? 0 : warps_before) + inclusive - sum;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (at + k < length) totals[at + k] = before;
            before += x[k];
        }
        carried += all;
        __syncthreads();
    }
}

// Moves keys and tokens to their places. `tokens` is null in the first pass, where item i is token i. Grid: tiles.
KERNEL(256) embedding_sort_scatter(const u32* keys, const u32* tokens, const u32* starts, u32* keys_out, u32* tokens_out,
                                   u32 items, u32 shift, u32 vocabulary) {
    __shared__ u32 counts[WARPS][DIGITS];
    u32 ranks[EACH_WARP / 32];
    u32 first = blockIdx.x * TILE + threadIdx.x / 32 * EACH_WARP + threadIdx.x % 32;
    // Static indices, so that the ranks stay in registers.
    rank_in_warp(keys, items, shift, vocabulary, counts, [&](u32 item, u32, u32, u32 rank) {
#pragma unroll
        for (int i = 0; i < EACH_WARP / 32; i++)
            if (item - first == i * 32) ranks[i] = rank;
    });
    // From counts by warp to the place of each warp's first key of a digit.
    u32 place = starts[threadIdx.x * gridDim.x + blockIdx.x];
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        u32 count = counts[w][threadIdx.x];
        counts[w][threadIdx.x] = place;
        place += count;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH_WARP / 32; i++) {
        u32 item = first + i * 32;
        if (item < items) {
            u32 key = min(keys[item], vocabulary);
            u32 to = counts[threadIdx.x / 32][(key >> shift) % DIGITS] + ranks[i];
            keys_out[to] = key;
            tokens_out[to] = tokens ? tokens[item] : item;
        }
    }
}

// ------------------------------------------------------------------------------------------------ sums

template <typename T, int W> DEVICE void add_to_row(T* row, const float (&sums)[W]) {
    Unit<T, W> unit;
    unit.load(row);
    float values[W];
#pragma unroll
    for (int k = 0; k < W; k++) values[k] = unit.get(k) + sums[k];
    unit.pack(values);
    unit.store(row);
}

// Blocks of 128 threads, W columns each; grid (chunks, ceil(width / W / 128)). edges: fp32 [chunks][2][width], of which only
// what belongs to a crossing run is written: [0] a run that came from the chunk before, [1] one that begins here and goes on.
template <typename X, typename T, int W>
DEVICE void sum_chunk(const u32* ids, const u32* tokens, const X* dout, T* dtable, float* edges, u32 items, u32 chunk,
                      u32 vocabulary, u32 width) {
    enum { AHEAD = 4 };
    u32 column = (blockIdx.y * 128 + threadIdx.x) * W;
    if (column >= width) return;
    u32 first = blockIdx.x * chunk, last = first + chunk < items ? first + chunk : items;
    u32 previous = first > 0 ? ids[first - 1] : 0xffffffffu, next = last < items ? ids[last] : 0xffffffffu;
    bool from_before = first > 0 && ids[first] == previous;
    float sums[W];
#pragma unroll
    for (int k = 0; k < W; k++) sums[k] = 0.0f;
    u32 run = ids[first];
    for (u32 start = first; start < last; start += AHEAD) {
        Unit<X, W> rows[AHEAD];
        u32 id[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            u32 item = start + a < last ? start + a : last - 1;
            id[a] = ids[item];
            rows[a].load(dout + (u64)tokens[item] * width + column);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (start + a < last) {
                if (id[a] != run) {
                    if (from_before) {
                        Unit<float, W> sum;
                        sum.pack(sums);
                        sum.store(edges + (u64)blockIdx.x * 2 * width + column);
                    } else if (run < vocabulary) {
                        add_to_row<T, W>(dtable + (u64)run * width + column, sums);
                    }
                    from_before = false;
                    run = id[a];
#pragma unroll
                    for (int k = 0; k < W; k++) sums[k] = 0.0f;
                }
#pragma unroll
                for (int k = 0; k < W; k++) sums[k] += rows[a].get(k);
            }
        }
    }
    bool goes_on = last < items && run == next;
    if (from_before || goes_on) {
        Unit<float, W> sum;
        sum.pack(sums);
        sum.store(edges + ((u64)blockIdx.x * 2 + (from_before ? 0 : 1)) * width + column);
    } else if (run < vocabulary) {
        add_to_row<T, W>(dtable + (u64)run * width + column, sums);
    }
}

// The same grid as `chunks`: a chunk in which a run begins that goes on adds up the run's pieces.
template <typename T, int W>
DEVICE void join(const u32* ids, const float* edges, T* dtable, u32 items, u32 chunk, u32 vocabulary, u32 width) {
    u32 column = (blockIdx.y * 128 + threadIdx.x) * W;
    u32 first = blockIdx.x * chunk, last = first + chunk < items ? first + chunk : items;
    if (column >= width || last == items) return;
    u32 run = ids[last - 1];
    if (ids[last] != run || run >= vocabulary) return;
    // A chunk full of a run that came from before is a piece in the middle.
    if (first > 0 && ids[first] == run && ids[first - 1] == run) return;
    const float* piece = edges + ((u64)blockIdx.x * 2 + 1) * width + column;
    Unit<float, W> unit;
    unit.load(piece);
    float sums[W];
    unit.unpack(sums);
    piece += width;
    // The chunk after this one has the run at its start, and so has each chunk after one that is full of it.
#pragma unroll 8
    for (u32 start = last; start < items && ids[start] == run; start += chunk, piece += 2 * (u64)width) {
        unit.load(piece);
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] += unit.get(k);
    }
    add_to_row<T, W>(dtable + (u64)run * width + column, sums);
}

#define BACKWARD(name, X, T, W)                                                                                          \
    KERNEL(128) embedding_backward_chunks_##name(const u32* ids, const u32* tokens, const X* dout, T* dtable,             \
                                                 float* edges, u32 items, u32 chunk, u32 vocabulary, u32 width) {        \
        sum_chunk<X, T, W>(ids, tokens, dout, dtable, edges, items, chunk, vocabulary, width);                            \
    }                                                                                                                    \
    KERNEL(128) embedding_backward_join_##name(const u32* ids, const float* edges, T* dtable, u32 items, u32 chunk,       \
                                               u32 vocabulary, u32 width) {                                              \
        join<T, W>(ids, edges, dtable, items, chunk, vocabulary, width);                                                  \
    }
// dout and dtable.
BACKWARD(f32_f32, float, float, 4)
BACKWARD(bf16_f32, bf16, float, 8)
BACKWARD(bf16_bf16, bf16, bf16, 8)
BACKWARD(narrow_f32_f32, float, float, 1)
BACKWARD(narrow_bf16_f32, bf16, float, 1)
BACKWARD(narrow_bf16_bf16, bf16, bf16, 1)
