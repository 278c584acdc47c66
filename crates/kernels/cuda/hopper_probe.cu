// Microbenchmarks that decided the design of stick_breaking_hopper_forward.cu, whose parts they run alone: put after it. Each kernel
// runs one block per multiprocessor for `rounds` rounds and writes the clocks of block 0 to `clocks`; `sink` keeps the
// compiler from leaving work out.

// Arbitrary small bf16 numbers, -2 to 2.
DEVICE void fill_shared(u8* shared, int bytes) {
    for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
        u32 h = i * 2654435761u;
        store((bf16*)shared + i, (float)(int)(h >> 16) * (1.0f / 16384.0f) - 2.0f);
    }
    publish_shared();
    __syncthreads();
}

DEVICE i64 clock_now() {
    i64 clock;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(clock)::"memory");
    return clock;
}

DEVICE void finish(i64 start, i64* clocks, float* sink, float x) {
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) *clocks = clock_now() - start;
    if (x == 123.456f) *sink = x;
}

// 64 x 128 per warpgroup += 64 x 128 times 128 x 128, all in shared memory.
extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) probe_products_shared(i64* clocks, float* sink, int rounds) {
    extern __shared__ __align__(1024) u8 shared[];
    fill_shared(shared, WARPGROUPS * QUERY_CHUNK_BYTES * 2 + KEY_CHUNK_BYTES * 2);
    const int group = uniform(threadIdx.x / 128);
    const u64 a = operand(shared_address(shared) + group * 2 * QUERY_CHUNK_BYTES, 0);
    const u64 b = operand(shared_address(shared) + WARPGROUPS * 2 * QUERY_CHUNK_BYTES, 0);
    float s[64];
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] = 0.0f;
    const i64 start = clock_now();
    for (int round = 0; round < rounds; round++) {
        products_begin();
#pragma unroll
        for (int step = 0; step < 8; step++)
            multiply_shared<true>(s, operand_at(a, step / 4 * QUERY_CHUNK_BYTES + step % 4 * 32),
                                  operand_at(b, step / 4 * KEY_CHUNK_BYTES + step % 4 * 32));
        products_commit();
        products_wait<1>();
    }
    products_wait<0>();
    pin(s);
    finish(start, clocks, sink, s[0] + s[63]);
}

// 64 x HEAD_DIM per warpgroup += 64 x 128 in registers times 128 x HEAD_DIM.
extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) probe_products_registers(i64* clocks, float* sink, int rounds) {
    extern __shared__ __align__(1024) u8 shared[];
    fill_shared(shared, TILE_BYTES);
    const u64 b = operand(shared_address(shared), KEY_CHUNK_BYTES);
    float o[HEAD_DIM / 2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;
    u32 a[8][4];
#pragma unroll
    for (int i = 0; i < 32; i++) a[i / 4][i % 4] = pack_bf16(0.01f * (threadIdx.x % 77), 0.02f * i);
    pin(a);
    const i64 start = clock_now();
    for (int round = 0; round < rounds; round++) {
        products_begin();
#pragma unroll
        for (int step = 0; step < 8; step++) multiply_registers(o, a[step], operand_at(b, step * 2048));
        products_commit();
        products_wait<1>();
    }
    products_wait<0>();
    pin(o);
    finish(start, clocks, sink, o[0] + o[HEAD_DIM / 2 - 1]);
}

// The scan of one tile of 64 x 128 per warpgroup, with the rounding of its weights.
extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) probe_scan(i64* clocks, float* sink, int rounds, float factor) {
    float s[64], stick[2] = {1.0f, 1.0f}, edge[2];
    const int visible[2] = {0, 0};
    u32 all = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] = -0.1f * ((threadIdx.x * 7 + i * 13) % 64);
    __syncthreads();
    const i64 start = clock_now();
    for (int round = 0; round < rounds; round++) {
        scan<false>(s, factor, visible, stick, edge);
        stick[0] = stick[1] = 1.0f;
#pragma unroll
        for (int i = 0; i < 64; i += 2) all ^= pack_bf16(s[i], s[i + 1]);
        pin(s);
    }
    finish(start, clocks, sink, __uint_as_float(all));
}

