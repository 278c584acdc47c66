// Rebuilds the state of stick-breaking attention on Hopper (sm_90a) where the forward pass did not keep all of it: bf16, head
// dims 64 and 128. It writes what the sticks pass of stick_breaking.cu does: what each row has left of its stick past each
// block of keys, down to the oldest block that the forward pass visited. What was kept, of the blocks next to a piece, it
// copies, and goes on from there.
//
// A persistent block of one producer warp and WARPGROUPS consumer warpgroups takes items (a tile of 64 WARPGROUPS rows of one
// head) by an atomic ticket, the longest first. A consumer warpgroup has one piece of 64 rows. The producer copies Q once
// per item, then K in tiles of 128 keys from the newest to the oldest through a ring of stages, permuted as everywhere
// (hopper.cuh). While a warpgroup scans a tile, its products for the next one run on the tensor cores. All agree on the tiles
// of an item without a word, and a warpgroup passes over those that only other pieces need.
//
// Memory past the rows of a document. What lies in Q behind the document's last row only reaches rows without a stick, whose
// state nobody reads; keys behind it are hidden. A tensor map reads no further than the tensor; tiles that start within its last
// 128 rows are copied by ordinary loads with zeros behind.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Consumer warpgroups, and stages of the ring.
#ifndef WARPGROUPS
#define WARPGROUPS 3
#endif
#ifndef STAGES
#define STAGES 4
#endif

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "one or two chunks of 64 columns");
static_assert(KEYS == 64, "two blocks of the state make a tile of keys");

constexpr int TILE_KEYS = 128;
// Chunks of 64 columns, and bytes of one: of a tile of keys, of a piece of queries.
constexpr int COLUMN_CHUNKS = HEAD_DIM / 64;
constexpr int KEY_CHUNK_BYTES = TILE_KEYS * 128, QUERY_CHUNK_BYTES = PIECE * 128;
constexpr int TILE_BYTES = COLUMN_CHUNKS * KEY_CHUNK_BYTES, PIECE_BYTES = COLUMN_CHUNKS * QUERY_CHUNK_BYTES;
constexpr int ROWS = PIECE * WARPGROUPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = WARPGROUPS > 2 ? 160 : 208;
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * launch_registers(THREADS), "too many registers");

struct Item {
    Tile tile;
    // -1: there is no further item.
    int head;
    // Tiles of keys that some piece of it needs: from `newest` down to `oldest`.
    int newest, oldest;
};

// Behind the tiles in shared memory.
struct Control {
    u64 q_full, q_empty;
    u64 full[STAGES], empty[STAGES];
    Item item;
};
static_assert(sizeof(Control) <= 512, "the host reserves 512 bytes");

constexpr int RING = WARPGROUPS * PIECE_BYTES, CONTROL = RING + STAGES * TILE_BYTES;

struct Sticks {
    const bf16* k;
    Stick* sticks;
    // What the forward pass kept of all heads: of each piece the newest blocks, at most `kept`. Null: nothing.
    const Stick* saved;
    const int* first_blocks;
    const int* tiles;
    u32* ticket;
    int key_stride;
    // Of the query heads the call is about `head_count` from `first_head` on, `section` at a time, so that their keys stay
    // in L2.
    int tokens, tile_count, group, first_head, head_count, section;
    // State entries and pieces of one head.
    int entries, pieces;
    int kept;
    int own_key;
    float factor;
};

// The newest tile of keys to walk through for rows below `end`.
DEVICE int newest_tile(const Sticks& p, int end) {
    if (p.saved != nullptr) return first_kept(visible_blocks(end, p.own_key), p.kept) / (TILE_KEYS / KEYS) - 1;
    return visible_blocks<TILE_KEYS>(end, p.own_key) - 1;
}

