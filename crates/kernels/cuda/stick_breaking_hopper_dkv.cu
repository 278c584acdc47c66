// The gradients of keys and values on Hopper (sm_90a): bf16, head dims 64 and 128. It reads and writes what `backward_dkdv`
// in stick_breaking.cu does, state included, so either follows either kernel for the queries.
//
// A persistent block of one producer warp and WARPGROUPS consumer warpgroups takes items (WARPGROUPS blocks of 64 keys of one
// key/value head) by an atomic ticket, those that most queries see first. A consumer warpgroup has one block of keys: its K
// and V stay in shared memory, its dK and dV in registers, over all pieces of 64 queries that see it and all query heads of
// the group. The producer brings Q, dO and the state of a piece through a ring of stages, all warpgroups read them there.
//
// For one piece a warpgroup computes
//     S = Q K^T and dP = dO V^T     64 queries x 64 keys, in registers
//     A and dz                      by the scan along the rows, which is why queries are the rows of S
//     dV += A^T dO, dK += dz^T Q    A and dz rounded to bf16 in shared memory, read from there with rows and columns
//                                   exchanged
// A lies in two buffers by turns and dz in one. With the barrier that stands between A and its product that is enough: all
// of a warpgroup's products before those of this piece were complete in each of its warps before it came there.
//
// The keys of a block lie permuted in shared memory: row 8j + 2c + e holds key 16c + 2j + e, so that lane c of a quad owns
// 16 keys in a row. With that the scan takes four shuffles per row.
//
// The stream of pieces. Each stage names its piece and the oldest block that the piece visits; NO_MORE without data tells
// that the item is complete. Every warpgroup takes every stage, whether it has a use for it or not.
//
// Memory past the rows of a document. Rows of the next document in Q and dO are zeroed in shared memory and their sticks are
// taken as used up; keys of the next document are hidden. So not even a NaN passes from one document to another.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Consumer warpgroups, and stages of the ring.
#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM > 64 ? 3 : 4)
#endif
// 1: the scores of the next piece are computed while this one is scanned, which takes 32 registers more.
#ifndef OVERLAP
#define OVERLAP (HEAD_DIM > 64 ? 0 : 1)
#endif
// 1: two keys share a reciprocal.
#ifndef PAIRS
#define PAIRS (HEAD_DIM > 64 ? 0 : 1)
#endif
// 1: the warpgroups take turns in starting S and dP. Not with OVERLAP.
#ifndef TURNS
#define TURNS 0
#endif

static_assert(!(OVERLAP && TURNS), "with OVERLAP the products of several pieces are under way at a time");
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one or two chunks of 64 columns");
static_assert(KEYS == 64 && PIECE == 64, "blocks of keys and pieces of queries are tiles of 64 rows");

// Chunks of 64 columns, and bytes of one of 64 rows: of a block of keys, a piece of queries, or A or dz.
constexpr int COLUMN_CHUNKS = HEAD_DIM / 64;
constexpr int CHUNK_BYTES = 64 * 128;
constexpr int TILE_BYTES = COLUMN_CHUNKS * CHUNK_BYTES;
constexpr int ROWS = KEYS * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
// Registers of a producer thread and of a consumer thread: together what the block is launched with.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * launch_registers(THREADS), "too many registers");
// Keys of a block, and scores of a row, that one lane owns.
constexpr int OWN = KEYS / 4;

// What a stage is to a warpgroup: none, for the item is complete; a piece that does not visit its block; one that does; one
// that does and ends with its document, or whose newest block it is.
constexpr int NO_MORE = -1, NO_USE = 0, PLAIN = 1, AT_EDGE = 2;

struct Item {
    Tile tile;
    // -1: there is no further item.
    int kv_head;
    // Counts from 1.
    u32 number;
};

// What lies in shared memory ahead of Control: K and V of each warpgroup, the stages of Q and dO, twice A and once dz of each
// warpgroup.
constexpr int STAGES_AT = WARPGROUPS * 2 * TILE_BYTES, SCORES_AT = STAGES_AT + STAGES * 2 * TILE_BYTES;
constexpr int CONTROL_AT = SCORES_AT + WARPGROUPS * 3 * CHUNK_BYTES;