// The consumers' loop with both products and the scan, without copies and barriers.
extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) probe_loop(i64* clocks, float* sink, int rounds, float factor) {
    extern __shared__ __align__(1024) u8 shared[];
    fill_shared(shared, WARPGROUPS * PIECE_BYTES + 2 * TILE_BYTES);
    const int group = uniform(threadIdx.x / 128);
    const u64 q = operand(shared_address(shared) + group * PIECE_BYTES, 0);
    const u64 k = operand(shared_address(shared) + WARPGROUPS * PIECE_BYTES, 0);
    const u64 v = operand(shared_address(shared) + WARPGROUPS * PIECE_BYTES + TILE_BYTES, KEY_CHUNK_BYTES);
    float s[64], o[HEAD_DIM / 2], stick[2] = {1.0f, 1.0f}, edge[2];
    const int visible[2] = {0, 0};
    u32 weights[8][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i / 4][i % 4] = 0;
    const i64 start = clock_now();
    for (int round = 0; round < rounds; round++) {
        pin(weights);
        products_begin();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++) {
            const u64 a = operand_at(q, step / 4 * QUERY_CHUNK_BYTES + step % 4 * 32);
            const u64 b = operand_at(k, step / 4 * KEY_CHUNK_BYTES + step % 4 * 32);
            if (step == 0) {
                multiply_shared<false>(s, a, b);
            } else {
                multiply_shared<true>(s, a, b);
            }
        }
        products_commit();
#pragma unroll
        for (int step = 0; step < 8; step++) multiply_registers(o, weights[step], operand_at(v, step * 2048));
        products_commit();
        products_wait<OVERLAP ? 1 : 0>();
        pin(s);
        scan<false>(s, factor, visible, stick, edge);
        stick[0] = stick[1] = 1.0f;
        if (OVERLAP) {
            products_wait<0>();
            pin(s);
        }
#pragma unroll
        for (int step = 0; step < 8; step++)
#pragma unroll
            for (int x = 0; x < 4; x++) weights[step][x] = pack_bf16(s[8 * step + 2 * x], s[8 * step + 2 * x + 1]);
    }
    pin(o);
    finish(start, clocks, sink, o[0] + o[HEAD_DIM / 2 - 1]);
}

// Tiles of keys, four in flight, into shared memory and nothing else: permuted, or 128 rows in a row.
template <bool permuted>
DEVICE void probe_copies(const TensorMap& map, u8* shared, i64* clocks, float* sink, int rounds, int tokens) {
    u64* full = (u64*)(shared + 4 * TILE_BYTES);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < 4; stage++) barrier_init(shared_address(&full[stage]), 1);
        barriers_ready();
    }
    __syncthreads();
    const i64 start = clock_now();
    if (threadIdx.x == 0) {
        auto begin = [&](int round) {
            const int stage = round & 3, tile = (blockIdx.x * 37 + round) % (tokens / TILE_KEYS);
            const u32 barrier = shared_address(&full[stage]);
            barrier_expect(barrier, TILE_BYTES);
            for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                const u32 to = shared_address(shared) + stage * TILE_BYTES + chunk * KEY_CHUNK_BYTES;
                if (permuted) {
                    copy_box(to, map, barrier, chunk * 64, tile * TILE_KEYS, 0, 0);
                } else {
                    copy_box(to, map, barrier, chunk * 64, tile * TILE_KEYS);
                }
            }
        };
        for (int round = 0; round < 3; round++) begin(round);
        for (int round = 0; round < rounds; round++) {
            if (round + 3 < rounds) begin(round + 3);
            barrier_wait(shared_address(&full[round & 3]), round >> 2 & 1);
        }
    }
    finish(start, clocks, sink, 0.0f);
}
extern "C" __global__ void __launch_bounds__(128, 1) probe_copies_permuted(const __grid_constant__ TensorMap map, i64* clocks, float* sink, int rounds, int tokens) {
    extern __shared__ __align__(1024) u8 shared[];
    probe_copies<true>(map, shared, clocks, sink, rounds, tokens);
}
extern "C" __global__ void __launch_bounds__(128, 1) probe_copies_plain(const __grid_constant__ TensorMap map, i64* clocks, float* sink, int rounds, int tokens) {
    extern __shared__ __align__(1024) u8 shared[];
    probe_copies<false>(map, shared, clocks, sink, rounds, tokens);
}