DEVICE void produce(const Sticks& p, const TensorMap& q_map, const TensorMap& k_map, u8* shared) {
    const int lane = threadIdx.x & 31;
    Control& control = *(Control*)(shared + CONTROL);

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

        const int newest = newest_tile(p, min(tile.first + ROWS, tile.length));
        int oldest = 0;
        if (p.first_blocks != nullptr) {
            oldest = newest + 1;
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++)
                if (tile.first + w * PIECE < tile.length) {
                    const i64 at_piece = (i64)head * p.pieces + tile.piece + tile.first / PIECE + w;
                    oldest = min(oldest, p.first_blocks[at_piece] / (TILE_KEYS / KEYS));
                }
        }
        auto push = [&](int n) {
            barrier_wait(shared_address(&control.empty[at.stage]), at.parity);
            bring_tile<TILE_KEYS>(shared + RING + at.stage * TILE_BYTES, shared_address(&control.full[at.stage]), k_map, p.k,
                                  p.key_stride, p.tokens, tile.start + n * TILE_KEYS, column);
            at.advance<STAGES>();
        };

        if (newest >= oldest) push(newest);
        barrier_wait(shared_address(&control.q_empty), item_parity);
        if (lane == 0) {
            control.item = {tile, head, newest, oldest};
            const u32 full = shared_address(&control.q_full);
            barrier_expect(full, WARPGROUPS * PIECE_BYTES);
#pragma unroll
            for (int w = 0; w < WARPGROUPS; w++)
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
                    copy_box(shared_address(shared) + w * PIECE_BYTES + chunk * QUERY_CHUNK_BYTES, q_map, full,
                             head * HEAD_DIM + 64 * chunk, tile.start + tile.first + w * PIECE);
        }
        __syncwarp();
        for (int n = newest - 1; n >= oldest; n--) push(n);
        index = __shfl_sync(FULL_MASK, next, 0) + gridDim.x;
        item_parity ^= 1;
    }
    barrier_wait(shared_address(&control.q_empty), item_parity);
    if (lane == 0) {
        control.item.head = -1;
        barrier_arrive(shared_address(&control.q_full));
    }
}

// `stick` is what newer keys leave to the tile and becomes what the tile leaves; `edge` is what the keys of the quad's later
// lanes leave. The scores are used up.
DEVICE void break_sticks(float (&s)[TILE_KEYS / 2], float factor, float (&stick)[2], float (&edge)[2]) {
    constexpr int count = TILE_KEYS / 4, chunk = 8;
    constexpr float least = 7.5231638e-37f;  // 2^-120: the smallest inverse is still a normal float.
    float total[2];
    bool fine = true;
#pragma unroll
    for (int ch = 0; ch < count / chunk; ch++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float w = 1.0f;
#pragma unroll
            for (int x = chunk * ch; x < chunk * ch + chunk; x++) {
                float& e = s[score_at(r, x)];
                e = exp2_approx(e * factor);
                w = x == chunk * ch ? 1.0f + e : fmaf(w, e, w);
            }
            const float inverse = rcp_approx(w);
            // A row without a stick, as those of another document behind this one, has no say in how its warp goes on.
            fine = fine && (inverse >= least || stick[r] == 0.0f);
            total[r] = ch == 0 ? inverse : total[r] * inverse;
        }
    if (!__all_sync(FULL_MASK, fine)) {
        // One reciprocal per key.
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] = 1.0f;
#pragma unroll
            for (int x = 0; x < count; x++) total[r] *= rcp_approx(1.0f + clamp(s[score_at(r, x)], 1.1529215e18f));  // 2^60
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float newer, all;
        scan_products(total[r], newer, all);
        edge[r] = stick[r] * newer;
        stick[r] *= all;
    }
}

