// The whole backward pass in one on Hopper (sm_90a): bf16, head dims 64 and 128. It reads the state that the forward pass or
// the kernel that rebuilds it wrote, and computes what `backward_dq` and `backward_dkdv` in stick_breaking.cu do, with five
// products and one scan per pair instead of seven and two.
//
// A persistent block takes items (two blocks of 64 keys of one key/value head) by an atomic ticket, those that most queries
// see first. Each of its two consumer warpgroups has one block of keys: K and V stay in shared memory, dK and dV in registers,
// over all pieces of 64 queries that see the item, newest first, and all query heads of the group. Of the first warpgroup three
// warps work:
//     the producer      brings Q, dO and the state of a piece through a ring of stages
//     the sum keeper    brings to each stage the piece's sums over older keys, from the item before
//     the turn keeper   lets the warpgroups add to dQ when it is this item's turn, and passes the turn on
// For one piece a warpgroup computes
//     S = Q K^T and dP = dO V^T     64 queries x 64 keys, in registers
//     A and dz                      by the scan along the rows, rounded to bf16 in shared memory
//     dV += A^T dO, dK += dz^T Q    read from there with rows and columns exchanged
//     dQ += dz K                    half of the columns, over both blocks of keys
// dQ comes a piece late, or two, so that a warpgroup need not wait for the other one's dz: the second one follows the first one,
// whose sums it needs, by up to a piece. At head dim 64 there are registers left to compute S one piece ahead, and to compute and
// add dQ while the sums are exchanged. At 128 that is done before dP and the scan, which need the registers.
//
// The chain of a piece. What older keys add up to for each row is passed on from item to item, older ones first, and so is the
// turn to add to dQ, which is float32 in global memory until `stick_breaking_finish_hopper` rounds it. So the order of all
// additions is fixed, and two runs give the same bits. The item with the oldest block that the piece visits starts the chain:
// with the remainder's gradient, and by writing dQ instead of adding.
//     sums   one word of 64 bits per row: the float, and above it the first block that it does not count. Value and number come
//            together, so that neither side needs a fence.
//     turns  one number per piece: the first block that dQ does not count. Behind a fence.
// An item waits for older ones of the same head and document alone. They come first in the list of tiles, and so have smaller
// tickets: whoever waits does so for items that running blocks have taken, and the one with the smallest ticket for none. All
// items of a head start with the same piece, the newest, so that an item follows the one before it by less than a piece.
//
// Both warpgroups take every stage, so that nothing diverges: where the piece does not visit a block, all of its keys are
// hidden. That is one block in a piece's newest item, at most, and one in its oldest (both, if the piece is a row that does not
// see its own key and begins the item).
//
// Shared memory, KiB at head dim 64 / 128: K and V 32 / 64, stages of Q and dO 16 / 32 each, A and dz twice each 64. 160 with
// four stages, 224 with three, and the state. Registers at 128: dK and dV 128, S (later e) 32, dP (later A g) 32, keep (before
// that dQ) 32; 16 of 240 are left for all else. So addresses are computed where they are needed, from one word and, where they
// are the same in all lanes, in uniform registers.
//
// A lies in two buffers by turns: all of a warpgroup's products before those of this piece were complete in each of its warps
// before it came to the barrier between A and its product. dz does too, with barriers that count both warpgroups.
//
// The keys of a block lie permuted in shared memory: row 8j + 2c + e holds key 16c + 2j + e, so that lane c of a quad owns
// 16 keys in a row. With that the scan takes few shuffles per row.
//
// Memory past the rows of a document. Rows of the next document in Q and dO are zeroed in shared memory and their sticks are
// taken as used up; keys of the next document are zeroed and hidden. So not even a NaN passes from one document to another.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Stages of the ring.
#ifndef STAGES
#define STAGES (HEAD_DIM > 64 ? 3 : 4)
#endif
// 1: two keys share a reciprocal.
#ifndef PAIRS
#define PAIRS (HEAD_DIM > 64 ? 0 : 1)
#endif
// 1: the scores of the next piece are computed while one is scanned.
#ifndef AHEAD
#define AHEAD (HEAD_DIM > 64 ? 0 : 1)
#endif

// Places are counted without end; three stages would lose count at 2^32 of them, but a block has 2^29 at most: the sums of all
// that it adds to are in memory.
static_assert(STAGES >= 2 && STAGES <= 4, "a stage is given back when the next one is in use, and two bits hold its number");
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one or two chunks of 64 columns");
static_assert(KEYS == 64 && PIECE == 64, "blocks of keys and pieces of queries are tiles of 64 rows");

// Chunks of 64 columns, and bytes of one of 64 rows: of a block of keys, a piece of queries, or A or dz.
constexpr int COLUMN_CHUNKS = HEAD_DIM / 64;
constexpr int CHUNK_BYTES = 64 * 128;
constexpr int TILE_BYTES = COLUMN_CHUNKS * CHUNK_BYTES;
constexpr int WARPGROUPS = 2, THREADS = 128 * (WARPGROUPS + 1);
// Registers of a producer thread and of a consumer thread: together what the block is launched with.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * launch_registers(THREADS), "too many registers");
// Keys of a block, and scores of a row, that one lane owns.
constexpr int OWN = KEYS / 4;
// Columns of dQ that each warpgroup adds to.
constexpr int HALF = HEAD_DIM / 2;