struct Control {
    // For each stage and block of keys: what newer keys leave to each row of the piece, and its sum over older keys.
    alignas(16) float sticks[STAGES][WARPGROUPS][PIECE];
    alignas(16) float sums[STAGES][WARPGROUPS][PIECE];
    u64 keys_full[WARPGROUPS], keys_empty[WARPGROUPS];
    u64 full[STAGES], empty[STAGES];
    // The piece in each stage, and what it is to each warpgroup.
    int piece[STAGES], use[STAGES][WARPGROUPS];
    Item items[WARPGROUPS];
    // The producer's next item.
    int next;
};
static_assert(sizeof(Control) <= STAGES * WARPGROUPS * 512 + 512, "the host reserves so much");

struct Backward {
    const bf16 *k, *v;
    const float *sticks, *sums;
    const int* first_blocks;
    bf16 *dk, *dv;
    const int* tiles;
    u32* ticket;
    int key_stride, value_stride;
    // `section` key/value heads at a time, so that what they read stays in L2. `kv_heads` of them from `first_kv_head` on.
    int tokens, tile_count, group, first_kv_head, kv_heads, section;
    // Elements from one token to the next in dk and dv.
    int gradient_stride;
    // State entries and pieces of one head.
    int entries, pieces;
    int own_key;
    float factor, scale;
};

// Places in the ring of stages are counted up to twice round it, which tells the parity too.
constexpr int PLACES = 2 * STAGES;
DEVICE int stage_of(int place) { return place < STAGES ? place : place - STAGES; }
DEVICE int parity_of(int place) { return place >= STAGES; }
DEVICE int next_place(int place) { return place == PLACES - 1 ? 0 : place + 1; }
DEVICE int previous_place(int place) { return place == 0 ? PLACES - 1 : place - 1; }

// ------------------------------------------------------------------------------------------------ products

// d += scores^T rows: 64 x 64 scores, 64 rows of all dimensions.
DEVICE void add_products(float (&d)[HEAD_DIM / 2], u32 scores, u32 rows) {
    const u64 a = operand(scores, 0), b = operand(rows, CHUNK_BYTES);
#pragma unroll
    for (int step = 0; step < PIECE / 16; step++) multiply_transposed(d, operand_at(a, step * 2048), operand_at(b, step * 2048));
    products_commit();
}

// ------------------------------------------------------------------------------------------------ producer

