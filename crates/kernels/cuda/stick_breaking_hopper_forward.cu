// The forward pass of stick-breaking attention on Hopper (sm_90a): bf16, head dims 64 and 128. It computes and writes what
// `forward` in stick_breaking.cu does, with the same state, so that any backward pass goes on from it, or the part of the state
// next to each row, from which stick_breaking_hopper_sticks.cu goes on.
//
// A persistent block of one producer warp and WARPGROUPS consumer warpgroups takes items (a tile of 64 WARPGROUPS rows of one
// head) by an atomic ticket, the longest first. A consumer warpgroup has one piece of 64 rows. The producer copies Q once
// per item, then K and V in tiles of 128 keys from the newest to the oldest, each through a ring of stages. The keys lie
// permuted in shared memory (hopper.cuh), so that the scan along a row is serial within a lane, with three shuffles per
// tile. While a tile is scanned, the product of the weights before it with their values and, in other warpgroups, further
// products run on the tensor cores.
//
// The stream of K. Each stage carries the number of its tile; NO_MORE without data tells that nothing older follows. Every
// consumer takes every tile of the stream, whether it uses it or not: pieces of one item see different numbers of tiles, and
// with early exit each stops by itself. The producer stops when all have stopped, at most a few stages late: what is copied
// depends on timing then, what is used does not.
//
// Memory past the rows of a document. A tensor map reads no further than the tensor; tiles that start within its last 128 rows
// are copied by ordinary loads with zeros behind. Rows of the next document in Q and V are zeroed in
// shared memory, and hidden in K, so that not even a NaN passes from one document to another.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
// Consumer warpgroups, and stages of the rings.
#ifndef WARPGROUPS
#define WARPGROUPS (HEAD_DIM > 64 ? 2 : 3)
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM > 64 ? 2 : 4)
#endif
// Keys of one row that share a reciprocal.
#ifndef CHUNK
#define CHUNK (HEAD_DIM > 64 ? 4 : 8)
#endif
// 1: a warpgroup scans a tile while its product before that is under way, which takes 32 registers more.
#ifndef OVERLAP
#define OVERLAP (WARPGROUPS > 2 ? 0 : 1)
#endif
// 1: the warpgroups take turns in starting their products. 2: and the next one's turn comes when the scores are there, so that
// its products do not mix with these.
#ifndef TURNS
#define TURNS (HEAD_DIM > 64 ? 0 : 1)
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
// Registers of a producer thread and of a consumer thread: together at most what the block is launched with.
constexpr int PRODUCER_REGISTERS = WARPGROUPS > 2 ? 32 : 40, CONSUMER_REGISTERS = WARPGROUPS > 2 ? 160 : 232;
static_assert(PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS <= (1 + WARPGROUPS) * launch_registers(THREADS), "too many registers");

// In place of a tile's number: no older tile of the item follows.
constexpr int NO_MORE = -1;

struct Item {
    Tile tile;
    // -1: there is no further item.
    int head;
};

// Behind the tiles in shared memory.
struct Control {
    u64 q_full, q_empty;
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    // What stage of K holds which tile.
    int k_tile[STAGES];
    // The last item that each consumer has stopped in, counted from 1.
    int stopped[WARPGROUPS];
    Item item;
};
static_assert(sizeof(Control) <= 512, "the host reserves 512 bytes");

struct Forward {
    const bf16 *k, *v;
    bf16* o;
    float* rem;
    Stick* sticks;
    int* first_blocks;
    const int* tiles;
    u32* ticket;
    int key_stride, value_stride, output_stride;
    // `section` query heads at a time, so that their keys and values stay in L2.
    int tokens, tile_count, heads, group, section;
    // State entries and pieces of one head.
    int entries, pieces;
    // At most so many of a piece's newest blocks have their state kept; 0: all have, in the order of the portable kernels.
    int kept;
    int own_key;
    float factor, threshold;
};

// ------------------------------------------------------------------------------------------------ producer

