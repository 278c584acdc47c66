// What the portable and the sm_90a kernels of stick-breaking attention share: the tile lists, the layout of the state
// (stick_breaking.cu describes it), and scans along a row. HEAD_DIM is defined before this.

// Keys of a block of the state.
#ifndef KEYS
#define KEYS (HEAD_DIM > 128 ? 32 : 64)
#endif
// Rows of a piece of the state.
constexpr int PIECE = 64;

// What a row has left of its stick, as the state keeps it: 6 bits of exponent and 10 of mantissa, so above 2^-63 up to 1 to within
// 2^-11 (the rounding of the weights to bf16 is eight times as coarse), 0 below, and not a number where a score is not.
struct Stick {
    u16 bits;
};
constexpr u32 STICK_ZERO = 64u << 23;
constexpr u16 NO_STICK = 0xffff;
DEVICE Stick pack_stick(float x) {
    // To nearest. 1 is 0xfc00.
    const int bits = (int)(__float_as_uint(x) - STICK_ZERO + 0x1000);
    return {x <= 1.0f ? (u16)(max(bits, 0) >> 13) : NO_STICK};
}
DEVICE float to_float(Stick x) {
    const u32 bits = x.bits == NO_STICK ? 0x7fffffff : ((u32)x.bits << 13) + STICK_ZERO;
    return x.bits == 0 ? 0.0f : __uint_as_float(bits);
}

// The backward pass, and the forward pass on saturated scores, clamp 2^z here, only against infinity: 1 - beta below 2^-60
// is nothing to any row that has more than one key.
constexpr float ODDS_LIMIT = 60.0f;

// One entry of the tile lists: a run of rows (or keys) of one document.
struct Tile {
    // First token of the document, its length, the tile's first row in it, the document's first state entry, the
    // document's first piece.
    int start, length, first, entry, piece;
};
DEVICE Tile read_tile(const int* tiles, int index) {
    tiles += index * 5;
    return {tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]};
}

// Blocks of keys that rows below `end` see (the last of them; end >= 1).
template <int keys = KEYS> DEVICE int visible_blocks(int end, int own_key) { return (end - 1 + own_key + keys - 1) / keys; }
DEVICE int first_entry(const Tile& tile, int piece) { return tile.entry + piece * (piece + 1) / 2 * (PIECE / KEYS); }

// The smaller one; NaN if there is one, so that a NaN in q or k shows in the output.
DEVICE float clamp(float x, float limit) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
    return y;
}

// Over the quad's lanes of newer keys (larger c): the product.
DEVICE float newer_product(float x) {
    const int c = threadIdx.x & 3;
    float next = __shfl_down_sync(FULL_MASK, x, 1, 4);
    if (c == 3) next = 1.0f;
    float second = __shfl_down_sync(FULL_MASK, x * next, 2, 4);
    if (c >= 2) second = 1.0f;
    return next * second;
}
// Over the quad's lanes of older keys (smaller c): the sum.
DEVICE float older_sum(float x) {
    const int c = threadIdx.x & 3;
    float next = __shfl_up_sync(FULL_MASK, x, 1, 4);
    if (c == 0) next = 0.0f;
    float second = __shfl_up_sync(FULL_MASK, x + next, 2, 4);
    if (c < 2) second = 0.0f;
    return next + second;
}

// Products over the quad's lanes: `newer` over the lanes of newer keys (larger c), `all` over the four.
DEVICE void scan_products(float x, float& newer, float& all) {
    newer = newer_product(x);
    all = __shfl_sync(FULL_MASK, x * newer, 0, 4);
}
// Sums over the quad's lanes: `older` over the lanes of older keys (smaller c), `all` over the four.
DEVICE void scan_sums(float x, float& older, float& all) {
    older = older_sum(x);
    all = __shfl_sync(FULL_MASK, x + older, 3, 4);
}