// It has few registers: what it does not need in its loops it reads from shared memory again.
DEVICE void produce(const Backward& p, const TensorMap& q_map, const TensorMap& g_map, const TensorMap& k_map,
                    const TensorMap& v_map, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL_AT);
    // The stages start out empty, and so do the tiles of keys: the producer is one round ahead.
    int at = STAGES;
    u32 number = 1;
    for (int index = blockIdx.x; index < p.tile_count * p.kv_heads; number++) {
        {
            const Position position = position_of(index, p.tile_count, p.first_kv_head, p.kv_heads, p.section);
            const int kv_head = position.head;
            const Tile tile = read_tile(p.tiles, position.tile);
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++) {
                barrier_wait(shared_address(&control.keys_empty[w]), number & 1);
                if (lane == 0) control.items[w] = {tile, kv_head, number};
            }
        }
        __syncwarp();
        const volatile Item& item = control.items[0];
        const volatile Tile& tile = item.tile;
        if (lane == 0) {
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++) {
                const u32 full = shared_address(&control.keys_full[w]);
                const int row = tile.start + tile.first + w * KEYS;
                // A block past the document has no use, and one past the tensor its warpgroup copies.
                if (tile.first + w * KEYS < tile.length && row + KEYS <= p.tokens) {
                    barrier_expect(full, 2 * TILE_BYTES);
#pragma unroll
                    for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                        const u32 to = shared_address(shared) + w * 2 * TILE_BYTES + chunk * CHUNK_BYTES;
                        const int column = item.kv_head * HEAD_DIM + chunk * 64;
                        copy_box(to, k_map, full, column, row, 0, 0);
                        copy_box(to + TILE_BYTES, v_map, full, column, row, 0, 0);
                    }
                } else {
                    barrier_arrive(full);
                }
            }
        }
        if (lane == 0) control.next = gridDim.x + atomicAdd(p.ticket, 1);

        // Brings a piece of query head `head`, counted from the first one of the launch.
        auto push = [&](int head, int piece, int oldest) {
            barrier_wait(shared_address(&control.empty[stage_of(at)]), parity_of(at));
            if (lane == 0) {
                const int first_block = tile.first / KEYS, end = min((piece + 1) * PIECE, tile.length);
                const int visible = visible_blocks(end, p.own_key) - first_block;
                control.piece[stage_of(at)] = piece;
#pragma unroll
                for (int w = 0; w < WARPGROUPS; w++)
                    control.use[stage_of(at)][w] = w >= visible || first_block + w < oldest          ? NO_USE
                                               : w + 1 == visible || end < (piece + 1) * PIECE ? AT_EDGE
                                                                                               : PLAIN;
                const u32 full = shared_address(&control.full[stage_of(at)]);
                const u32 sums = max(min(WARPGROUPS, visible), 0) * PIECE * 4;
                const u32 sticks = max(min(WARPGROUPS, visible - 1), 0) * PIECE * 4;
                barrier_expect(full, 2 * TILE_BYTES + sums + sticks);
                const u32 to = shared_address(shared) + STAGES_AT + stage_of(at) * 2 * TILE_BYTES;
                const int column = (p.first_kv_head * p.group + head) * HEAD_DIM, row = tile.start + piece * PIECE;
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                    copy_box(to + chunk * CHUNK_BYTES, q_map, full, column + chunk * 64, row);
                    copy_box(to + TILE_BYTES + chunk * CHUNK_BYTES, g_map, full, column + chunk * 64, row);
                }
                const i64 entry = (i64)head * p.entries + tile.entry + piece * (piece + 1) / 2 * (PIECE / KEYS) + first_block;
                if (sums > 0) copy_bytes(shared_address(control.sums[stage_of(at)]), p.sums + entry * PIECE, sums, full);
                if (sticks > 0)
                    copy_bytes(shared_address(control.sticks[stage_of(at)]), p.sticks + (entry + 1) * PIECE, sticks, full);
            }
            __syncwarp();
            at = next_place(at);
        };
        for (int member = 0; member < p.group; member++) {
            const int head = (item.kv_head - p.first_kv_head) * p.group + member;
            for (int some = tile.first / PIECE; some * PIECE < tile.length; some += 32) {
                // 32 pieces at a time: those that visit one of the blocks.
                int oldest = 0;
                bool wanted = (some + lane) * PIECE < tile.length;
                if (p.first_blocks != nullptr && wanted) {
                    oldest = p.first_blocks[(i64)(p.first_kv_head * p.group + head) * p.pieces + tile.piece + some + lane];
                    wanted = oldest < tile.first / KEYS + WARPGROUPS;
                }
                for (u32 left = __ballot_sync(FULL_MASK, wanted); left != 0; left &= left - 1) {
                    const int bit = __ffs(left) - 1;
                    push(head, some + bit, __shfl_sync(FULL_MASK, oldest, bit));
                }
            }
        }
        barrier_wait(shared_address(&control.empty[stage_of(at)]), parity_of(at));
        if (lane == 0) {
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++) control.use[stage_of(at)][w] = NO_MORE;
            barrier_arrive(shared_address(&control.full[stage_of(at)]));
        }
        at = next_place(at);
        __syncwarp();
        index = uniform(*(volatile int*)&control.next);
    }
#pragma unroll
    for (int w = 0; w < WARPGROUPS; w++) {
        barrier_wait(shared_address(&control.keys_empty[w]), number & 1);
        if (lane == 0) {
            control.items[w].kv_head = -1;
            barrier_arrive(shared_address(&control.keys_full[w]));
        }
    }
}

// ------------------------------------------------------------------------------------------------ consumers

// threadIdx.x, read anew, so that nothing that is made of it takes a register meanwhile.
DEVICE int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// Scores to odds e, which may take their place, keep = 1 / (1 + e) = 1 - beta, and what the quad's lanes of newer keys
// leave.
DEVICE void take_odds(const float (&s)[32], float factor, float (&e)[32], float (&keep)[2][OWN], float (&newer)[2]) {
    float all[2];
#pragma unroll
    for (int x = 0; x < OWN; x += 2)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float& first = e[score_at(r, x)];
            float& second = e[score_at(r, x + 1)];
            first = exp2_approx(clamp(s[score_at(r, x)] * factor, ODDS_LIMIT));
            second = exp2_approx(clamp(s[score_at(r, x + 1)] * factor, ODDS_LIMIT));
            const float one = 1.0f + first, two = 1.0f + second;
            float both;
            if (PAIRS) {
                both = rcp_approx(one * two);
                keep[r][x] = both * two;
                keep[r][x + 1] = both * one;
            } else {
                keep[r][x] = rcp_approx(one);
                keep[r][x + 1] = rcp_approx(two);
                both = keep[r][x] * keep[r][x + 1];
            }
            all[r] = x == 0 ? both : all[r] * both;
        }
