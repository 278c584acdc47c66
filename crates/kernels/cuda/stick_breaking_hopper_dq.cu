// The first backward pass of stick-breaking attention on Hopper (sm_90a): bf16, head dims 64 and 128. It computes and writes
// what `backward_dq` in stick_breaking.cu does: dq, and for each row and block of keys the sum over older blocks.
//
// A persistent block of one producer warp and WARPGROUPS consumer warpgroups takes items (a tile of 64 WARPGROUPS rows of one
// head) by an atomic ticket, the longest first. A consumer warpgroup has one piece of 64 rows. The producer copies Q and dO
// once per item, then K and V in blocks of 64 keys from the oldest to the newest through a ring of stages. The keys lie
// permuted in shared memory (hopper.cuh), so that the scans along a row are serial within a lane.
//
// Per block a warpgroup starts three products back to back: dz K of the block before, Q K^T and dO V^T of this one. It takes
// the odds while the last of them is still under way; dz goes from its registers straight into the next product. Which
// blocks a piece needs is known from the forward pass, so the producer and all warpgroups agree on the blocks of an item
// without a word; a warpgroup passes over those that only other pieces need.
//
// Memory past the rows of a document. What lies in Q and dO behind the document's last row only reaches rows of dq that are
// not written and to sums that nobody reads. Keys behind it are zeroed in shared memory. A tensor map reads no further than
// the tensor; blocks that start within its last 64 rows are copied by ordinary loads with zeros behind.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Consumer warpgroups, and stages of the ring.
#ifndef WARPGROUPS
#define WARPGROUPS (HEAD_DIM > 64 ? 2 : 3)
#endif
#ifndef STAGES
#define STAGES 4
#endif
// 1: the warpgroups take turns in starting their products. 2: and the next one's turn comes when the scores are there, so that
// its products do not mix with these.
#ifndef TURNS
#define TURNS 0
#endif

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one or two chunks of 64 columns");
static_assert(KEYS == 64 && PIECE == 64, "a block of the state is a block of keys here");

// Chunks of 64 columns, and bytes of one of 64 rows.
constexpr int COLUMN_CHUNKS = HEAD_DIM / 64, CHUNK_BYTES = 64 * 128;
// Bytes of 64 rows of Q, dO, K or V.
constexpr int TILE_BYTES = COLUMN_CHUNKS * CHUNK_BYTES;
constexpr int ROWS = PIECE * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
constexpr int PRODUCER_REGISTERS = WARPGROUPS > 2 ? 32 : 40, CONSUMER_REGISTERS = WARPGROUPS > 2 ? 160 : 232;
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * launch_registers(THREADS), "too many registers");

struct Item {
    Tile tile;
    // -1: there is no further item.
    int head;
    // Blocks of keys that some piece of it needs.
    int oldest, end;
};

// Behind the tiles in shared memory.
struct Control {
    u64 q_full, q_empty;
    u64 full[STAGES], empty[STAGES];
    Item item;
};
static_assert(sizeof(Control) <= 512, "the host reserves 512 bytes");

// Shared memory: Q of all pieces, dO of all pieces, then STAGES times K and V.
constexpr int RING = 2 * WARPGROUPS * TILE_BYTES, STAGE_BYTES = 2 * TILE_BYTES, CONTROL = RING + STAGES * STAGE_BYTES;

struct Backward {
    const bf16 *k, *v;
    const float *drem, *sticks;
    float* sums;
    const int* first_blocks;
    bf16* dq;
    const int* tiles;
    u32* ticket;
    int key_stride, value_stride;
    // Of `heads` query heads the call is about `head_count` from `first_head` on, `section` at a time, so that their keys and
    // values stay in L2.
    int tokens, tile_count, heads, group, first_head, head_count, section;
    // State entries and pieces of one head.
    int entries, pieces;
    int own_key;
    float factor, scale;
};

// ------------------------------------------------------------------------------------------------ producer

