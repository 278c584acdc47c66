// What every kernel file starts with. The runtime puts this text before each .cu file, so no file includes anything:
// NVRTC needs no include path and no CUDA header.
//
// Types: float, and bf16 as raw bits (`bf16`). All arithmetic is in float; bf16 is rounded to nearest even once, when a
// result is stored. Every sum has a fixed order, so that the same launch gives the same bits: there are no float atomics
// but in stick_breaking_hopper_backward.cu, whose blocks take turns.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
#define INFINITY_F __int_as_float(0x7f800000)
#define FULL_MASK 0xffffffffu

// ------------------------------------------------------------------------------------------------ bf16

struct bf16 {
    u16 bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Two floats, rounded to nearest even, as one register: `low` in bits 0-15.
DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE float low_bf16(u32 packed) { return __uint_as_float(packed << 16); }
DEVICE float high_bf16(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }

DEVICE void store(float* p, float x) { *p = x; }
DEVICE void store(bf16* p, float x) { p->bits = (u16)pack_bf16(x, 0.0f); }

// ------------------------------------------------------------------------------------------------ vectors

// 16 bytes: 4 floats or 8 bf16. Addresses must be multiples of 16.
template <typename T> struct Vector;
template <> struct Vector<float> { enum { width = 4 }; };
template <> struct Vector<bf16> { enum { width = 8 }; };

DEVICE void load_vector(const float* p, float (&x)[4]) {
    float4 v = *(const float4*)p;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
}
DEVICE void load_vector(const bf16* p, float (&x)[8]) {
    uint4 v = *(const uint4*)p;
    x[0] = low_bf16(v.x); x[1] = high_bf16(v.x); x[2] = low_bf16(v.y); x[3] = high_bf16(v.y);
    x[4] = low_bf16(v.z); x[5] = high_bf16(v.z); x[6] = low_bf16(v.w); x[7] = high_bf16(v.w);
}
DEVICE void store_vector(float* p, const float (&x)[4]) { *(float4*)p = make_float4(x[0], x[1], x[2], x[3]); }
DEVICE void store_vector(bf16* p, const float (&x)[8]) {
    *(uint4*)p = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// ------------------------------------------------------------------------------------------------ reductions

// Sum over the 32 lanes, in a fixed order, the same in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// Sum over a block of whole warps (at most 1024 threads), the same in every thread. `scratch`: 32 floats of shared memory,
// free again when the function returns.
DEVICE float block_sum(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
    __syncthreads();
    return x;
}
DEVICE float block_max(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? scratch[lane] : -INFINITY_F);
    __syncthreads();
    return x;
}

// ------------------------------------------------------------------------------------------------ special functions

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