DEVICE void produce(const Forward& p, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map, u8* shared) {
    const int lane = threadIdx.x & 31;
    u8* k_tiles = shared + WARPGROUPS * PIECE_BYTES;
    u8* v_tiles = k_tiles + STAGES * TILE_BYTES;
    Control& control = *(Control*)(v_tiles + STAGES * TILE_BYTES);
    volatile int* k_tile = control.k_tile;
    volatile int* stopped = control.stopped;
    const u32 q_shared = shared_address(shared);

    // A ring's stages start out empty: the producer is one round ahead.
    Place k_at = {0, 1}, v_at = {0, 1};
    u32 item_parity = 1;
    const int items = p.tile_count * p.heads;
    int index = blockIdx.x;
    for (int sequence = 1; index < items; sequence++) {
        const Position position = position_of(index, p.tile_count, 0, p.heads, p.section);
        const int head = position.head;
        const Tile tile = read_tile(p.tiles, position.tile);
        const int column = head / p.group * HEAD_DIM;
        int next = 0;
        if (lane == 0) next = atomicAdd(p.ticket, 1);

        auto push_k = [&](int n) {
            barrier_wait(shared_address(&control.k_empty[k_at.stage]), k_at.parity);
            if (lane == 0) k_tile[k_at.stage] = n;
            const u32 full = shared_address(&control.k_full[k_at.stage]);
            if (n >= 0) {
                bring_tile<TILE_KEYS>(k_tiles + k_at.stage * TILE_BYTES, full, k_map, p.k, p.key_stride, p.tokens,
                                      tile.start + n * TILE_KEYS, column);
            } else if (lane == 0) {
                barrier_arrive(full);
            }
            k_at.advance<STAGES>();
        };

        int n = visible_blocks<TILE_KEYS>(min(tile.first + ROWS, tile.length), p.own_key) - 1;
        push_k(n);
        barrier_wait(shared_address(&control.q_empty), item_parity);
        if (lane == 0) {
            control.item = {tile, head};
            const u32 full = shared_address(&control.q_full);
            barrier_expect(full, WARPGROUPS * PIECE_BYTES);
#pragma unroll
            for (int piece = 0; piece < WARPGROUPS; piece++)
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
                    copy_box(q_shared + piece * PIECE_BYTES + chunk * QUERY_CHUNK_BYTES, q_map, full, head * HEAD_DIM + 64 * chunk,
                             tile.start + tile.first + piece * PIECE);
        }
        __syncwarp();
        for (; n >= 0; n--) {
            bool stop = n == 0;
            if (n > 0) {
                if (p.threshold > 0.0f) {
                    stop = true;
#pragma unroll
                    for (int w = 0; w < WARPGROUPS; w++) stop = stop && stopped[w] == sequence;
                    stop = __all_sync(FULL_MASK, stop);
                }
                push_k(stop ? NO_MORE : n - 1);
            }
            barrier_wait(shared_address(&control.v_empty[v_at.stage]), v_at.parity);
            bring_tile<TILE_KEYS>(v_tiles + v_at.stage * TILE_BYTES, shared_address(&control.v_full[v_at.stage]), v_map, p.v,
                                  p.value_stride, p.tokens, tile.start + n * TILE_KEYS, column);
            v_at.advance<STAGES>();
            if (stop) break;
        }
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

constexpr int CHUNKS = TILE_KEYS / 4 / CHUNK;

// The odds replace the scores; `inverse` takes the inverse products of 1 + e of each lane's chunks of keys. Keys from
// `visible` on are hidden from a row if `masked`. False if such a product is so large somewhere that it or its inverse
// could leave the range of a float (or is NaN): then only the odds are of use.
template <bool masked>
DEVICE bool take_odds(float (&s)[64], float factor, const int (&visible)[2], float (&inverse)[2][CHUNKS]) {
    // Times a stick of more than 2^-60, the smallest inverse is still a normal float.
    constexpr float least = 8.6736174e-19f;  // 2^-60
    bool fine = true;
#pragma unroll
    for (int ch = 0; ch < CHUNKS; ch++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float w = 1.0f;
#pragma unroll
            for (int x = CHUNK * ch; x < CHUNK * ch + CHUNK; x++) {
                float& e = s[score_at(r, x)];
                e = exp2_approx(e * factor);
                if (masked && x >= visible[r]) e = 0.0f;
                w = x == CHUNK * ch ? 1.0f + e : fmaf(w, e, w);
            }
            inverse[r][ch] = rcp_approx(w);
            fine = fine && inverse[r][ch] >= least;
        }
    return fine;
}

// The weights A replace the odds. `stick` is what newer keys leave to the tile and becomes what the tile leaves; `edge` is
// what the keys of the quad's later lanes leave.
DEVICE void break_sticks(float (&e)[64], const float (&inverse)[2][CHUNKS], float (&stick)[2], float (&edge)[2]) {
    float left[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = inverse[r][0];
#pragma unroll
        for (int ch = 1; ch < CHUNKS; ch++) total *= inverse[r][ch];
        float newer, all;
        scan_products(total, newer, all);
        edge[r] = left[r] = stick[r] * newer;
        stick[r] *= all;
    }
#pragma unroll
    for (int ch = CHUNKS - 1; ch >= 0; ch--)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            left[r] *= inverse[r][ch];
            float s = left[r];
#pragma unroll
            for (int x = CHUNK * ch; x < CHUNK * ch + CHUNK; x++) {
                float& a = e[score_at(r, x)];
                a *= s;
                if (x < CHUNK * ch + CHUNK - 1) s += a;
            }
        }
}

// The same for any odds, with one reciprocal per key, computed twice: 32 of them would not fit into the registers.
DEVICE void break_saturated_sticks(float (&e)[64], float (&stick)[2], float (&edge)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = 1.0f;
#pragma unroll
        for (int x = 0; x < TILE_KEYS / 4; x++) {
            float& odds = e[score_at(r, x)];
            odds = clamp(odds, 1.1529215e18f);  // 2^60
            total *= rcp_approx(1.0f + odds);
        }
        float newer, all;
        scan_products(total, newer, all);
        float left = edge[r] = stick[r] * newer;
        stick[r] *= all;
#pragma unroll
        for (int x = TILE_KEYS / 4 - 1; x >= 0; x--) {
            float& a = e[score_at(r, x)];
            pin_one(a);
            left *= rcp_approx(1.0f + a);
            a *= left;
        }
    }
}

