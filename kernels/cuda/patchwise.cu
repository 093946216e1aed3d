// The first layer of patchwise attention's mapping, from every footprint, without a copy of the footprints
// (Zhao, Jia, Koltun, CVPR 2020, section 3.2):
//     h[o, i] = Σ_r Σ_j mix[o, r, j] · relu(scale[r, j] · x[r, q] + shift[r, j]),   q under position j of pixel i,
// on a map that is padded already; scale and shift are the first batch norm. `mix` lies here as (r, j, o).
//
// One thread a pixel; threads of a warp read the same weights. Gradients are gathered or summed in order, not added
// atomically: two runs give the same bits.
// Set when compiling: OUTPUTS, AT_ONCE (outputs a thread does, divides OUTPUTS), KERNEL (the footprint's side), VALUE.
#include "footprint.cuh"
#include "storage.cuh"

using REAL = Computed<VALUE>::type;
constexpr int THREADS = 128, POSITIONS = KERNEL * KERNEL, PARTS = OUTPUTS / AT_ONCE;

struct Maps : Footprint {
    int images, inputs;
};

__device__ inline REAL relu(REAL x) { return x < 0 ? REAL(0) : x; }  // keeps NaN

// N weights of neighbouring outputs, four at a time where that is aligned.
template <int N> __device__ void read_weights(REAL (&to)[N], const REAL* from) {
    if constexpr (N % 4 == 0 && OUTPUTS % 4 == 0) {
#pragma unroll
        for (int o = 0; o < N; o += 4) {
            Four<REAL> weights = four(from + o);
#pragma unroll
            for (int e = 0; e < 4; ++e) to[o + e] = weights.at[e];
        }
    } else {
#pragma unroll
        for (int o = 0; o < N; ++o) to[o] = from[o];
    }
}

// A block does THREADS pixels and AT_ONCE outputs.
extern "C" __global__ void __launch_bounds__(THREADS)
mix_patches(const VALUE* __restrict__ x, const REAL* __restrict__ scale, const REAL* __restrict__ shift,
            const REAL* __restrict__ mix, VALUE* __restrict__ h, Maps maps) {
    int first = blockIdx.x % PARTS * AT_ONCE;
    long long index = static_cast<long long>(blockIdx.x / PARTS) * THREADS + threadIdx.x;
    long long image = index / maps.pixels(), p = index % maps.pixels();
    if (image >= maps.images) return;
    REAL sum[AT_ONCE] = {};
    for (int r = 0; r < maps.inputs; ++r) {
        const VALUE* map = x + (image * maps.inputs + r) * maps.padded_pixels();
        for (int u = 0; u < KERNEL; ++u)
#pragma unroll
            for (int v = 0; v < KERNEL; ++v) {
                int at = r * POSITIONS + u * KERNEL + v;
                REAL a = relu(scale[at] * read(map[maps.under(p, u, v)]) + shift[at]);
                REAL weight[AT_ONCE];
                read_weights(weight, mix + static_cast<long long>(at) * OUTPUTS + first);
#pragma unroll
                for (int o = 0; o < AT_ONCE; ++o) sum[o] += weight[o] * a;
            }
    }
#pragma unroll
    for (int o = 0; o < AT_ONCE; ++o) write(h[(image * OUTPUTS + first + o) * maps.pixels() + p], sum[o]);
}

// dL/dx. A thread does one pixel of ROWS channels, so that a gradient of h that was read serves them all.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_map(const VALUE* __restrict__ of_h, const VALUE* __restrict__ x, const REAL* __restrict__ scale,
             const REAL* __restrict__ shift, const REAL* __restrict__ mix, VALUE* __restrict__ of_x, Maps maps) {
    constexpr int ROWS = 4;
    int parts = (maps.inputs + ROWS - 1) / ROWS, first = blockIdx.x % parts * ROWS;
    long long index = static_cast<long long>(blockIdx.x / parts) * THREADS + threadIdx.x;
    long long image = index / maps.padded_pixels(), q = index % maps.padded_pixels();
    if (image >= maps.images) return;
    REAL own[ROWS], total[ROWS] = {};
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
        own[k] = first + k < maps.inputs ? read(x[(image * maps.inputs + first + k) * maps.padded_pixels() + q]) : REAL(0);
    for (int j = 0; j < POSITIONS; ++j) {
        long long p = maps.over(q, j / KERNEL, j % KERNEL);
        if (p < 0) continue;
        REAL of_a[ROWS] = {};
        constexpr int STEP = OUTPUTS % 4 == 0 ? 4 : 1;
        for (int o = 0; o < OUTPUTS; o += STEP) {
            REAL g[STEP], weight[STEP];
#pragma unroll
            for (int e = 0; e < STEP; ++e) g[e] = read(of_h[(image * OUTPUTS + o + e) * maps.pixels() + p]);
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                int r = first + k < maps.inputs ? first + k : 0;
                read_weights(weight, mix + (static_cast<long long>(r) * POSITIONS + j) * OUTPUTS + o);
#pragma unroll
                for (int e = 0; e < STEP; ++e) of_a[k] += g[e] * weight[e];
            }
        }
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            int at = (first + k < maps.inputs ? first + k : 0) * POSITIONS + j;
            REAL a = scale[at] * own[k] + shift[at];
            total[k] += a > 0 ? scale[at] * of_a[k] : a == a ? REAL(0) : a;
        }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k)
        if (first + k < maps.inputs) write(of_x[(image * maps.inputs + first + k) * maps.padded_pixels() + q], total[k]);
}