// What a stage is to a warpgroup. Without a piece the item is complete. At an edge is a piece that does not see all keys of its
// block, or ends with its document, or whose newest block it is. Above that, the pieces that the item has had before, up to 2.
constexpr int HAS_PIECE = 1, AT_EDGE = 2, BEFORE = 4;
// There is no further item.
constexpr int DONE = -1;
// How many pieces later the dQ of a piece is added.
constexpr int LATE = AHEAD ? 1 : 2;

struct Item {
    Tile tile;
    // -1: there is no further item.
    int kv_head;
    // Counts from 1.
    u32 number;
};

// What lies in shared memory ahead of Control: K and V of each warpgroup, the stages of Q and dO, twice A and twice dz of each
// warpgroup.
constexpr int STAGES_AT = WARPGROUPS * 2 * TILE_BYTES, SCORES_AT = STAGES_AT + STAGES * 2 * TILE_BYTES;
constexpr int CONTROL_AT = SCORES_AT + WARPGROUPS * 4 * CHUNK_BYTES;

struct Stage {
    // The piece among all of the launch, and the item's first block.
    int slot, first_block;
    int use[WARPGROUPS];
    // Query head, counted from the first one of the launch; the piece in its document; the oldest block that it visits.
    int head, piece, oldest;
};

struct Control {
    // For each stage and block of keys: what newer keys leave to each row of the piece, and its sum over older keys.
    alignas(16) Stick sticks[STAGES][WARPGROUPS][PIECE];
    alignas(16) float sums[STAGES][WARPGROUPS][PIECE];
    Stage stages[STAGES];
    // K and V; a stage, what it is (ahead of its copies), its sums over older keys.
    u64 keys_full, keys_empty, full[STAGES], empty[STAGES], told[STAGES], summed[STAGES];
    // The sums that the second block needs; dz of either buffer; dQ may be added, has been.
    u64 passed[4], dz_full[2], dz_empty[2], turn[2], added[2];
    Item item;
    // The slot of the piece whose turn it is, with the sign bit where this item starts its chain.
    int turn_slot[2];
    // The producer's next item, and the pieces of the one that it is at, as in Stage::use.
    int next, before;
};
static_assert(sizeof(Control) <= STAGES * WARPGROUPS * PIECE * 6 + 512, "the host reserves so much");

// Where in shared memory Control's sums and stages lie: behind its sticks.
constexpr int SUMS_AT = CONTROL_AT + STAGES * WARPGROUPS * PIECE * 2, TOLD_AT = SUMS_AT + STAGES * WARPGROUPS * PIECE * 4;

struct Backward {
    const bf16 *k, *v;
    const float* drem;
    const Stick* sticks;
    // Of each query head of the launch and piece: 64 words, one number, 64 x HEAD_DIM floats in the order of `add_queries`.
    u64* sums;
    u32* turns;
    float* accumulator;
    const int* first_blocks;
    bf16 *dk, *dv;
    const int* tiles;
    u32* ticket;
    int key_stride, value_stride;
    // `section` key/value heads at a time, so that what they read stays in L2. `kv_heads` of them from `first_kv_head` on.
    int tokens, tile_count, heads, group, first_kv_head, kv_heads, section;
    // Elements from one token to the next in dk and dv.
    int gradient_stride;
    // State entries and pieces of one head.
    int entries, pieces;
    int own_key;
    float factor, scale;
};

// Places are counted through the whole launch, those without a piece too, and so all of their barriers.
DEVICE u32 stage_of(u32 place) { return place % STAGES; }
DEVICE u32 parity_of(u32 place) { return place / STAGES & 1; }
// A Place in one register: with two the producer, which has few, spills.
constexpr u32 RING_PARITY = 4;
struct Ring {
    u32 word;
    __device__ __forceinline__ u32 stage() const { return word & 3; }
    __device__ __forceinline__ u32 parity() const { return word >> 2; }
    __device__ __forceinline__ void advance() { word = stage() == STAGES - 1 ? (word ^ RING_PARITY) & RING_PARITY : word + 1; }
};
// Of what there is twice.
DEVICE u32 buffer_of(u32 place) { return place & 1; }
DEVICE u32 turn_of(u32 place) { return place >> 1 & 1; }

// threadIdx.x, read anew, so that nothing that is made of it takes a register meanwhile.
DEVICE int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