// One chunk of 64 columns of a permuted tile, as shared memory holds it: `out` takes 128 x 64 elements.
extern "C" __global__ void __launch_bounds__(128, 1) probe_tile(const __grid_constant__ TensorMap map, bf16* out, int row, int column) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 full = shared_address(shared + KEY_CHUNK_BYTES);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barriers_ready();
        barrier_expect(full, KEY_CHUNK_BYTES);
        copy_box(shared_address(shared), map, full, column, row, 0, 0);
    }
    __syncthreads();
    barrier_wait(full, 0);
    for (int i = threadIdx.x; i < KEY_CHUNK_BYTES / 16; i += 128) ((uint4*)out)[i] = ((uint4*)shared)[i];
}

// scores[64][128] = q[64][HEAD_DIM] k^T with k's rows as they come, and values[64][HEAD_DIM] = weights[64][128] v: the
// products alone, on tiles that ordinary writes put into place. One warpgroup.
extern "C" __global__ void __launch_bounds__(128, 1) probe_products(const bf16* q, const bf16* k, const bf16* weights, const bf16* v, float* scores, float* values) {
    extern __shared__ __align__(1024) u8 shared[];
    u8* k_tile = shared + PIECE_BYTES;
    u8* v_tile = k_tile + TILE_BYTES;
    for (int i = threadIdx.x; i < TILE_KEYS * HEAD_DIM; i += 128) {
        const int row = i / HEAD_DIM, column = i % HEAD_DIM, chunk = column / 64, unit = column % 64 / 8;
        const int at = row * 128 + ((unit ^ (row & 7)) << 4) + column % 8 * 2;
        *(bf16*)(k_tile + chunk * KEY_CHUNK_BYTES + at) = k[i];
        *(bf16*)(v_tile + chunk * KEY_CHUNK_BYTES + at) = v[i];
        if (row < PIECE) *(bf16*)(shared + chunk * QUERY_CHUNK_BYTES + at) = q[i];
    }
    publish_shared();
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3, row = 16 * warp + g;
    float s[64], o[HEAD_DIM / 2];
    u32 a[8][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < 8; step++)
#pragma unroll
        for (int x = 0; x < 4; x++)
            a[step][x] = *(const u32*)(weights + (row + 8 * (x & 1)) * TILE_KEYS + 16 * step + 8 * (x >> 1) + 2 * c);
    pin(a);
    const u64 q_operand = operand(shared_address(shared), 0), k_operand = operand(shared_address(k_tile), 0);
    const u64 v_operand = operand(shared_address(v_tile), KEY_CHUNK_BYTES);
    products_begin();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        const u64 left = operand_at(q_operand, step / 4 * QUERY_CHUNK_BYTES + step % 4 * 32);
        const u64 right = operand_at(k_operand, step / 4 * KEY_CHUNK_BYTES + step % 4 * 32);
        if (step == 0) {
            multiply_shared<false>(s, left, right);
        } else {
            multiply_shared<true>(s, left, right);
        }
    }
#pragma unroll
    for (int step = 0; step < 8; step++) multiply_registers(o, a[step], operand_at(v_operand, step * 2048));
    products_commit();
    products_wait<0>();
    pin(s);
    pin(o);
#pragma unroll
    for (int i = 0; i < 64; i++) scores[(row + 8 * (i >> 1 & 1)) * TILE_KEYS + 8 * (i >> 2) + 2 * c + (i & 1)] = s[i];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) values[(row + 8 * (i >> 1 & 1)) * HEAD_DIM + 8 * (i >> 2) + 2 * c + (i & 1)] = o[i];
}
