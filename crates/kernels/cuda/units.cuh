// Units: W consecutive elements that one thread moves at once, at most 16 bytes per access. Put after common.cuh.
//
// A kernel that works in units takes W as a template parameter: the widest where addresses and sizes allow it (the host
// checks), 1 otherwise.

#define DEVICE_MEMBER __device__ __forceinline__

// W elements of type T as loaded: raw bits, so that a kernel can hold many of them in few registers.
template <typename T, int W> struct Unit {
    enum { bytes = W * (int)sizeof(T), words = bytes < 4 ? 1 : bytes / 4 };
    u32 bits[words];

    DEVICE_MEMBER void load(const T* p) {
        if constexpr (bytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < words / 4; i++) {
                uint4 v = ((const uint4*)p)[i];
                bits[4 * i] = v.x; bits[4 * i + 1] = v.y; bits[4 * i + 2] = v.z; bits[4 * i + 3] = v.w;
            }
        } else if constexpr (bytes == 8) {
            uint2 v = *(const uint2*)p;
            bits[0] = v.x; bits[1] = v.y;
        } else if constexpr (bytes == 4) {
            bits[0] = *(const u32*)p;
        } else {
            bits[0] = *(const u16*)p;
        }
    }

    DEVICE_MEMBER void store(T* p) const {
        if constexpr (bytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < words / 4; i++)
                ((uint4*)p)[i] = make_uint4(bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]);
        } else if constexpr (bytes == 8) {
            *(uint2*)p = make_uint2(bits[0], bits[1]);
        } else if constexpr (bytes == 4) {
            *(u32*)p = bits[0];
        } else {
            *(u16*)p = (u16)bits[0];
        }
    }

    // Elements `stride` apart: 1 is the plain load, 0 repeats one element.
    DEVICE_MEMBER void load(const T* p, u64 stride) {
        if (stride == 1) {
            load(p);
            return;
        }
        clear();
#pragma unroll
        for (int i = 0; i < W; i++) set_raw(i, p + (stride == 0 ? 0 : i * stride));
    }

    DEVICE_MEMBER void store(T* p, u64 stride) const {
        if (stride == 1) {
            store(p);
            return;
        }
#pragma unroll
        for (int i = 0; i < W; i++) {
            if constexpr (sizeof(T) == 2) {
                *(u16*)(p + i * stride) = (u16)(bits[i / 2] >> (16 * (i % 2)));
            } else {
                *(u32*)(p + i * stride) = bits[i];
            }
        }
    }

    DEVICE_MEMBER void clear() {
#pragma unroll
        for (int i = 0; i < words; i++) bits[i] = 0;
    }

    // Element i as a float.
    DEVICE_MEMBER float get(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(bits[i]);
        } else {
            return i % 2 == 0 ? low_bf16(bits[i / 2]) : high_bf16(bits[i / 2]);
        }
    }

    DEVICE_MEMBER void unpack(float (&x)[W]) const {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = get(i);
    }

    // Rounds to nearest even if T is bf16.
    DEVICE_MEMBER void pack(const float (&x)[W]) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < W; i++) bits[i] = __float_as_uint(x[i]);
        } else if constexpr (W == 1) {
            bits[0] = pack_bf16(x[0], 0.0f);
        } else {
#pragma unroll
            for (int i = 0; i < words; i++) bits[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        }
    }

  private:
    DEVICE_MEMBER void set_raw(int i, const T* p) {
        if constexpr (sizeof(T) == 4) {
            bits[i] = *(const u32*)p;
        } else {
            bits[i / 2] |= (u32)*(const u16*)p << (16 * (i % 2));
        }
    }
};

// Elements of a unit for kernels whose widest type is T.
template <typename T> struct Widest { enum { width = 16 / (int)sizeof(T) }; };

// This thread among all threads of a one-dimensional launch.
DEVICE u64 thread_index() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE u64 thread_count() { return (u64)gridDim.x * blockDim.x; }

// 1 / (1 + e^-x), within a few units in the last place; 0 and 1 at the far ends.
DEVICE float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-1.4426950408889634f * x)); }

// max that keeps NaN (fmaxf drops it).
DEVICE float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