DEVICE float load_float(u32 from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}
DEVICE Stick load_stick(u32 from) {
    Stick x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x.bits) : "r"(from) : "memory");
    return x;
}
DEVICE void store_float(u32 to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE int load_int(u32 from) {
    int x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

// ------------------------------------------------------------------------------------------------ between the blocks

DEVICE u64 load_relaxed(const u64* from) {
    u64 x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return x;
}
DEVICE void store_relaxed(u64* to, u64 x) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(x) : "memory"); }
DEVICE u32 load_acquire(const u32* from) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
DEVICE void store_release(u32* to, u32 x) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory"); }
// Adds four floats, each by itself.
DEVICE void add_floats(float* to, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// ------------------------------------------------------------------------------------------------ products

// The same in all lanes, in a way that ptxas sees: what is made of it is kept in uniform registers, descriptors among them.
DEVICE u32 same(u32 x) {
    u32 y;
    // All lanes have to come to it: it must not move into a branch.
    asm volatile("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

// d += scores^T rows: 64 x 64 scores, 64 rows of all dimensions.
DEVICE void add_products(float (&d)[HEAD_DIM / 2], u32 scores, u32 rows) {
    const u64 a = operand(scores, 0), b = operand(rows, CHUNK_BYTES);
#pragma unroll
    for (int step = 0; step < PIECE / 16; step++) multiply_transposed(d, operand_at(a, step * 2048), operand_at(b, step * 2048));
    products_commit();
}

// d (+)= scores rows: 64 x 64 scores, 64 rows of half the columns.
template <bool add> DEVICE void multiply_scores(float (&d)[HALF / 2], u32 scores, u32 rows) {
    const u64 a = operand(scores, 0), b = operand(rows, 0);
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        if (step == 0 && !add) {
            multiply_across<false>(d, operand_at(a, step * 32), operand_at(b, step * 2048));
        } else {
            multiply_across<true>(d, operand_at(a, step * 32), operand_at(b, step * 2048));
        }
    }
}

// ------------------------------------------------------------------------------------------------ producer and keepers

// It has few registers: what it does not need in its loops it reads from shared memory again.
DEVICE void produce(const Backward& p, const TensorMap& q_map, const TensorMap& g_map, const TensorMap& k_map,
                    const TensorMap& v_map, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL_AT);
    // The stages start out empty, and so do the tiles of keys: the producer is one round ahead.
    Ring at = {RING_PARITY};
    // The ticket of the first item, too, is taken by a block that runs.
    auto take_ticket = [&]() {
        if (lane == 0) control.next = atomicAdd(p.ticket, 1);
        __syncwarp();
        return uniform(*(volatile int*)&control.next);
    };
    // Tells the others that a stage has no piece.
    auto push_end = [&](int use) {
        barrier_wait(shared_address(&control.empty[at.stage()]), at.parity());
        if (lane == 0) {
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++) control.stages[at.stage()].use[w] = use;
            barrier_arrive(shared_address(&control.told[at.stage()]));
            barrier_arrive(shared_address(&control.full[at.stage()]));
        }
        at.advance();
        __syncwarp();
    };
    for (int index = take_ticket(); index < p.tile_count * p.kv_heads;) {
        {
            const u32 number = *(volatile u32*)&control.item.number + 1;
            const Position position = position_of(index, p.tile_count, p.first_kv_head, p.kv_heads, p.section);
            const int kv_head = position.head;
            const Tile tile = read_tile(p.tiles, position.tile);
            barrier_wait(shared_address(&control.keys_empty), number & 1);
            __syncwarp();
            if (lane == 0) control.item = {tile, kv_head, number};
        }
        __syncwarp();
        const volatile Item& item = control.item;
        const volatile Tile& tile = item.tile;
        if (lane == 0) {
            const u32 full = shared_address(&control.keys_full);
            // A block past the tensor, or past the document, its warpgroup fills.
            auto copied = [&](int w) {
                const int row = tile.start + tile.first + w * KEYS;
                return tile.first + w * KEYS < tile.length && row + KEYS <= p.tokens;
            };
            barrier_expect(full, copied(0) ? copied(1) ? 4 * TILE_BYTES : 2 * TILE_BYTES : 0);
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++) {
                if (!copied(w)) continue;
                const int row = tile.start + tile.first + w * KEYS;
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                    const u32 to = shared_address(shared) + w * 2 * TILE_BYTES + chunk * CHUNK_BYTES;
                    const int column = item.kv_head * HEAD_DIM + chunk * 64;
                    copy_box(to, k_map, full, column, row, 0, 0);
                    copy_box(to + TILE_BYTES, v_map, full, column, row, 0, 0);
                }
            }
        }

        if (lane == 0) control.before = 0;
        // Brings a piece of query head `head`, counted from the first one of the launch.
        auto push = [&](int head, int piece, int oldest) {
            barrier_wait(shared_address(&control.empty[at.stage()]), at.parity());
            if (lane == 0) {
                const int first_block = tile.first / KEYS, end = min((piece + 1) * PIECE, tile.length);
                const int visible = visible_blocks(end, p.own_key) - first_block;
                Stage& stage = control.stages[at.stage()];
                const int before = control.before;
                control.before = min(before + BEFORE, 2 * BEFORE);
#pragma unroll
                for (int w = 0; w < WARPGROUPS; w++)
                    stage.use[w] = w + 1 >= visible || first_block + w < oldest || end < (piece + 1) * PIECE
                                       ? HAS_PIECE + AT_EDGE + before
                                       : HAS_PIECE + before;
                stage.head = head;
                stage.piece = piece;
                stage.slot = head * p.pieces + tile.piece + piece;
                stage.oldest = oldest;
                stage.first_block = first_block;
                barrier_arrive(shared_address(&control.told[at.stage()]));
                const u32 full = shared_address(&control.full[at.stage()]);
                const u32 sticks = max(min(WARPGROUPS, visible - 1), 0) * PIECE * 2;
                barrier_expect(full, 2 * TILE_BYTES + sticks);
                const u32 to = shared_address(shared) + STAGES_AT + at.stage() * 2 * TILE_BYTES;
                const int column = (p.first_kv_head * p.group + head) * HEAD_DIM, row = tile.start + piece * PIECE;
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++) {
                    copy_box(to + chunk * CHUNK_BYTES, q_map, full, column + chunk * 64, row);
                    copy_box(to + TILE_BYTES + chunk * CHUNK_BYTES, g_map, full, column + chunk * 64, row);
                }
                const i64 entry = (u64)(u32)head * (u32)p.entries + tile.entry +
                                  piece * (piece + 1) / 2 * (PIECE / KEYS) + first_block;
                if (sticks > 0)
                    copy_bytes(shared_address(control.sticks[at.stage()]), p.sticks + (entry + 1) * PIECE, sticks, full);
            }
            __syncwarp();
            at.advance();
        };
        // First piece of the last 32 or fewer.
        auto last_start = [&]() {
            const int first = tile.first / PIECE;
            return first + ((tile.length - 1) / PIECE - first & ~31);
        };
        for (int member = 0; member < p.group; member++) {
            const int head = (item.kv_head - p.first_kv_head) * p.group + member;
            // 32 pieces at a time, newest first.
            for (int some = last_start(); some >= tile.first / PIECE; some -= 32) {
                // Those that visit one of the blocks. A document of one token that does not see itself counts as a visitor of its
                // only block: each piece has a chain.
                int oldest = 0;
                bool wanted = (some + lane) * PIECE < tile.length;
                if (p.first_blocks != nullptr && wanted) {
                    oldest = p.first_blocks[(u64)(u32)(p.first_kv_head * p.group + head) * (u32)p.pieces + tile.piece +
                                            some + lane];
                    oldest = min(oldest, max(visible_blocks(min((some + lane + 1) * PIECE, tile.length), p.own_key) - 1, 0));
                    wanted = oldest < tile.first / KEYS + WARPGROUPS;
                }
                for (u32 left = __ballot_sync(FULL_MASK, wanted); left != 0;) {
                    const int bit = 31 - __clz(left);
                    left ^= 1u << bit;
                    push(head, some + bit, __shfl_sync(FULL_MASK, oldest, bit));
                }
            }
        }
        push_end(control.before);
        index = take_ticket();
    }
    barrier_wait(shared_address(&control.keys_empty), (*(volatile u32*)&control.item.number + 1) & 1);
    if (lane == 0) {
        control.item.kv_head = -1;
        barrier_arrive(shared_address(&control.keys_full));
    }
    push_end(DONE);
}

