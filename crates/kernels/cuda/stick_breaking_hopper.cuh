// What the sm_90a kernels of stick-breaking attention share. Put after hopper.cuh and stick_breaking.cuh.

// Item `index` of a launch over `heads` heads from `first_head` on and `tile_count` tiles: `section` heads at a time, and of a
// section first all heads of the first tile, then those of the next one.
struct Position {
    int head, tile;
};
DEVICE Position position_of(int index, int tile_count, int first_head, int heads, int section) {
    const int section_items = tile_count * section;
    const int at = index / section_items, within = index - at * section_items;
    const int section_heads = min(section, heads - at * section);
    return {first_head + at * section + within % section_heads, within / section_heads};
}

// The state that the forward pass keeps of a piece with so many blocks of keys, if it may keep `kept` of them (an even number):
// from the first kept one, which starts a tile of 128 keys, to the newest.
DEVICE int first_kept(int blocks, int kept) { return max(blocks - kept + 1, 0) & ~1; }
// Where that of block 0 would lie. `piece` counts those of all documents, and of all heads.
DEVICE i64 kept_entry(i64 piece, int kept, int first) { return piece * kept - first; }

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

// Brings a tile of keys or values, rows from `row` on and columns from `column` on, to an empty stage; `full` completes when it
// is there. `from` and `stride` are those of the tensor, which has so many tokens.
template <int keys>
DEVICE void bring_tile(u8* to, u32 full, const TensorMap& map, const bf16* from, int stride, int tokens, int row, int column) {
    const int lane = threadIdx.x & 31;
    if (row + keys <= tokens) {
        if (lane == 0) {
            barrier_expect(full, HEAD_DIM / 64 * keys * 128);
#pragma unroll
            for (int chunk = 0; chunk < HEAD_DIM / 64; chunk++)
                copy_box(shared_address(to) + chunk * keys * 128, map, full, column + 64 * chunk, row, 0, 0);
        }
    } else {
        copy_last_tile<keys>(to, from + (i64)row * stride + column, stride, tokens - row);
        publish_shared();
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
    }
    __syncwarp();
}

// A tile that another thread has put into shared memory.
DEVICE Tile uniform(const volatile Tile& tile) {
    return {uniform(tile.start), uniform(tile.length), uniform(tile.first), uniform(tile.entry), uniform(tile.piece)};
}

// Where the scores keep key x (of the lane's quarter of the tile) of row r (of the lane's two: g and g + 8).
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

// d = left right^T over HEAD_DIM columns: tiles in shared memory, whose chunks of 64 columns are so many bytes apart.
template <int left_chunk, int right_chunk, int count> DEVICE void multiply_rows(float (&d)[count], u64 left, u64 right) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        const u64 a = operand_at(left, step / 4 * left_chunk + step % 4 * 32);
        const u64 b = operand_at(right, step / 4 * right_chunk + step % 4 * 32);
        if (step == 0) {
            multiply_shared<false>(d, a, b);
        } else {
            multiply_shared<true>(d, a, b);
        }
    }
}

// Row r (of the lane's two) of 64 x HEAD_DIM accumulators times `factor`, rounded; `to` is the row's place in global memory,
// 8 elements further for each lane of the quad. All of them take part, whether the row is wanted or not.
DEVICE void store_row(bf16* to, const float (&d)[HEAD_DIM / 2], int r, float factor, bool wanted) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
        u32 w[4];
#pragma unroll
        for (int x = 0; x < 4; x++)
            w[x] = pack_bf16(d[16 * i + 4 * x + 2 * r] * factor, d[16 * i + 4 * x + 2 * r + 1] * factor);
        transpose_quad(w);
        if (wanted) *(uint4*)(to + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}
