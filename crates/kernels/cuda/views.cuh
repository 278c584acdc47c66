// Views of any strides, as kernel arguments. Put after common.cuh and units.cuh.
//
// A view has `rank` dimensions after merging, 1 to 6, innermost first (n0, n1, ...), with strides in elements for each
// operand. A rank of 1 may have any number of elements, higher ranks fewer than 2^32.

#define RANK 6
#define SHAPE_ARGS(n) u32 n##0, u32 n##1, u32 n##2, u32 n##3, u32 n##4, u32 n##5
#define SHAPE(n) {n##0, n##1, n##2, n##3, n##4, n##5}
#define STRIDE_ARGS(x) u64 x##0, u64 x##1, u64 x##2, u64 x##3, u64 x##4, u64 x##5
#define STRIDES(x) {x##0, x##1, x##2, x##3, x##4, x##5}

// Where element i of the row-major order lies in N operands.
template <int N> DEVICE void locate(u64 i, u32 rank, const u32 (&shape)[RANK], const u64 (&strides)[N][RANK], u64 (&at)[N]) {
    if (rank == 1) {
#pragma unroll
        for (int k = 0; k < N; k++) at[k] = i * strides[k][0];
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++) at[k] = 0;
    u32 rest = (u32)i;
#pragma unroll
    for (int d = 0; d < RANK; d++) {
        if (d + 1 < rank) {
            u32 quotient = rest / shape[d];
            u32 digit = rest - quotient * shape[d];
#pragma unroll
            for (int k = 0; k < N; k++) at[k] += digit * strides[k][d];
            rest = quotient;
        } else if (d + 1 == rank) {
#pragma unroll
            for (int k = 0; k < N; k++) at[k] += rest * strides[k][d];
        }
    }
}
