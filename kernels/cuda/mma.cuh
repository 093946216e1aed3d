// Products of small bfloat16 matrices by a warp, on tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16").
//
// Lane 4 g + q holds, of a 16×8 result in float32, columns 2q and 2q+1 of row g (at 0 and 1) and of row g+8 (at 2 and 3);
// of an 8×8 matrix in bfloat16, columns 2q and 2q+1 of row g as one word. A left factor, 16×16, is four such matrices:
// rows 0–7 and 8–15 of the first eight columns, then of the last eight. So two results beside each other, rounded, are the
// left factor of the next product. tests/kernels/cuda_on_cpu.h does the same on a CPU, from these layouts.
#pragma once
#include "storage.cuh"

struct alignas(8) Fragment { unsigned first, last; };  // of a right factor, 16×8: (k, n) at 2q, 2q+1 and 2q+8, 2q+9 of k; n = g
struct alignas(16) Words { unsigned at[4]; };

__device__ inline float low(unsigned x) { return __uint_as_float(x << 16); }
__device__ inline float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }

#ifndef PAIRWISE_ON_CPU
// Two numbers as bfloat16, the first in the lower half.
__device__ inline unsigned packed(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Their ReLUs; of NaN it is NaN.
__device__ inline unsigned packed_relu(float low, float high) {
    unsigned both;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// sum += left · right. All lanes of a warp.
__device__ inline void multiply(float (&sum)[4], const unsigned (&left)[4], Fragment right) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right.first), "r"(right.last));
}

// An 8×8 matrix, mirrored at its diagonal. All lanes of a warp.
__device__ inline unsigned transposed(unsigned matrix) {
    unsigned mirrored;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(mirrored) : "r"(matrix));
    return mirrored;
}
#endif
