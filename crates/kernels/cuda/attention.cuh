// What the attention kernels share: warp-level matrix products on bf16 tiles in shared memory (mma.sync, sm_80 and later).
//
// HEAD_DIM (a multiple of 8) is a compile-time constant. A tile is a number of rows of one head, [row][dimension] in bf16,
// padded with zeros to DIMS (a multiple of 16) dimensions. Its rows are ROW_BYTES apart, an odd number of 16-byte units: the
// 8 rows that one ldmatrix phase or one warp's fragment touches then lie in 8 different bank groups, with addresses that
// are a register plus a constant (no xor swizzle).
//
// Fragments, for lane = 4 g + c: an accumulator of a 16 x 8 tile holds (row g, columns 2c, 2c+1) and (row g+8, the same
// columns). Two neighbouring accumulator tiles, packed to bf16, are the left operand of a further product.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif

constexpr int DIMS = (HEAD_DIM + 15) / 16 * 16;
// Dimension steps of 16.
constexpr int DIM_STEPS = DIMS / 16;
// 16-byte units per row that exist in global memory.
constexpr int ROW_UNITS = HEAD_DIM / 8;
constexpr int ROW_BYTES = (DIMS / 8 + 1) * 16;

constexpr __device__ int next_power_of_two(int x) {
    int p = 1;
    while (p < x) p *= 2;
    return p;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ------------------------------------------------------------------------------------------------ asynchronous copies

// 16 bytes from global to shared memory, past L1.
DEVICE void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same, or 16 zero bytes and no read.
DEVICE void copy_async_or_zero(u32 to, const void* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way.
template <int pending> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Position p of a tile of `keys` keys in the permuted order: lane c of a quad then owns the keys/4 contiguous keys
// c * keys/4 + 2j + e, as column 2c + e of accumulator tile j. Linear in the bits of p.
template <int keys> constexpr __device__ int permuted_key(int p) {
    return keys / 4 * ((p >> 1) & 3) + 2 * (p >> 3) + (p & 1);
}

// Starts the copy of rows 0..rows of one head to a tile; `from` is row 0, rows are `stride` elements apart. Rows from
// `valid` on become zero. Position p of the tile takes row p, or row permuted_key(p). All `threads` threads take part.
template <int rows, int threads, bool permuted>
DEVICE void copy_tile(u32 tile, const bf16* from, int stride, int valid) {
    constexpr int row_threads = next_power_of_two(ROW_UNITS), row_step = threads / row_threads;
    static_assert(row_step >= 1, "a row needs more threads than there are");
    int unit = threadIdx.x % row_threads, first = threadIdx.x / row_threads;
    if (unit >= ROW_UNITS || first >= rows) return;
    // permuted_key is linear in bits that do not overlap: every further row is a constant away.
    int first_row = permuted ? permuted_key<rows>(first) : first;
    from += (i64)first_row * stride + unit * 8;
    tile += first * ROW_BYTES + unit * 16;
    if (valid >= rows) {
#pragma unroll
        for (int p = 0; p < rows; p += row_step) {
            int row = permuted ? permuted_key<rows>(p) : p;
            copy_async(tile + p * ROW_BYTES, from + row * stride);
        }
    } else {
#pragma unroll
        for (int p = 0; p < rows; p += row_step) {
            int row = permuted ? permuted_key<rows>(p) : p;
            bool in = first_row + row < valid;
            copy_async_or_zero(tile + p * ROW_BYTES, in ? from + row * stride : from, in);
        }
    }
}

// Zeroes the padding dimensions of `rows` consecutive rows, which copies never touch.
template <int threads> DEVICE void clear_padding(u8* tile, int rows) {
    if constexpr (DIMS != HEAD_DIM) {
        for (int row = threadIdx.x; row < rows; row += threads)
            *(uint4*)(tile + row * ROW_BYTES + ROW_UNITS * 16) = make_uint4(0, 0, 0, 0);
    }
}

// ------------------------------------------------------------------------------------------------ fragments

DEVICE void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// d += a b: a 16 x 16 (rows x inner), b 16 x 8 (inner x columns).
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// This lane's offset for an operand whose 16 rows by 2 units go (rows 0-7, rows 8-15) first, units second: the left
// operand, or with transposed loads two 8-column tiles of a right operand stored [inner][column].
DEVICE u32 rows_first(int row_bytes) {
    int lane = threadIdx.x & 31;
    return (lane & 15) * row_bytes + (lane >> 4) * 16;
}
// The same with the two units first: two 8-column tiles of a right operand stored [column][inner], or with transposed
// loads a left operand stored [inner][row].
DEVICE u32 units_first(int row_bytes) {
    int lane = threadIdx.x & 31;
    return ((lane & 7) + ((lane >> 4) << 3)) * row_bytes + ((lane >> 3) & 1) * 16;
}

// d[i][j] = sum over the dimensions of left row 16 i.. and right row 8 j..: the scores of 16 `row_tiles` rows and
// `columns` keys. `left` is the lane's rows_first address in the left tile, `right` its units_first address.
template <int row_tiles, int columns>
DEVICE void multiply_rows(float (&d)[row_tiles][columns / 8][4], u32 left, u32 right) {
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < columns / 8; j++)
#pragma unroll
            for (int x = 0; x < 4; x++) d[i][j][x] = 0.0f;
#pragma unroll
    for (int step = 0; step < DIM_STEPS; step++) {
        u32 a[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; i++) load_matrices(a[i], left + i * 16 * ROW_BYTES + step * 32);
#pragma unroll
        for (int j = 0; j < columns / 16; j++) {
            u32 b[4];
            load_matrices(b, right + j * 16 * ROW_BYTES + step * 32);
#pragma unroll
            for (int i = 0; i < row_tiles; i++) {
                multiply(d[i][2 * j], a[i], b[0], b[1]);
                multiply(d[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// d[i][j] += the weights of 16 `row_tiles` rows times 16 rows of a tile: one inner step. `right` is the lane's rows_first
// address of the first of those 16 rows (and of the first dimension wanted); `steps` dimension steps of 16.
template <int row_tiles, int steps>
DEVICE void multiply_weights(float (&d)[row_tiles][2 * steps][4], const u32 (&weights)[row_tiles][4], u32 right) {
#pragma unroll
    for (int j = 0; j < steps; j++) {
        u32 b[4];
        load_matrices_transposed(b, right + j * 32);
#pragma unroll
        for (int i = 0; i < row_tiles; i++) {
            multiply(d[i][2 * j], weights[i], b[0], b[1]);
            multiply(d[i][2 * j + 1], weights[i], b[2], b[3]);
        }
    }
}

// Rounds 16 `row_tiles` rows of accumulators, times `factor`, to bf16 in a tile: the warp's first row is at `tile`,
// `first_unit` is the first 16-byte unit that it writes.
template <int row_tiles, int column_tiles>
DEVICE void store_fragments(u8* tile, const float (&d)[row_tiles][column_tiles][4], float factor, int row_bytes) {
    int lane = threadIdx.x & 31;
    u8* to = tile + (lane >> 2) * row_bytes + (lane & 3) * 4;
#pragma unroll
    for (int i = 0; i < row_tiles; i++)
#pragma unroll
        for (int j = 0; j < column_tiles; j++) {
            *(u32*)(to + (i * 16) * row_bytes + j * 16) = pack_bf16(d[i][j][0] * factor, d[i][j][1] * factor);
            *(u32*)(to + (i * 16 + 8) * row_bytes + j * 16) = pack_bf16(d[i][j][2] * factor, d[i][j][3] * factor);
        }
}

// Writes rows of a tile to global memory, `threads` threads of which this is `thread`: position p of the tile goes to row
// p, or to row permuted_key(p). `to` is row 0, rows are `stride` elements apart; rows from `valid` on are not written.
template <int rows, int threads, bool permuted>
DEVICE void write_tile(bf16* to, i64 stride, int valid, const u8* tile, int thread) {
    for (int i = thread; i < rows * ROW_UNITS; i += threads) {
        int p = i / ROW_UNITS, unit = i % ROW_UNITS;
        int row = permuted ? permuted_key<rows>(p) : p;
        if (row < valid) *(uint4*)(to + row * stride + unit * 8) = *(const uint4*)(tile + p * ROW_BYTES + unit * 16);
    }
}