// What the chain of a row starts from, if the item has the oldest block that the piece visits.
DEVICE float first_sum(const Backward& p, const Control& control, const volatile Stage& stage, int row) {
    const volatile Tile& tile = control.item.tile;
    const int piece = stage.piece, oldest = stage.oldest, in_document = piece * PIECE + row;
    const int visible = visible_blocks(min((piece + 1) * PIECE, tile.length), p.own_key);
    if (p.drem == nullptr || in_document >= tile.length || oldest >= visible) return 0.0f;
    // The oldest entry of the state is the remainder.
    const i64 entry = (i64)stage.head * p.entries + tile.entry + piece * (piece + 1) / 2 * (PIECE / KEYS) + oldest;
    const int head = p.first_kv_head * p.group + stage.head;
    return p.drem[(i64)(tile.start + in_document) * p.heads + head] * to_float(p.sticks[entry * PIECE + row]);
}

// Brings to each stage the sums over the keys of older items, from the item before, or for the item that starts the chain from
// the gradient of the remainder.
DEVICE void keep_sums(const Backward& p, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL_AT);
    for (u32 at = 0;; at++) {
        barrier_wait(shared_address(&control.told[stage_of(at)]), parity_of(at));
        const volatile Stage& stage = control.stages[stage_of(at)];
        const int use = uniform(stage.use[0]);
        if (use == DONE) return;
        if ((use & HAS_PIECE)) {
            const int first_block = stage.first_block;
            float* const to = control.sums[stage_of(at)][0] + lane;
            if (first_block <= stage.oldest) {
                to[0] = first_sum(p, control, stage, lane);
                to[32] = first_sum(p, control, stage, lane + 32);
            } else {
                const u64* from = p.sums + (i64)stage.slot * PIECE + lane;
                u64 one, two;
                do {
                    one = load_relaxed(from);
                    two = load_relaxed(from + 32);
                } while ((int)(one >> 32) != first_block || (int)(two >> 32) != first_block);
                to[0] = __uint_as_float((u32)one);
                to[32] = __uint_as_float((u32)two);
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&control.summed[stage_of(at)]));
        __syncwarp();
    }
}

// Waits for this item's turn to add to dQ of a piece, tells the warpgroups, and passes the turn on when they have.
DEVICE void keep_turns(const Backward& p, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL_AT);
    for (u32 at = 0;; at++) {
        barrier_wait(shared_address(&control.told[stage_of(at)]), parity_of(at));
        const volatile Stage& stage = control.stages[stage_of(at)];
        const int use = uniform(stage.use[0]), slot = stage.slot, oldest = stage.oldest, first_block = stage.first_block;
        if (use == DONE) return;
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&control.empty[stage_of(at)]));
        if (lane == 0) {
            const bool starts = first_block <= oldest;
            u32* const number = p.turns + slot;
            if ((use & HAS_PIECE) && !starts) {
                while (load_acquire(number) != (u32)first_block) {}
            }
            control.turn_slot[buffer_of(at)] = starts ? slot | (int)0x80000000 : slot;
            barrier_arrive(shared_address(&control.turn[buffer_of(at)]));
            barrier_wait(shared_address(&control.added[buffer_of(at)]), turn_of(at));
            if ((use & HAS_PIECE)) store_release(number, first_block + WARPGROUPS);
        }
        __syncwarp();
    }
}