DEVICE void produce(const Backward& p, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                    const TensorMap& do_map, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL);
    const u32 q_shared = shared_address(shared), do_shared = q_shared + WARPGROUPS * TILE_BYTES;

    // A ring's stages start out empty: the producer is one round ahead.
    Place at = {0, 1};
    u32 item_parity = 1;
    const int items = p.tile_count * p.head_count;
    int index = blockIdx.x;
    while (index < items) {
        const Position position = position_of(index, p.tile_count, p.first_head, p.head_count, p.section);
        const int head = position.head;
        const Tile tile = read_tile(p.tiles, position.tile);
        const int column = head / p.group * HEAD_DIM;
        int next = 0;
        if (lane == 0) next = atomicAdd(p.ticket, 1);

        const int end = visible_blocks(min(tile.first + ROWS, tile.length), p.own_key);
        int oldest = 0;
        if (p.first_blocks != nullptr) {
            oldest = end;
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++)
                if (tile.first + w * PIECE < tile.length)
                    oldest = min(oldest, p.first_blocks[(i64)head * p.pieces + tile.piece + tile.first / PIECE + w]);
        }
        auto push = [&](int b) {
            barrier_wait(shared_address(&control.empty[at.stage]), at.parity);
            const u32 full = shared_address(&control.full[at.stage]);
            u8* to = shared + RING + at.stage * STAGE_BYTES;
            const int row = tile.start + b * KEYS;
            if (row + KEYS <= p.tokens) {
                if (lane == 0) {
                    barrier_expect(full, STAGE_BYTES);
#pragma unroll
                    for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                        const u32 k_to = shared_address(to) + chunk * CHUNK_BYTES;
                        copy_box(k_to, k_map, full, column + 64 * chunk, row, 0, 0);
                        copy_box(k_to + TILE_BYTES, v_map, full, column + 64 * chunk, row, 0, 0);
                    }
                }
            } else {
                copy_last_tile<KEYS>(to, p.k + (i64)row * p.key_stride + column, p.key_stride, p.tokens - row);
                copy_last_tile<KEYS>(to + TILE_BYTES, p.v + (i64)row * p.value_stride + column, p.value_stride, p.tokens - row);
                publish_shared();
                __syncwarp();
                if (lane == 0) barrier_arrive(full);
            }
            __syncwarp();
            at.advance<STAGES>();
        };

        if (oldest < end) push(oldest);
        barrier_wait(shared_address(&control.q_empty), item_parity);
        if (lane == 0) {
            control.item = {tile, head, oldest, end};
            const u32 full = shared_address(&control.q_full);
            barrier_expect(full, 2 * WARPGROUPS * TILE_BYTES);
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++)
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                    const int x = head * HEAD_DIM + 64 * chunk, y = tile.start + tile.first + w * PIECE;
                    const u32 to = w * TILE_BYTES + chunk * CHUNK_BYTES;
                    copy_box(q_shared + to, q_map, full, x, y);
                    copy_box(do_shared + to, do_map, full, x, y);
                }
        }
        __syncwarp();
        for (int b = oldest + 1; b < end; b++) push(b);
        index = __shfl_sync(FULL_MASK, next, 0) + gridDim.x;
        item_parity ^= 1;
    }
    barrier_wait(shared_address(&control.q_empty), item_parity);
    if (lane == 0) {
        control.item.head = -1;
        barrier_arrive(shared_address(&control.q_full));
    }
}

// ------------------------------------------------------------------------------------------------ consumers

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
    for (int r = 0; r < 2; r++) left[r] = stick[r] * newer_product(total[r]);
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

