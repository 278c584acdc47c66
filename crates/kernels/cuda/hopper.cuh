// What the sm_90a kernels share: asynchronous barriers, copies of boxes by tensor maps (TMA), and matrix products of a
// warpgroup (wgmma) on bf16 tiles in shared memory. Put after common.cuh.
//
// Tiles. A tile of `rows` rows lies in chunks of 64 columns: [chunk][row][64], 128 bytes a row, 16-byte units swizzled:
// unit u of row r is at place u ^ (r & 7). Tiles start at multiples of 1024 bytes. This is what a tensor map with a box 64
// elements wide and a 128-byte swizzle writes, and what the descriptors below describe.
//
// Fragments, for thread t of a warpgroup, warp w = t / 32, lane = 4 g + c: element 4 j + x of the accumulators of 64 x N
// holds row 16 w + g (x < 2) or 16 w + g + 8, column 8 j + 2 c + (x & 1): 16 rows of mma.sync per warp. Accumulators of
// columns 16 i .. 16 i + 15, packed in pairs, are the left operand of inner step i of a further product.

// A tensor map as the driver encodes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A value that is the same in all lanes, in a way that the compiler sees: where control flow depends on anything else,
// ptxas makes the products of wgmma wait for one another (C7520).
DEVICE int uniform(int x) { return __shfl_sync(FULL_MASK, x, 0); }

// ------------------------------------------------------------------------------------------------ barriers

// In shared memory: completes a phase when `count` threads have arrived and all bytes that were announced are there.
DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces the bytes that copies will bring.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed != 0;
}
// Waits until the phase of this parity is complete. A barrier starts in phase 0, as if the phase of parity 1 were complete.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    while (!barrier_passed(barrier, parity)) {}
}
// Makes initialised barriers visible to copies. A barrier of the block has to follow.
DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers of `threads` threads (0 is __syncthreads): wait for all, arrive without waiting, wait and vote.
DEVICE void named_wait(int barrier, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void named_arrive(int barrier, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE bool named_any(int barrier, int threads, bool mine) {
    u32 any;
    asm volatile(
        "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %3, 0;\n\tbarrier.cta.red.or.pred.aligned q, %1, %2, p;\n\t"
        "selp.u32 %0, 1, 0, q;\n\t}"
        : "=r"(any) : "r"(barrier), "r"(threads), "r"((u32)mine) : "memory");
    return uniform(any) != 0;
}

// ------------------------------------------------------------------------------------------------ copies

// Ordinary writes to shared memory become visible to copies and to wgmma, once a barrier has followed.
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&map) : "memory");
}
// Starts the copy of a box to shared memory; its bytes count towards `barrier`.
DEVICE void copy_box(u32 to, const TensorMap& map, u32 barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"((u64)&map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
DEVICE void copy_box(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"((u64)&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Starts the copy of `bytes` bytes, a multiple of 16, in a row; they count towards `barrier`.
DEVICE void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// The order of the keys in a tile of them: row n holds key permuted_key(n), so that lane c of a quad owns the keys from
// c keys / 4 to (c + 1) keys / 4.
template <int keys> constexpr __device__ int permuted_key(int row) {
    return keys / 4 * ((row >> 1) & 3) + 2 * (row >> 3) + (row & 1);
}

// ------------------------------------------------------------------------------------------------ registers

// Of a thread at launch, when a block of so many threads has a multiprocessor to itself: what the block's threads pass on to
// one another.
constexpr __device__ int launch_registers(int threads) { return 65536 / threads / 8 * 8; }
template <int count> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }

// ------------------------------------------------------------------------------------------------ products

// Descriptor of an operand in a swizzled tile. Rows along the inner dimension (K-major): `far` is not used; the next 16
// inner elements are 32 bytes on. Rows across it (MN-major): `far` is the distance of 64-column chunks; the next 16 inner
// elements are 16 rows, 2048 bytes, on.
DEVICE u64 operand(u32 address, u32 far) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(far >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// The operand `bytes` further on.
DEVICE u64 operand_at(u64 operand, int bytes) { return operand + (u64)(bytes >> 4); }

// Registers of products that follow were written before; registers of products before may be read after `products_wait`.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses of these registers across, and from what it knew of their values.
DEVICE void pin_one(float& x) { asm volatile("" : "+f"(x)); }
template <int count> DEVICE void pin(float (&x)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(x[i])::"memory");
}

template <int rows, int columns> DEVICE void pin(u32 (&x)[rows][columns]) {
#pragma unroll
    for (int i = 0; i < rows; i++)
#pragma unroll
        for (int j = 0; j < columns; j++) asm volatile("" : "+r"(x[i][j])::"memory");
}

#define ACCUMULATORS_8(x, i)                                                                                            \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define ACCUMULATORS_32(x, i) \
    ACCUMULATORS_8(x, i), ACCUMULATORS_8(x, i + 8), ACCUMULATORS_8(x, i + 16), ACCUMULATORS_8(x, i + 24)
#define NAMES_32                                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "    \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                        \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (+)= a b^T for 64 x 128: both operands in shared memory, rows along the inner dimension; one inner step of 16. Without
// `add` d is overwritten.
template <bool add> DEVICE void multiply_shared(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n\t}"
        : ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32) : "l"(a), "l"(b), "n"((int)add));
}
// The same for 64 x 64.
template <bool add> DEVICE void multiply_shared(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, p, 1, 1, 0, 0;\n\t}"
        : ACCUMULATORS_32(d, 0) : "l"(a), "l"(b), "n"((int)add));
}
// d += a b for 64 x 128 or 64 x 64: a in registers, b in shared memory with rows across the inner dimension.
DEVICE void multiply_registers(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n\t}"
        : ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_registers(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n\t}"
        : ACCUMULATORS_32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d += a^T b for 64 x 64 or 64 x 128: both operands in shared memory with rows across the inner dimension.
DEVICE void multiply_transposed(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, p, 1, 1, 1, 1;\n\t}"
        : ACCUMULATORS_32(d, 0) : "l"(a), "l"(b));
}
DEVICE void multiply_transposed(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, p, 1, 1, 1, 1;\n\t}"
        : ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32) : "l"(a), "l"(b));
}

// d (+)= a b for 64 x 64: both operands in shared memory, a with rows along the inner dimension, b with rows across it.
template <bool add> DEVICE void multiply_across(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, p, 1, 1, 0, 1;\n\t}"
        : ACCUMULATORS_32(d, 0) : "l"(a), "l"(b), "n"((int)add));
}

// The same for 64 x 32.
template <bool add> DEVICE void multiply_across(float (&d)[16], u64 a, u64 b) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %18, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
        "%14, %15}, %16, %17, p, 1, 1, 0, 1;\n\t}"
        : ACCUMULATORS_8(d, 0), ACCUMULATORS_8(d, 8) : "l"(a), "l"(b), "n"((int)add));
}

// Four 8 x 8 matrices of accumulators, rounded and packed in pairs; each lane has the address of one of their rows.
DEVICE void store_matrices(u32 address, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