// Scores to weights.
template <bool masked>
DEVICE void scan(float (&s)[64], float factor, const int (&visible)[2], float (&stick)[2], float (&edge)[2]) {
    float inverse[2][CHUNKS];
    bool fine = take_odds<masked>(s, factor, visible, inverse);
    if (__all_sync(FULL_MASK, fine)) {
        break_sticks(s, inverse, stick, edge);
    } else {
        break_saturated_sticks(s, stick, edge);
    }
}

DEVICE void consume(const Forward& p, u8* shared) {
    const int group = uniform(threadIdx.x / 128) - 1;
    const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, c = lane & 3;
    u8* q_piece = shared + group * PIECE_BYTES;
    u8* v_tiles = shared + WARPGROUPS * PIECE_BYTES + STAGES * TILE_BYTES;
    Control& control = *(Control*)(v_tiles + STAGES * TILE_BYTES);
    const u32 k_shared = shared_address(shared + WARPGROUPS * PIECE_BYTES), v_shared = shared_address(v_tiles);
    const u64 q_operand = operand(shared_address(q_piece), 0);
    const int vote = 1 + group, turn = 1 + WARPGROUPS + group;
    const int next_turn = 1 + WARPGROUPS + (group + 1) % WARPGROUPS;
    const bool find_exit = p.threshold > 0.0f;

    Place k_at = {0, 0}, v_at = {0, 0};
    auto release = [&](u64& empty) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };
    auto release_k = [&]() {
        release(control.k_empty[k_at.stage]);
        k_at.advance<STAGES>();
    };
    auto wait_v = [&]() { barrier_wait(shared_address(&control.v_full[v_at.stage]), v_at.parity); };
    auto release_v = [&]() {
        release(control.v_empty[v_at.stage]);
        v_at.advance<STAGES>();
    };
    // The number of the next tile of K, which is there then, or NO_MORE.
    auto next_tile = [&]() {
        barrier_wait(shared_address(&control.k_full[k_at.stage]), k_at.parity);
        const int n = uniform(*(volatile int*)&control.k_tile[k_at.stage]);
        if (n < 0) release_k();
        return n;
    };
    auto take_turn = [&]() {
        if (TURNS) named_wait(turn, 256);
    };
    auto pass_turn = [&]() {
        if (TURNS) named_arrive(next_turn, 256);
    };
    auto pass_over = [&]() {
        take_turn();
        pass_turn();
        release_k();
        wait_v();
        release_v();
    };
    if (TURNS && group == WARPGROUPS - 1) named_arrive(next_turn, 256);

    float s[64], o[HEAD_DIM / 2];
    u32 weights[TILE_KEYS / 16][4];
    // s = Q K^T of the tile of K that is next.
    auto start_scores = [&]() {
        const u64 k_operand = operand(k_shared + k_at.stage * TILE_BYTES, 0);
        multiply_rows<QUERY_CHUNK_BYTES, KEY_CHUNK_BYTES>(s, q_operand, k_operand);
        products_commit();
    };
    // o += weights V with the tile of V that is next.
    auto start_values = [&]() {
        const u64 v_operand = operand(v_shared + v_at.stage * TILE_BYTES, KEY_CHUNK_BYTES);
#pragma unroll
        for (int step = 0; step < TILE_KEYS / 16; step++) multiply_registers(o, weights[step], operand_at(v_operand, step * 2048));
        products_commit();
    };
    auto pack_weights = [&]() {
#pragma unroll
        for (int step = 0; step < TILE_KEYS / 16; step++)
#pragma unroll
            for (int x = 0; x < 4; x++) weights[step][x] = pack_bf16(s[8 * step + 2 * x], s[8 * step + 2 * x + 1]);
    };

    u32 item_parity = 0;
    for (int sequence = 1;; sequence++) {
        barrier_wait(shared_address(&control.q_full), item_parity);
        item_parity ^= 1;
        const volatile Item& item = control.item;
        const int head = uniform(item.head);
        if (head < 0) break;
        const Tile tile = uniform(item.tile);

        // This warpgroup's piece of the item; this lane's rows in the document are row and row + 8.
        const int first = tile.first + group * PIECE, row = first + warp * 16 + g, piece = first / PIECE;
        const bool exists = first < tile.length;
        const int piece_end = min(first + PIECE, tile.length);
        const int piece_blocks = exists ? visible_blocks(piece_end, p.own_key) : 0;
        const int newest = exists ? visible_blocks<TILE_KEYS>(piece_end, p.own_key) - 1 : -1;
        // The oldest tile whose state this lane writes, and where it would write that of the oldest one.
        Stick* sticks = nullptr;
        int last_kept = newest + 1;
        if (p.sticks != nullptr && exists && c < 2) {
            const int oldest = p.kept == 0 ? 0 : first_kept(piece_blocks, p.kept);
            const i64 entry = p.kept == 0 ? (i64)head * p.entries + first_entry(tile, piece)
                                          : kept_entry((i64)head * p.pieces + tile.piece + piece, p.kept, oldest);
            sticks = p.sticks + (entry + c) * PIECE + (row & (PIECE - 1));
            last_kept = oldest / (TILE_KEYS / KEYS);
        }
        // Rows past the document's end have no stick, so they never keep a tile alive.
        float stick[2], edge[2];
#pragma unroll
        for (int r = 0; r < 2; r++) stick[r] = row + 8 * r < tile.length ? 1.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;

        if (exists && first + PIECE > tile.length) {
            // Half a row per thread.
            if (first + (thread >> 1) >= tile.length) {
#pragma unroll
                for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        *(uint4*)(q_piece + chunk * QUERY_CHUNK_BYTES + thread * 64 + i * 16) = make_uint4(0, 0, 0, 0);
            }
            publish_shared();
            named_wait(vote, 128);
        }

        auto stop = [&]() {
            if (thread == 0) *(volatile int*)&control.stopped[group] = sequence;
        };
        // Keeps the state past tile n; whether the piece needs older tiles.
        auto finish_tile = [&](int n) {
            if (n >= last_kept && 2 * n + c < piece_blocks) {
#pragma unroll
                for (int r = 0; r < 2; r++) sticks[(i64)(2 * n) * PIECE + 8 * r] = pack_stick(c == 0 ? stick[r] : edge[r]);
            }
            if (!find_exit) return true;
            bool alive = named_any(vote, 128, !(stick[0] < p.threshold) || !(stick[1] < p.threshold));
            if (!alive) stop();
            return alive;
        };

        int n = next_tile();
        if (find_exit && newest < 0) stop();
        // What only later pieces of the item see.
        while (n > newest) {
            pass_over();
            n = n > 0 ? next_tile() : NO_MORE;
        }
        bool more = false;
        int oldest = newest + 1;
        if (n >= 0) {
            // The newest tile, the only one with hidden keys.
            take_turn();
            products_begin();
            start_scores();
            if (TURNS == 1) pass_turn();
            products_wait<0>();
            pin(s);
            if (TURNS == 2) pass_turn();
            release_k();
            const int first_key = n * TILE_KEYS + c * (TILE_KEYS / 4);
            const int visible[2] = {min(row + p.own_key, tile.length) - first_key,
                                    min(row + 8 + p.own_key, tile.length) - first_key};
            scan<true>(s, p.factor, visible, stick, edge);
            pack_weights();
            if ((n + 1) * TILE_KEYS > tile.length) {
                wait_v();
                if (n * TILE_KEYS + permuted_key<TILE_KEYS>(thread) >= tile.length) {
#pragma unroll
                    for (int chunk = 0; chunk < COLUMN_CHUNKS; chunk++)
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            *(uint4*)(v_tiles + v_at.stage * TILE_BYTES + chunk * KEY_CHUNK_BYTES + thread * 128 + i * 16) =
                                make_uint4(0, 0, 0, 0);
                }
                publish_shared();
                named_wait(vote, 128);
            }
            bool alive = finish_tile(n);
            while (true) {
                more = n > 0;
                if (!more || !alive) break;
                const int older = next_tile();
                if (older < 0) {
                    more = false;
                    break;
                }
                n = older;
                pin(weights);
                take_turn();
                products_begin();
                start_scores();
                wait_v();
                // Again: the wait lies between the weights' registers and the products that read them.
                products_begin();
                start_values();
                if (TURNS == 1) pass_turn();
                products_wait<OVERLAP ? 1 : 0>();
                pin(s);
                if (TURNS == 2) pass_turn();
                release_k();
                if (!OVERLAP) release_v();
                scan<false>(s, p.factor, visible, stick, edge);
                if (OVERLAP) {
                    products_wait<0>();
                    pin(s);
                    release_v();
                }
                pack_weights();
                alive = finish_tile(n);
            }
            oldest = n;
        }
        // Q is read.
        release(control.q_empty);
        if (oldest <= newest) {
            wait_v();
            pin(weights);
            products_begin();
            start_values();
            products_wait<0>();
            release_v();
        }
        pin(o);
        // What only other pieces of the item still need.
        while (more) {
            n = next_tile();
            if (n < 0) break;
            pass_over();
            more = n > 0;
        }

        if (!exists) continue;
        if (p.first_blocks != nullptr && thread == 0)
            p.first_blocks[(i64)head * p.pieces + tile.piece + piece] = min(oldest * (TILE_KEYS / KEYS), piece_blocks);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = row + 8 * r;
            const bool in = at < tile.length;
            if (p.rem != nullptr && c == 0 && in) p.rem[(i64)(tile.start + at) * p.heads + head] = stick[r];
            bf16* to = p.o + (i64)(tile.start + at) * p.output_stride + head * HEAD_DIM + c * 8;
            store_row(to, o, r, 1.0f, in);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) stick_breaking_forward_hopper_bf16(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const bf16* k, const bf16* v, bf16* o, float* rem, Stick* sticks, int* first_blocks, const int* tiles, u32* ticket,
    int key_stride, int value_stride, int output_stride, int tokens, int tile_count, int heads, int group, int section,
    int entries, int pieces, int kept, int own_key, float factor, float threshold) {
    extern __shared__ __align__(1024) u8 shared[];
    Control& control = *(Control*)(shared + WARPGROUPS * PIECE_BYTES + 2 * STAGES * TILE_BYTES);
    const Forward p = {k, v, o, rem, sticks, first_blocks, tiles, ticket, key_stride, value_stride, output_stride,
                       tokens, tile_count, heads, group, section, entries, pieces, kept, own_key, factor, threshold};
    if (threadIdx.x == 0) {
        if (shared_address(shared) % 1024 != 0) __trap();
        prefetch_map(q_map);
        prefetch_map(k_map);
        prefetch_map(v_map);
        // Full: one arrival of the producer and the bytes; empty: one of each consumer warp.
        barrier_init(shared_address(&control.q_full), 1);
        barrier_init(shared_address(&control.q_empty), 4 * WARPGROUPS);
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(shared_address(&control.k_full[stage]), 1);
            barrier_init(shared_address(&control.v_full[stage]), 1);
            barrier_init(shared_address(&control.k_empty[stage]), 4 * WARPGROUPS);
            barrier_init(shared_address(&control.v_empty[stage]), 4 * WARPGROUPS);
        }
        for (int w = 0; w < WARPGROUPS; w++) control.stopped[w] = 0;
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(p, q_map, k_map, v_map, shared);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(p, shared);
    }
}