DEVICE void consume(const Backward& p, u8* shared) {
    const int group = uniform(threadIdx.x / 128) - 1;
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, c = lane & 3;
    Control& control = *(Control*)(shared + CONTROL);
    const u32 ring = shared_address(shared + RING);
    const u64 q_operand = operand(shared_address(shared + group * TILE_BYTES), 0);
    const u64 do_operand = operand(shared_address(shared + (WARPGROUPS + group) * TILE_BYTES), 0);
    const int own_barrier = 1 + group, turn = 1 + WARPGROUPS + group;
    const int next_turn = 1 + WARPGROUPS + (group + 1) % WARPGROUPS;

    Place at = {0, 0};
    auto wait_block = [&]() { barrier_wait(shared_address(&control.full[at.stage]), at.parity); };
    auto release = [&](u64& empty) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };
    auto take_turn = [&]() {
        if (TURNS) named_wait(turn, 256);
    };
    auto pass_turn = [&]() {
        if (TURNS) named_arrive(next_turn, 256);
    };
    auto pass_over = [&]() {
        wait_block();
        take_turn();
        pass_turn();
        release(control.empty[at.stage]);
        at.advance<STAGES>();
    };
    if (TURNS && group == WARPGROUPS - 1) named_arrive(next_turn, 256);

    float z[KEYS / 2], dp[KEYS / 2], dq[HEAD_DIM / 2];
    u32 dz[KEYS / 16][4];
    // z = Q K^T and, after it, dp = dO V^T with the block of a stage.
    auto start_scores = [&](int stage) {
        const u64 k_operand = operand(ring + stage * STAGE_BYTES, 0);
        multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(z, q_operand, k_operand);
        products_commit();
        const u64 v_operand = operand(ring + stage * STAGE_BYTES + TILE_BYTES, 0);
        multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(dp, do_operand, v_operand);
        products_commit();
    };
    // dq += dz K with the block of a stage.
    auto start_gradient = [&](int stage) {
        const u64 k_operand = operand(ring + stage * STAGE_BYTES, CHUNK_BYTES);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) multiply_registers(dq, dz[step], operand_at(k_operand, step * 2048));
    };

    u32 item_parity = 0;
    while (true) {
        barrier_wait(shared_address(&control.q_full), item_parity);
        item_parity ^= 1;
        const volatile Item& item = control.item;
        const int head = uniform(item.head);
        if (head < 0) break;
        const Tile tile = uniform(item.tile);
        const int oldest = uniform(item.oldest), end = uniform(item.end);

        // This warpgroup's piece of the item; this lane's rows in the document are row and row + 8.
        const int first = tile.first + group * PIECE, row = first + warp * 16 + g, piece = first / PIECE;
        const bool exists = first < tile.length;
        // The blocks that it needs: [own_oldest, own_end).
        const int own_end = exists ? visible_blocks(min(first + PIECE, tile.length), p.own_key) : oldest;
        int own_oldest = oldest;
        if (exists && p.first_blocks != nullptr)
            own_oldest = uniform(min(p.first_blocks[(i64)head * p.pieces + tile.piece + piece], own_end));
        const i64 state = ((i64)(head - p.first_head) * p.entries + first_entry(tile, exists ? piece : 0)) * PIECE
                          + (row & (PIECE - 1));
        const float* sticks = p.sticks + state;
        float* sums = p.sums + state;
        // What newer keys leave to block b.
        auto read_sticks = [&](int b, float (&stick)[2]) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const bool in = row + 8 * r < tile.length;
                stick[r] = !in ? 0.0f : b + 1 >= own_end ? 1.0f : sticks[(i64)(b + 1) * PIECE + 8 * r];
            }
        };
        float sum[2], next_stick[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = 0.0f;
            // The oldest entry of the state is the remainder.
            if (p.drem != nullptr && row + 8 * r < tile.length) {
                const float rem = own_end > own_oldest ? sticks[(i64)own_oldest * PIECE + 8 * r] : 1.0f;
                sum[r] = p.drem[(i64)(tile.start + row + 8 * r) * p.heads + head] * rem;
            }
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) dq[i] = 0.0f;

        int b = oldest;
        for (; b < min(own_oldest, end); b++) pass_over();
        if (b < own_end) {
            read_sticks(b, next_stick);
            wait_block();
            // The block with the document's last keys is needed by the document's last piece alone.
            auto clear_behind = [&]() {
                if ((b + 1) * KEYS > tile.length) {
                    // Half a row of K or V per thread.
                    u8* to = shared + RING + at.stage * STAGE_BYTES + (thread >> 6) * TILE_BYTES + (thread & 63) * 128;
                    if (b * KEYS + permuted_key<KEYS>(thread & 63) >= tile.length) {
#pragma unroll
                        for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
#pragma unroll
                            for (int i = 0; i < 8; i++) *(uint4*)(to + chunk * CHUNK_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
                    }
                    publish_shared();
                    named_wait(own_barrier, 128);
                }
            };
            clear_behind();
            take_turn();
            // Its zeros are written now, not while products are under way.
            pin(dq);
            products_begin();
            start_scores(at.stage);
            if (TURNS == 1) pass_turn();
            while (true) {
                const float stick[2] = {next_stick[0], next_stick[1]};
                if (b + 1 < own_end) read_sticks(b + 1, next_stick);
                if (c == 0) {
#pragma unroll
                    for (int r = 0; r < 2; r++) sums[(i64)b * PIECE + 8 * r] = sum[r];
                }
                products_wait<1>();
                pin(z);
                if (TURNS == 2) pass_turn();
                if (b > own_oldest) release(control.empty[at.stage == 0 ? STAGES - 1 : at.stage - 1]);
                // Only the piece's newest block has hidden keys.
                if ((b + 1) * KEYS > first + p.own_key) hide_keys(z, row + p.own_key - b * KEYS - c * (KEYS / 4), p.factor);
                float keep[KEYS / 2], left[2];
                take_odds(z, keep, p.factor, stick, left);
                products_wait<0>();
                pin(dp);
                score_gradients(z, dp, keep, left, sum);
#pragma unroll
                for (int step = 0; step < KEYS / 16; step++)
#pragma unroll
                    for (int x = 0; x < 4; x++) dz[step][x] = pack_bf16(z[8 * step + 2 * x], z[8 * step + 2 * x + 1]);
                if (++b == own_end) break;
                const int stage = at.stage;
                at.advance<STAGES>();
                wait_block();
                clear_behind();
                take_turn();
                pin(dz);
                products_begin();
                start_gradient(stage);
                start_scores(at.stage);
                if (TURNS == 1) pass_turn();
            }
            pin(dz);
            products_begin();
            start_gradient(at.stage);
            products_commit();
            products_wait<0>();
            release(control.empty[at.stage]);
            at.advance<STAGES>();
        }
        // Q and dO are read.
        release(control.q_empty);
        pin(dq);
        // What only later pieces of the item see.
        for (; b < end; b++) pass_over();
        if (!exists) continue;
        const i64 stride = (i64)p.heads * HEAD_DIM;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int to_row = row + 8 * r;
            bf16* to = p.dq + (tile.start + to_row) * stride + head * HEAD_DIM + c * 8;
            store_row(to, dq, r, p.scale, to_row < tile.length);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stick_breaking_dq_hopper_bf16(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap do_map, const bf16* k, const bf16* v, const float* drem, const float* sticks,
    float* sums, const int* first_blocks, bf16* dq, const int* tiles, u32* ticket, int key_stride, int value_stride,
    int tokens, int tile_count, int heads, int group, int first_head, int head_count, int section, int entries, int pieces,
    int own_key, float factor, float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    Control& control = *(Control*)(shared + CONTROL);
    const Backward p = {k, v, drem, sticks, sums, first_blocks, dq, tiles, ticket, key_stride, value_stride, tokens,
                        tile_count, heads, group, first_head, head_count, section, entries, pieces, own_key, factor, scale};
    if (threadIdx.x == 0) {
        if (shared_address(shared) % 1024 != 0) __trap();
        prefetch_map(q_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        prefetch_map(do_map);
        // Full: one arrival of the producer and the bytes; empty: one of each consumer warp.
        barrier_init(shared_address(&control.q_full), 1);
        barrier_init(shared_address(&control.q_empty), 4 * WARPGROUPS);
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(&control.full[stage]), 1);
            barrier_init(shared_address(&control.empty[stage]), 4 * WARPGROUPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(p, q_map, k_map, v_map, do_map, shared);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}