#pragma unroll
    for (int r = 0; r < 2; r++) newer[r] = newer_product(all[r]);
}

// The weights A, rounded, to the tile of A; g becomes A g. `left` is what all keys newer than the lane's leave to each row,
// `grown` becomes the sum of A g over the lane's keys. `to`: this lane's row of the tile, for store_matrices.
DEVICE void weigh(const float (&e)[32], const float (&keep)[2][OWN], float (&left)[2], float (&g)[32], float (&grown)[2], u32 to) {
    grown[0] = grown[1] = 0.0f;
#pragma unroll
    for (int x = OWN - 4; x >= 0; x -= 4) {
        u32 words[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float a[4];
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                left[r] *= keep[r][x + i];
                a[i] = e[score_at(r, x + i)] * left[r];
                float& ag = g[score_at(r, x + i)];
                ag *= a[i];
                grown[r] += ag;
            }
            words[r] = pack_bf16(a[0], a[1]);
            words[2 + r] = pack_bf16(a[2], a[3]);
        }
        store_matrices(to ^ (x / 2 << 4), words);
    }
}

// dz, rounded, to the tile of dz. `before` is the sum of A g over all keys older than the lane's.
DEVICE void differentiate(const float (&e)[32], const float (&keep)[2][OWN], const float (&ag)[32], float (&before)[2], u32 to) {
#pragma unroll
    for (int x = 0; x < OWN; x += 4) {
        u32 words[4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float dz[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // dz = keep a g - beta before, with beta = e keep.
                dz[i] = keep[r][x + i] * fmaf(-e[score_at(r, x + i)], before[r], ag[score_at(r, x + i)]);
                before[r] += ag[score_at(r, x + i)];
            }
            words[r] = pack_bf16(dz[0], dz[1]);
            words[2 + r] = pack_bf16(dz[2], dz[3]);
        }
        store_matrices(to ^ (x / 2 << 4), words);
    }
}

// A block of keys of one head by ordinary loads of one warpgroup, in the order of permuted_key, zeros behind `valid` rows.
DEVICE void copy_block(u8* to, const bf16* from, int stride, int valid) {
    const int thread = threadIdx.x & 127, unit = thread & 7;
#pragma unroll 2
    for (int row = thread >> 3; row < KEYS; row += 16) {
        const int key = permuted_key<KEYS>(row);
#pragma unroll
        for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (key < valid) x = *(const uint4*)(from + (i64)key * stride + chunk * 64 + unit * 8);
            *(uint4*)(to + chunk * CHUNK_BYTES + row * 128 + ((unit ^ (row & 7)) << 4)) = x;
        }
    }
}

// Rounds 64 x HEAD_DIM accumulators, times `factor`, and writes the first `valid` keys of the block.
DEVICE void write_block(bf16* to, int stride, int valid, const float (&d)[HEAD_DIM / 2], float factor) {
    const int thread = thread_again() & 127, row = thread / 32 * 16 + (thread & 31) / 4;
    to += (thread & 3) * 8;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int key = permuted_key<KEYS>(row + 8 * r);
        store_row(to + (i64)key * stride, d, r, factor, key < valid);
    }
}