// ------------------------------------------------------------------------------------------------ consumers

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

// older_sum in two parts, so that there is time between them for something else.
DEVICE float next_older(float x) { return __shfl_up_sync(FULL_MASK, x, 1, 4); }
DEVICE float sum_older(float x, float next) {
    const int c = thread_again() & 3;
    if (c == 0) next = 0.0f;
    float second = __shfl_up_sync(FULL_MASK, x + next, 2, 4);
    if (c < 2) second = 0.0f;
    return next + second;
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

// Makes zeros of the keys from `valid` on in a block's K and V.
DEVICE void clear_keys(u8* to, int valid) {
    const int thread = threadIdx.x & 127, row = thread & 63;
    to += (thread >> 6) * TILE_BYTES + row * 128;
    if (permuted_key<KEYS>(row) < valid) return;
#pragma unroll
    for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
#pragma unroll 2
        for (int i = 0; i < 8; i++) *(uint4*)(to + chunk * CHUNK_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
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

// Of a member of Control.
#define OFFSET(member) ((u32)(u64) & ((Control*)nullptr)->member)

DEVICE void consume(const Backward& p, u8* shared) {
    Control& control = *(Control*)(shared + CONTROL_AT);
    // What follows is computed where it is needed, which takes fewer registers than keeping it: registers are short. What it is
    // computed from is one word: where shared memory starts (a multiple of 1024), then from the lowest bit on the place modulo 8,
    // the warpgroup, the stage and the parity of its barriers.
    u32 state = shared_address(shared) | (u32)(uniform(threadIdx.x / 128) - 1) << 3;
    auto base = [&](u32 w) { return w & ~1023u; };
    auto mine = [&](u32 w) { return w >> 3 & 1; };
    auto place = [&](u32 w) { return w & 7; };
    auto stage_number = [&](u32 w) { return w >> 4 & 3; };
    auto stage_parity = [&](u32 w) { return w >> 6 & 1; };
    auto stage_before = [&](u32 w) { return stage_number(w) == 0 ? STAGES - 1 : stage_number(w) - 1; };
    auto next = [&](u32 w) {
        const u32 then = w & ~7u | (w + 1 & 7);
        return stage_number(w) == STAGES - 1 ? (then ^ 64) & ~48u : then + 16;
    };
    auto thread = [&]() { return thread_again() & 127; };
    auto k_shared = [&](u32 w) { return base(w) + mine(w) * 2 * TILE_BYTES; };
    // Twice A, twice dz.
    auto scores = [&](u32 w) { return base(w) + SCORES_AT + mine(w) * 4 * CHUNK_BYTES; };
    // The lane's place in a tile of A or dz: row 16 warp + lane % 16, unit lane / 16.
    auto score_lane = [&](u32 w) {
        const int t = thread_again();
        return scores(w) + ((t >> 1 & 48) + (t & 15)) * 128 + (((t >> 4 & 1) ^ (t & 7)) << 4);
    };
    // The lane's rows in a piece are row() and row() + 8.
    auto row = [&]() {
        const int t = thread_again();
        return (t >> 1 & 48) + (t >> 2 & 7);
    };
    auto wait_own = [&]() { named_wait(thread_again() >> 7, 128); };
    auto stage_at = [&](u32 w) { return base(w) + STAGES_AT + stage_number(w) * 2 * TILE_BYTES; };
    // Of something in control.
    auto address = [&](u32 w, u32 offset) { return base(w) + CONTROL_AT + offset; };
    auto arrive = [&](u32 w, u32 offset) {
        __syncwarp();
        if ((thread_again() & 31) == 0) barrier_arrive(address(w, offset));
    };
    u32 item_parity = 0;
    float s[32], g[32], dq[HALF / 2], dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];

    while (true) {
        barrier_wait(shared_address(&control.keys_full), item_parity);
        if (uniform(((volatile Item&)control.item).kv_head) < 0) break;
        {
            const volatile Item& item = control.item;
            const int group = mine(state), start = uniform(item.tile.start), first = uniform(item.tile.first) + group * KEYS;
            const int valid = uniform(item.tile.length) - first;
            u8* const k_tile = shared + group * 2 * TILE_BYTES;
            if (valid < KEYS || start + first + KEYS > p.tokens) {
                if (valid <= 0 || start + first + KEYS > p.tokens) {
                    const i64 token = start + first, column = item.kv_head * HEAD_DIM;
                    copy_block(k_tile, p.k + token * p.key_stride + column, p.key_stride, valid);
                    copy_block(k_tile + TILE_BYTES, p.v + token * p.value_stride + column, p.value_stride, valid);
                } else {
                    clear_keys(k_tile, valid);
                }
                // To the other warpgroup it is known by the first dz.
                publish_shared();
                wait_own();
            }
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) dk[i] = dv[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) dq[i] = 0.0f;

        // What the next stage is, which is there then.
        int use;
        auto look = [&](u32 w) {
            barrier_wait(address(w, OFFSET(full[stage_number(w)])), stage_parity(w));
            use = same(load_int(address(w, OFFSET(stages[stage_number(w)].use[mine(w)]))));
            return (use & HAS_PIECE) != 0;
        };
        // What the copies of the next stage, which is AT_EDGE, left open: rows past the document's end become zeros without a
        // stick, and to the piece's newest block a whole stick is left.
        auto complete = [&](u32 w) {
            const volatile Item& item = control.item;
            const int piece = *(volatile int*)&control.stages[stage_number(w)].piece, in_piece = thread() >> 1;
            const int valid = item.tile.length - piece * PIECE;
            const int block = item.tile.first / KEYS + (int)mine(w);
            if (in_piece >= valid) {
                // Half a row per thread. Both warpgroups do so, each ahead of its own products.
                u8* to = shared + STAGES_AT + stage_number(w) * 2 * TILE_BYTES + thread() * 64;
#pragma unroll
                for (int chunk = 0; chunk < 2 * COLUMN_CHUNKS; chunk++)
#pragma unroll
                    for (int i = 0; i < 4; i++) *(uint4*)(to + chunk * CHUNK_BYTES + i * 16) = make_uint4(0, 0, 0, 0);
                control.sticks[stage_number(w)][mine(w)][in_piece] = pack_stick(0.0f);
            } else if (block + 1 >= visible_blocks(piece * PIECE + min(valid, PIECE), p.own_key)) {
                control.sticks[stage_number(w)][mine(w)][in_piece] = pack_stick(1.0f);
            }
            publish_shared();
            wait_own();
        };
        // Keys of the stage in use that are hidden: from the row's own on (or past its own), past the document, or all of a
        // block that the piece does not visit.
        auto hide = [&]() {
            const volatile Item& item = control.item;
            const volatile Stage& stage = control.stages[stage_number(state)];
            const int first = item.tile.first + (int)mine(state) * KEYS, piece = stage.piece;
            const int length = first < stage.oldest * KEYS ? 0 : item.tile.length, first_key = first + (thread_again() & 3) * OWN;
            const int first_row = piece * PIECE + row();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                // A row past the end sees nothing: it would see a key that no row does.
                const int row = first_row + 8 * r;
                const int visible = row < item.tile.length ? min(row + p.own_key, length) - first_key : 0;
#pragma unroll
                for (int x = 0; x < OWN; x++)
                    if (x >= visible) s[score_at(r, x)] = p.factor < 0.0f ? INFINITY_F : -INFINITY_F;
            }
        };
        // dQ of the piece of a place, once both warpgroups have its dz: half of the columns.
        auto await_scores = [&](u32 w, u32 of) {
            barrier_wait(address(w, OFFSET(dz_full[buffer_of(of)])), turn_of(of));
        };
        // The place's buffer for dz, once both have read what was in it.
        auto await_empty = [&](u32 w) {
            barrier_wait(address(w, OFFSET(dz_empty[buffer_of(w)])), turn_of(w) ^ 1);
        };
        auto start_queries = [&](u32 w, u32 of) {
            const u32 dz = base(w) + SCORES_AT + (2 + buffer_of(of)) * CHUNK_BYTES;
            const u32 keys = base(w) + mine(w) * (COLUMN_CHUNKS == 1 ? HALF * 2 : CHUNK_BYTES);
            products_begin();
            multiply_scores<false>(dq, dz, keys);
            multiply_scores<true>(dq, dz + 4 * CHUNK_BYTES, keys + 2 * TILE_BYTES);
            products_commit();
        };
        // The slot of the piece of a place, with its sign bit, once it may be added to.
        auto await_turn = [&](u32 w, u32 of) {
            barrier_wait(address(w, OFFSET(turn[buffer_of(of)])), turn_of(of));
            return load_int(address(w, OFFSET(turn_slot[buffer_of(of)])));
        };
        auto add_queries = [&](u32 w, u32 of, int slot) {
            // Four accumulators of a thread in a row, then those of the next thread.
            float* to = p.accumulator + (i64)(slot & 0x7fffffff) * (PIECE * HEAD_DIM) + mine(w) * (PIECE * HALF) + thread() * 4;
            if ((int)same(slot) < 0) {
#pragma unroll
                for (int j = 0; j < HALF / 8; j++)
                    *(float4*)(to + j * 512) = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
            } else {
#pragma unroll
                for (int j = 0; j < HALF / 8; j++) add_floats(to + j * 512, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
            }
            arrive(w, OFFSET(added[buffer_of(of)]));
        };

        // S of a stage.
        auto start_scores = [&](u32 w) {
            products_begin();
            multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(s, operand(stage_at(w), 0), operand(k_shared(w), 0));
            products_commit();
        };
        bool there = look(state);
        if (AHEAD && there) {
            if (use & AT_EDGE) complete(state);
            start_scores(same(state));
            products_wait<0>();
            pin(s);
        }
        while (there) {
            if (!AHEAD && use & AT_EDGE) complete(state);
            // There is a piece before this one, whose stage is in use, and one before that.
            const bool one = use >= BEFORE, two = use >= 2 * BEFORE;
            const u32 w = same(state);
            auto start_g = [&]() {
                products_begin();
                multiply_rows<CHUNK_BYTES, CHUNK_BYTES>(g, operand(stage_at(w) + TILE_BYTES, 0),
                                                        operand(k_shared(w) + TILE_BYTES, 0));
                products_commit();
            };
            if (AHEAD) {
                start_g();
                // Where the answer, which is there, has time; behind the sums it costs 2%.
                await_empty(w);
            } else {
                // At first there is no such piece, and the product means nothing and is not added: ptxas wants the same products
                // on every path.
                if (two) await_scores(w, place(w) - 2);
                start_queries(w, place(w) - 2);
                start_scores(w);
                int slot = 0;
                if (two) slot = await_turn(w, place(w) - 2);
                products_wait<1>();
                pin(dq);
                __syncwarp();
                if ((thread_again() & 31) == 0) {
                    if (one) barrier_arrive(address(w, OFFSET(empty[stage_before(w)])));
                    if (two) barrier_arrive(address(w, OFFSET(dz_empty[buffer_of(place(w) - 2)])));
                }
                if (two) add_queries(w, place(w) - 2, slot);
                start_g();
                products_wait<1>();
                pin(s);
            }
            // Not where they are needed: loads take long while products read shared memory.
            Stick newer[2];
            {
                const u32 sticks = address(state, OFFSET(sticks[stage_number(state)][mine(state)])) + row() * 2;
#pragma unroll
                for (int r = 0; r < 2; r++) newer[r] = load_stick(sticks + 16 * r);
            }
            if (use & AT_EDGE) hide();
            float other[32], keep[2][OWN], left[2], grown[2], before[2];
            float (&e)[32] = AHEAD ? other : s;
            take_odds(s, p.factor, e, keep, left);
            auto a_at = [&](u32 w) { return buffer_of(w) * CHUNK_BYTES; };
            auto dz_at = [&](u32 w) { return a_at(w) + 2 * CHUNK_BYTES; };
#pragma unroll
            for (int r = 0; r < 2; r++) left[r] *= to_float(newer[r]);
            products_wait<0>();
            pin(g);
            if (AHEAD && one) arrive(state, OFFSET(empty[stage_before(state)]));
            const u32 a_lane = score_lane(state) + a_at(state);
            weigh(e, keep, left, g, grown, a_lane);
            publish_shared();
#pragma unroll
            for (int r = 0; r < 2; r++) before[r] = next_older(grown[r]);
            wait_own();
            const u32 then = same(state);
            products_begin();
            add_products(dv, scores(then) + a_at(then), stage_at(then) + TILE_BYTES);
            if (AHEAD) {
                if (one) await_scores(then, place(then) - 1);
                start_queries(then, place(then) - 1);
                there = look(next(state));
                if (use & AT_EDGE) complete(next(state));
                // Without a further piece once more those of this one, which nobody reads.
                start_scores(same(there ? next(state) : state));
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                before[r] = sum_older(grown[r], before[r]);
                // Not after the wait: half of it would be in registers until then.
                pin_one(before[r]);
            }
            // The older block passes its sums on to the newer one, and that to the next item.
            if (mine(then) == 0) barrier_wait(address(then, OFFSET(summed[stage_number(then)])), stage_parity(then));
            else barrier_wait(address(then, OFFSET(passed[then & 3])), then >> 2 & 1);
            // Which piece it is: only the newer block asks, but loads take long.
            const u32 stage = base(then) + TOLD_AT + stage_number(then) * sizeof(Stage);
            const int slot = load_int(stage), block = load_int(stage + 4);
            const u32 sums = base(then) + SUMS_AT + ((stage_number(then) * WARPGROUPS + mine(then)) * PIECE + row()) * 4;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                before[r] += load_float(sums + 32 * r);
                grown[r] += before[r];
            }
            const bool newest_lane = (thread_again() & 3) == 3;
            if (mine(then) == 0) {
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (newest_lane) store_float(sums + 4 * PIECE + 32 * r, grown[r]);
                arrive(then, OFFSET(passed[then & 3]));
            } else {
                u64* to = p.sums + (i64)slot * PIECE + row();
                const u64 number = (u64)(block + WARPGROUPS) << 32;
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (newest_lane) store_relaxed(to + 8 * r, number | __float_as_uint(grown[r]));
            }
            if (AHEAD) {
                products_wait<1>();
                pin(dq);
                if (one) {
                    arrive(then, OFFSET(dz_empty[buffer_of(place(then) - 1)]));
                    add_queries(then, place(then) - 1, await_turn(then, place(then) - 1));
                }
            } else {
                await_empty(then);
            }
            differentiate(e, keep, g, before, score_lane(state) + dz_at(state));
            publish_shared();
            arrive(then, OFFSET(dz_full[buffer_of(then)]));
            wait_own();
            products_begin();
            add_products(dk, scores(then) + dz_at(then), stage_at(then));
            state = next(state);
            if (AHEAD) {
                products_wait<1>();
                pin(s);
            } else {
                there = look(same(state));
            }
        }
        products_wait<0>();
        pin(dk);
        pin(dv);
        const u32 end = same(state);
        if (use >= BEFORE) arrive(end, OFFSET(empty[stage_before(end)]));
        for (int of = min(use / BEFORE, LATE); of > 0; of--) {
            await_scores(end, place(end) - of);
            start_queries(end, place(end) - of);
            products_wait<0>();
            pin(dq);
            arrive(end, OFFSET(dz_empty[buffer_of(place(end) - of)]));
            add_queries(end, place(end) - of, await_turn(end, place(end) - of));
        }
        // The last stage has no piece: its barriers, in the order of those of a piece. The sum keeper's, too, or the producer could
        // be two rounds ahead of it.
        if (mine(end) == 0) barrier_wait(address(end, OFFSET(summed[stage_number(end)])), stage_parity(end));
        arrive(end, OFFSET(empty[stage_number(end)]));
        if (mine(end) == 0) arrive(end, OFFSET(passed[end & 3]));
        await_empty(end);
        arrive(end, OFFSET(dz_full[buffer_of(end)]));
        barrier_wait(address(end, OFFSET(dz_full[buffer_of(end)])), turn_of(end));
        arrive(end, OFFSET(dz_empty[buffer_of(end)]));
        barrier_wait(address(end, OFFSET(turn[buffer_of(end)])), turn_of(end));
        arrive(end, OFFSET(added[buffer_of(end)]));
        state = next(state);
        const volatile Item& done = control.item;
        const int first = done.tile.first + (thread_again() / 128 - 1) * KEYS, valid = done.tile.length - first;
        const i64 to = (i64)(done.tile.start + first) * p.gradient_stride + done.kv_head * HEAD_DIM;
        item_parity = done.number & 1;
        arrive(state, OFFSET(keys_empty));
        write_block(p.dk + to, p.gradient_stride, valid, dk, p.scale);
        write_block(p.dv + to, p.gradient_stride, valid, dv, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stick_breaking_backward_hopper_bf16(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap g_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const bf16* k, const bf16* v, const float* drem, const Stick* sticks, u64* sums,
    u32* turns, float* accumulator, const int* first_blocks, bf16* dk, bf16* dv, const int* tiles, u32* ticket, int key_stride,
    int value_stride, int tokens, int tile_count, int heads, int group, int first_kv_head, int kv_heads, int section,
    int gradient_stride, int entries, int pieces, int own_key, float factor, float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    Control& control = *(Control*)(shared + CONTROL_AT);
    const Backward p = {k, v, drem, sticks, sums, turns, accumulator, first_blocks, dk, dv, tiles, ticket, key_stride,
                        value_stride, tokens, tile_count, heads, group, first_kv_head, kv_heads, section, gradient_stride,
                        entries, pieces, own_key, factor, scale};
    if (threadIdx.x == 0) {
        if (shared_address(shared) % 1024 != 0) __trap();
        prefetch_map(q_map);
        prefetch_map(g_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        // Of consumers each warp arrives.
        constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
        barrier_init(shared_address(&control.keys_full), 1);
        barrier_init(shared_address(&control.keys_empty), CONSUMER_WARPS);
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(&control.full[stage]), 1);
            // The consumers and the turn keeper; the sum keeper they have waited for.
            barrier_init(shared_address(&control.empty[stage]), CONSUMER_WARPS + 1);
            barrier_init(shared_address(&control.told[stage]), 1);
            barrier_init(shared_address(&control.summed[stage]), 1);
        }
        for (int i = 0; i < 4; i++) barrier_init(shared_address(&control.passed[i]), 4);
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&control.dz_full[i]), CONSUMER_WARPS);
            barrier_init(shared_address(&control.dz_empty[i]), CONSUMER_WARPS);
            barrier_init(shared_address(&control.turn[i]), 1);
            barrier_init(shared_address(&control.added[i]), CONSUMER_WARPS);
        }
        control.item.number = 0;
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<PRODUCER_REGISTERS>();
        const int warp = uniform(threadIdx.x / 32);
        if (warp == 0) produce(p, q_map, g_map, k_map, v_map, shared);
        else if (warp == 1) keep_sums(p, shared);
        else if (warp == 2) keep_turns(p, shared);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}

// dQ of one piece and query head, rounded: what `add_queries` added up, times `scale`. `dq` has all heads of a token in a row,
// `head` counts from the first one of the launch. 128 threads per 64 columns, which hold what they held there.
//
// Launch  2 HEAD_DIM threads, grid [tiles of 64 queries, heads of the launch].
extern "C" __global__ void __launch_bounds__(2 * HEAD_DIM) stick_breaking_finish_hopper_bf16(
    const float* accumulator, bf16* dq, const int* tiles, int heads, int first_head, int pieces, float scale) {
    const Tile tile = read_tile(tiles, blockIdx.x);
    const int part = threadIdx.x >> 7, thread = threadIdx.x & 127, c = thread & 3;
    const i64 slot = (i64)blockIdx.y * pieces + tile.piece + tile.first / PIECE;
    const float* from = accumulator + slot * (PIECE * HEAD_DIM) + part * (PIECE * 64) + thread * 4;
    float d[32];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float4 x = *(const float4*)(from + j * 512);
        d[4 * j] = x.x;
        d[4 * j + 1] = x.y;
        d[4 * j + 2] = x.z;
        d[4 * j + 3] = x.w;
    }
    const int column = (first_head + (int)blockIdx.y) * HEAD_DIM + part * 64 + c * 8;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = tile.first + thread / 32 * 16 + (thread & 31) / 4 + 8 * r;
        bf16* to = dq + (i64)(tile.start + row) * heads * HEAD_DIM + column;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 w[4];
#pragma unroll
            for (int x = 0; x < 4; x++)
                w[x] = pack_bf16(d[16 * i + 4 * x + 2 * r] * scale, d[16 * i + 4 * x + 2 * r + 1] * scale);
            transpose_quad(w);
            if (row < tile.length) *(uint4*)(to + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}