constexpr int NUMBERS = KERNEL * (AT_ONCE + 2);
__shared__ REAL partial[NUMBERS * (THREADS + 1)];

// Sums over `pixels_at_once` pixels of all images: dL/dmix (parts, r, j, o), and what AT_ONCE outputs give to dL/dscale and
// dL/dshift (parts, PARTS, 2, r, j). A block does one channel r, one row u of the footprint, AT_ONCE outputs.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_parameters(const VALUE* __restrict__ of_h, const VALUE* __restrict__ x, const REAL* __restrict__ scale,
                    const REAL* __restrict__ shift, const REAL* __restrict__ mix, REAL* __restrict__ of_mix,
                    REAL* __restrict__ of_norm, Maps maps, int pixels_at_once) {
    int part = blockIdx.x % PARTS, u = blockIdx.x / PARTS % KERNEL, r = blockIdx.x / PARTS / KERNEL % maps.inputs;
    long long chunk = blockIdx.x / PARTS / KERNEL / maps.inputs;
    long long begin = chunk * pixels_at_once, end = begin + pixels_at_once, all = maps.images * maps.pixels();
    REAL weight[KERNEL][AT_ONCE], numbers[NUMBERS] = {};  // of each v: AT_ONCE of mix, scale, shift
#pragma unroll
    for (int v = 0; v < KERNEL; ++v)
#pragma unroll
        for (int o = 0; o < AT_ONCE; ++o)
            weight[v][o] = mix[(static_cast<long long>(r) * POSITIONS + u * KERNEL + v) * OUTPUTS + part * AT_ONCE + o];
    for (long long index = begin + threadIdx.x; index < (end < all ? end : all); index += THREADS) {
        long long image = index / maps.pixels(), p = index % maps.pixels();
        const VALUE* map = x + (image * maps.inputs + r) * maps.padded_pixels();
        REAL g[AT_ONCE];
#pragma unroll
        for (int o = 0; o < AT_ONCE; ++o) g[o] = read(of_h[(image * OUTPUTS + part * AT_ONCE + o) * maps.pixels() + p]);
#pragma unroll
        for (int v = 0; v < KERNEL; ++v) {
            int at = r * POSITIONS + u * KERNEL + v;
            REAL own = read(map[maps.under(p, u, v)]), a = relu(scale[at] * own + shift[at]), of_a = 0;
#pragma unroll
            for (int o = 0; o < AT_ONCE; ++o) {
                numbers[v * (AT_ONCE + 2) + o] += g[o] * a;
                of_a += g[o] * weight[v][o];
            }
            of_a = a > 0 ? of_a : a == a ? REAL(0) : a;
            numbers[v * (AT_ONCE + 2) + AT_ONCE] += of_a * own;
            numbers[v * (AT_ONCE + 2) + AT_ONCE + 1] += of_a;
        }
    }
#pragma unroll
    for (int k = 0; k < NUMBERS; ++k) partial[k * (THREADS + 1) + threadIdx.x] = numbers[k];
    __syncthreads();
    for (int k = threadIdx.x; k < NUMBERS; k += THREADS) {
        REAL sum = 0;
        for (int thread = 0; thread < THREADS; ++thread) sum += partial[k * (THREADS + 1) + thread];
        long long row = chunk * maps.inputs + r;
        int at = u * KERNEL + k / (AT_ONCE + 2), which = k % (AT_ONCE + 2);
        if (which < AT_ONCE) of_mix[(row * POSITIONS + at) * OUTPUTS + part * AT_ONCE + which] = sum;
        else of_norm[(((chunk * PARTS + part) * 2 + which - AT_ONCE) * maps.inputs + r) * POSITIONS + at] = sum;
    }
}
