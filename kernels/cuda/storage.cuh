// How numbers lie in memory, and in which type they are computed with.
#pragma once

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

template <class T> struct Computed { using type = float; };
template <> struct Computed<double> { using type = double; };

__device__ inline float read(float x) { return x; }
__device__ inline double read(double x) { return x; }
__device__ inline float read(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void write(float& to, float x) { to = x; }
__device__ inline void write(double& to, double x) { to = x; }
__device__ inline void write(bfloat16& to, float x) {
    unsigned bits = __float_as_uint(x);
    // To the nearest, ties to even; a NaN stays one.
    to.bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0;
}

#ifdef PAIRWISE_ON_CPU
__device__ inline float exponential(float x) { return exp(x); }
__device__ inline float read(float16 x) { _Float16 y; memcpy(&y, &x, 2); return y; }
__device__ inline void write(float16& to, float x) { _Float16 y = x; memcpy(&to, &y, 2); }
#else
// To about |x| · 10⁻⁷ of the result.
__device__ inline float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.4426950408889634f * x));
    return y;
}
__device__ inline float read(float16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ inline void write(float16& to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
#endif

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

// Four neighbours, read from shared memory at once.
template <class T> struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Four { T at[4]; };
template <class T> __device__ inline Four<T> four(const T* from) { return *reinterpret_cast<const Four<T>*>(from); }