DEVICE void consume(const Backward& p, u8* shared) {
    const int group = uniform(threadIdx.x / 128) - 1;
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, c = lane & 3;
    const int own_barrier = 1 + group, turn = 1 + WARPGROUPS + group;
    const int next_turn = 1 + WARPGROUPS + (group + 1) % WARPGROUPS;
    Control& control = *(Control*)(shared + CONTROL_AT);
    u8* k_tile = shared + group * 2 * TILE_BYTES;
    const u32 k_shared = shared_address(k_tile), v_shared = k_shared + TILE_BYTES;
    const u32 scores = shared_address(shared + SCORES_AT) + group * 3 * CHUNK_BYTES;
    // The lane's place in a tile of A or dz: row 16 warp + lane % 16, unit lane / 16.
    const u32 score_lane = scores + (warp * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
    // The lane's rows in a piece are row and row + 8.
    const int row = warp * 16 + (lane >> 2);

    // The place of the next stage, and the parity of the next item.
    int at = 0;
    u32 item_parity = 0;
    auto release = [&](u64& empty) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };
    // One turn per stage and warpgroup.
    auto take_turn = [&]() {
        if (TURNS) named_wait(turn, 256);
    };
    auto pass_turn = [&]() {
        if (TURNS) named_arrive(next_turn, 256);
    };
    if (TURNS && group == WARPGROUPS - 1) named_arrive(next_turn, 256);
    float s[32], g[32], dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];

    while (true) {
        barrier_wait(shared_address(&control.keys_full[group]), item_parity);
        if (uniform(((volatile Item&)control.items[group]).kv_head) < 0) break;
        {
            const volatile Item& item = control.items[group];
            const int start = uniform(item.tile.start), first = uniform(item.tile.first) + group * KEYS;
            const int valid = uniform(item.tile.length) - first;
            if (valid > 0 && start + first + KEYS > p.tokens) {
                const i64 token = start + first, column = item.kv_head * HEAD_DIM;
                copy_block(k_tile, p.k + token * p.key_stride + column, p.key_stride, valid);
                copy_block(k_tile + TILE_BYTES, p.v + token * p.value_stride + column, p.value_stride, valid);
                publish_shared();
                named_wait(own_barrier, 128);
            }
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) dk[i] = dv[i] = 0.0f;

        // What the next stage is, which is there then.
        int use = NO_USE;
        auto look = [&]() {
            barrier_wait(shared_address(&control.full[stage_of(at)]), parity_of(at));
            use = uniform(*(volatile int*)&control.use[stage_of(at)][group]);
            return use > 0;
        };
        // Whether the stage before that is still in use: its products may be under way.
        bool holding = false;
        // Goes on to the next stage that has a use; false if there is none. Whoever has no use for the next one first gives
        // back the one that it holds, for the producer may wait for that.
        auto find = [&]() {
            while (!look()) {
                if (holding) {
                    products_wait<0>();
                    release(control.empty[stage_of(previous_place(at))]);
                    holding = false;
                    // The buffer of A that comes next may be the one that was read last.
                    named_wait(own_barrier, 128);
                }
                release(control.empty[stage_of(at)]);
                at = next_place(at);
                if (use < 0) return false;
                take_turn();
                pass_turn();
            }
            return true;
        };
        auto stage_at = [&](int place) { return shared_address(shared + STAGES_AT) + stage_of(place) * 2 * TILE_BYTES; };
        // What the copies of the next stage, which is AT_EDGE, left open: rows past the document's end become zeros without a
        // stick, and to the piece's newest block a whole stick is left.
        auto complete = [&]() {
            const volatile Item& item = control.items[thread_again() / 128 - 1];
            const int piece = *(volatile int*)&control.piece[stage_of(at)], in_piece = thread >> 1;
            const int valid = item.tile.length - piece * PIECE;
            if (in_piece >= valid) {
                // Half a row per thread. Every warpgroup does so, each ahead of its own products.
                u8* to = shared + STAGES_AT + stage_of(at) * 2 * TILE_BYTES + thread * 64;
#pragma unroll
                for (int chunk = 0; chunk < 2 * COLUMN_CHUNKS; chunk++)
#pragma unroll
                    for (int i = 0; i < 4; i++) *(uint4*)(to + chunk * CHUNK_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
                control.sums[stage_of(at)][group][in_piece] = 0.0f;
                control.sticks[stage_of(at)][group][in_piece] = 0.0f;
            } else if (item.tile.first / KEYS + group + 1 >= visible_blocks(piece * PIECE + min(valid, PIECE), p.own_key)) {
                control.sticks[stage_of(at)][group][in_piece] = 1.0f;
            }
            publish_shared();
            named_wait(own_barrier, 128);
        };
        // Keys of the stage in use that are hidden: from the row's own on (or past its own), or past the document.
        auto hide = [&](int place) {
            const volatile Item& item = control.items[thread_again() / 128 - 1];
            const int piece = *(volatile int*)&control.piece[stage_of(place)];
            const int length = item.tile.length, first_key = item.tile.first + group * KEYS + c * OWN;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int visible = min(piece * PIECE + row + 8 * r + p.own_key, length) - first_key;
#pragma unroll
                for (int x = 0; x < OWN; x++)
                    if (x >= visible) s[score_at(r, x)] = p.factor < 0.0f ? INFINITY_F : -INFINITY_F;
            }
        };

        auto start_scores = [&](int place) {
            products_begin();
            multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(s, operand(stage_at(place), 0), operand(k_shared, 0));
            products_commit();
        };
        while (find()) {
            if (use == AT_EDGE) complete();
            take_turn();
            start_scores(at);
            if (OVERLAP) {
                products_wait<0>();
                pin(s);
            }
            bool ahead = false;
            do {
                products_begin();
                multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(g, operand(stage_at(at) + TILE_BYTES, 0), operand(v_shared, 0));
                products_commit();
                pass_turn();
                if (!OVERLAP) {
                    products_wait<1>();
                    pin(s);
                }
                const int now = at;
                at = next_place(at);
                if (!OVERLAP && holding) release(control.empty[stage_of(previous_place(now))]);
                if (use == AT_EDGE) hide(now);
                float keep[2][OWN], left[2], grown[2], sum[2], other[32];
                float (&e)[32] = OVERLAP ? other : s;
                take_odds(s, p.factor, e, keep, left);
#pragma unroll
                for (int r = 0; r < 2; r++) left[r] *= control.sticks[stage_of(now)][group][row + 8 * r];
                if (OVERLAP) {
                    ahead = look();
                    if (use == AT_EDGE) complete();
                    // Without a further piece once more that of this one, which nobody reads: all ways have the same products.
                    start_scores(ahead ? at : now);
                }
                products_wait<OVERLAP ? 1 : 0>();
                pin(g);
                if (OVERLAP && holding) release(control.empty[stage_of(previous_place(now))]);
                holding = true;
                weigh(e, keep, left, g, grown, score_lane + (now & 1) * CHUNK_BYTES);
                publish_shared();
                named_wait(own_barrier, 128);
                products_begin();
                add_products(dv, scores + (now & 1) * CHUNK_BYTES, stage_at(now) + TILE_BYTES);
#pragma unroll
                for (int r = 0; r < 2; r++) sum[r] = control.sums[stage_of(now)][group][row + 8 * r] + older_sum(grown[r]);
                differentiate(e, keep, g, sum, score_lane + 2 * CHUNK_BYTES);
                publish_shared();
                named_wait(own_barrier, 128);
                products_begin();
                add_products(dk, scores + 2 * CHUNK_BYTES, stage_at(now));
                if (OVERLAP) {
                    // dV and dK are behind it.
                    products_wait<2>();
                    pin(s);
                }
            } while (ahead);
        }
        products_wait<0>();
        pin(dk);
        pin(dv);
        const volatile Item& done = control.items[thread_again() / 128 - 1];
        const int first = done.tile.first + group * KEYS, valid = done.tile.length - first;
        const i64 to = (i64)(done.tile.start + first) * p.gradient_stride + done.kv_head * HEAD_DIM;
        item_parity = done.number & 1;
        release(control.keys_empty[group]);
        write_block(p.dk + to, p.gradient_stride, valid, dk, p.scale);
        write_block(p.dv + to, p.gradient_stride, valid, dv, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stick_breaking_backward_dkdv_hopper_bf16(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap g_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const bf16* k, const bf16* v, const float* sticks, const float* sums,
    const int* first_blocks, bf16* dk, bf16* dv, const int* tiles, u32* ticket, int key_stride, int value_stride, int tokens,
    int tile_count, int group, int first_kv_head, int kv_heads, int section, int gradient_stride, int entries, int pieces,
    int own_key, float factor, float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    Control& control = *(Control*)(shared + CONTROL_AT);
    const Backward p = {k, v, sticks, sums, first_blocks, dk, dv, tiles, ticket, key_stride, value_stride, tokens, tile_count,
                        group, first_kv_head, kv_heads, section, gradient_stride, entries, pieces, own_key, factor, scale};
    if (threadIdx.x == 0) {
        if (shared_address(shared) % 1024 != 0) __trap();
        prefetch_map(q_map);
        prefetch_map(g_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        // Full: one arrival of the producer and the bytes; empty: one of each consumer warp.
        for (int w = 0; w < WARPGROUPS; w++) {
            barrier_init(shared_address(&control.keys_full[w]), 1);
            barrier_init(shared_address(&control.keys_empty[w]), 4);
        }
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(&control.full[stage]), 1);
            barrier_init(shared_address(&control.empty[stage]), 4 * WARPGROUPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(p, q_map, g_map, k_map, v_map, shared);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}