DEVICE void consume(const Sticks& p, u8* shared) {
    const int group = uniform(threadIdx.x / 128) - 1;
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, c = lane & 3;
    Control& control = *(Control*)(shared + CONTROL);
    const u64 q_operand = operand(shared_address(shared + group * PIECE_BYTES), 0);
    const u32 ring = shared_address(shared + RING);

    Place at = {0, 0};
    auto release = [&](u64& empty) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };
    auto wait_tile = [&]() { barrier_wait(shared_address(&control.full[at.stage]), at.parity); };
    auto release_tile = [&]() {
        release(control.empty[at.stage]);
        at.advance<STAGES>();
    };

    u32 item_parity = 0;
    while (true) {
        barrier_wait(shared_address(&control.q_full), item_parity);
        item_parity ^= 1;
        const volatile Item& item = control.item;
        const int head = uniform(item.head);
        if (head < 0) break;
        const Tile tile = uniform(item.tile);
        const int newest = uniform(item.newest), oldest = uniform(item.oldest);

        // This warpgroup's piece of the item; this lane's rows in the document are row and row + 8.
        const int first = tile.first + group * PIECE, row = first + warp * 16 + g, piece = first / PIECE;
        const bool exists = first < tile.length;
        const int piece_end = min(first + PIECE, tile.length);
        const int piece_blocks = exists ? visible_blocks(piece_end, p.own_key) : 0;
        // The tiles that it needs: from own_newest down to own_oldest.
        const int own_newest = exists ? newest_tile(p, piece_end) : oldest - 1;
        int oldest_block = 0;
        if (exists && p.first_blocks != nullptr)
            oldest_block = uniform(p.first_blocks[(i64)head * p.pieces + tile.piece + piece]);
        const int own_oldest = exists ? oldest_block / (TILE_KEYS / KEYS) : oldest;
        Stick* const first_stick =
            p.sticks + ((i64)(head - p.first_head) * p.entries + first_entry(tile, exists ? piece : 0)) * PIECE;
        Stick* const sticks = first_stick + c * PIECE + (row & (PIECE - 1));
        float stick[2], edge[2];
#pragma unroll
        for (int r = 0; r < 2; r++) stick[r] = row + 8 * r < tile.length ? 1.0f : 0.0f;
        if (exists && p.saved != nullptr) {
            const int first_saved = first_kept(piece_blocks, p.kept);
            const Stick* const saved =
                p.saved + kept_entry((i64)head * p.pieces + tile.piece + piece, p.kept, first_saved) * PIECE;
            // The walk goes on from there, if it goes that far.
#pragma unroll
            for (int r = 0; r < 2; r++)
                if (first_saved > oldest_block) stick[r] = to_float(saved[(i64)first_saved * PIECE + (row & (PIECE - 1)) + 8 * r]);
            // 8 sticks per thread.
            constexpr int UNITS = PIECE / 8;
            for (int i = max(first_saved, oldest_block) * UNITS + thread; i < piece_blocks * UNITS; i += 128)
                *(uint4*)(first_stick + i * 8) = *(const uint4*)(saved + i * 8);
        }

        auto start_scores = [&](float (&s)[TILE_KEYS / 2]) {
            products_begin();
            multiply_rows<QUERY_CHUNK_BYTES, KEY_CHUNK_BYTES>(s, q_operand, operand(ring + at.stage * TILE_BYTES, 0));
            products_commit();
        };
        auto scan = [&](float (&s)[TILE_KEYS / 2], int n) {
            if (n == own_newest) {
                // The only tile that can have hidden keys.
                const float hidden = p.factor < 0.0f ? INFINITY_F : -INFINITY_F;
                const int first_key = n * TILE_KEYS + c * (TILE_KEYS / 4);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int visible = min(row + 8 * r + p.own_key, tile.length) - first_key;
#pragma unroll
                    for (int x = 0; x < TILE_KEYS / 4; x++)
                        if (x >= visible) s[score_at(r, x)] = hidden;
                }
            }
            break_sticks(s, p.factor, stick, edge);
            if (c < 2 && 2 * n + c < piece_blocks) {
#pragma unroll
                for (int r = 0; r < 2; r++) sticks[(i64)(2 * n) * PIECE + 8 * r] = pack_stick(c == 0 ? stick[r] : edge[r]);
            }
        };
        auto pass_over = [&](int from, int to) {
            for (int n = from; n > to; n--) {
                wait_tile();
                release_tile();
            }
        };
        if (own_newest < own_oldest) {
            pass_over(newest, oldest - 1);
        } else {
            pass_over(newest, own_newest);
            float s[TILE_KEYS / 2], next[TILE_KEYS / 2];
            wait_tile();
            start_scores(s);
            products_wait<0>();
            pin(s);
            // The scores of the next tile are computed while one is scanned; behind the last one those of whatever is there.
            auto step = [&](float (&s)[TILE_KEYS / 2], float (&next)[TILE_KEYS / 2], int n) {
                release_tile();
                if (n > own_oldest) wait_tile();
                start_scores(next);
                scan(s, n);
                products_wait<0>();
                pin(next);
            };
            for (int n = own_newest; n >= own_oldest; n -= 2) {
                step(s, next, n);
                if (n == own_oldest) break;
                step(next, s, n - 1);
            }
            pass_over(own_oldest - 1, oldest - 1);
        }
        // Q is read.
        release(control.q_empty);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stick_breaking_sticks_hopper_bf16(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const bf16* k, Stick* sticks,
    const Stick* saved, const int* first_blocks, const int* tiles, u32* ticket, int key_stride, int tokens, int tile_count,
    int group, int first_head, int head_count, int section, int entries, int pieces, int kept, int own_key, float factor) {
    extern __shared__ __align__(1024) u8 shared[];
    Control& control = *(Control*)(shared + CONTROL);
    const Sticks p = {k, sticks, saved, first_blocks, tiles, ticket, key_stride, tokens, tile_count, group, first_head,
                      head_count, section, entries, pieces, kept, own_key, factor};
    if (threadIdx.x == 0) {
        if (shared_address(shared) % 1024 != 0) __trap();
        prefetch_map(q_map);
        prefetch_map(k_map);
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
        if (threadIdx.x < 32) produce(p, q_map, k_map, shared);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}
