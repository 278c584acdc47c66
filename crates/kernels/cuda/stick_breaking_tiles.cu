// How many tiles early exit left out. A walk goes from the newest key tile to the oldest, so the number of the oldest tile
// that a query tile visited, counted from the document's first, is the number of tiles that it left out.
//
// Reads   first [heads, tiles], u32: for each query tile the number of the oldest key tile visited.
// Writes  skipped [heads], u32, their sums. (A sum past 2^32 would take a document of five million tokens.)
//
// Launch  256 threads, one block a head.

constexpr int THREADS = 256;

DEVICE u32 warp_count(u32 x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) stick_breaking_skipped_tiles(const u32* first, u32* skipped, int tiles) {
    __shared__ u32 parts[THREADS / 32];
    first += (u64)blockIdx.x * tiles;
    u32 sum = 0;
    for (int tile = threadIdx.x; tile < tiles; tile += THREADS) sum += first[tile];
    sum = warp_count(sum);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = warp_count(threadIdx.x < THREADS / 32 ? parts[threadIdx.x] : 0);
    if (threadIdx.x == 0) skipped[blockIdx.x] = sum;
}
