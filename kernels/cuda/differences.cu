// Moments of the differences between a pixel and those under its footprint, per channel, without holding any of them.
//
// Maps are (images, channels, height, width), `around` padded already. Nothing is added atomically.
// Set when compiling: REAL, the type of the maps.
#include "footprint.cuh"

constexpr int THREADS = 128;

struct Maps : Footprint {  // as in kernels/differences.py
    int channels, pixels_at_once;
};

__shared__ double sums[2 * THREADS];

// Σ d and Σ d² over a part of one map's pixels, with d = centre − around − pivot of the channel: (maps, parts, 2).
extern "C" __global__ void __launch_bounds__(THREADS)
difference_sums(const REAL* __restrict__ centre, const REAL* __restrict__ around, const REAL* __restrict__ pivot,
                double* __restrict__ partial, Maps maps) {
    long long pixels = maps.pixels(), parts = (pixels + maps.pixels_at_once - 1) / maps.pixels_at_once;
    long long map = blockIdx.x / parts, begin = blockIdx.x % parts * maps.pixels_at_once, end = begin + maps.pixels_at_once;
    const REAL* c = centre + map * pixels;
    const REAL* x = around + map * maps.padded_pixels();
    REAL of_channel = pivot[map % maps.channels];
    double sum = 0, square = 0;
    for (long long p = begin + threadIdx.x; p < (end < pixels ? end : pixels); p += THREADS) {
        REAL own = c[p] - of_channel, first = 0, second = 0;
        for (int u = 0; u < maps.kernel; ++u)
            for (int v = 0; v < maps.kernel; ++v) {
                REAL d = own - x[maps.under(static_cast<int>(p), u, v)];
                first += d;
                second += d * d;
            }
        sum += first;
        square += second;
    }
    sums[threadIdx.x] = sum;
    sums[THREADS + threadIdx.x] = square;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            sums[THREADS + threadIdx.x] += sums[THREADS + threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        partial[2 * blockIdx.x] = sums[0];
        partial[2 * blockIdx.x + 1] = sums[THREADS];
    }
}

// dL/dcentre: the sum over the footprint of constant + slope · (centre − around − mean), each of the channel.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_centre(const REAL* __restrict__ centre, const REAL* __restrict__ around, const REAL* __restrict__ mean,
                const REAL* __restrict__ constant, const REAL* __restrict__ slope, REAL* __restrict__ of_centre, Maps maps,
                int images) {
    long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x, pixels = maps.pixels();
    if (index >= images * maps.channels * pixels) return;
    long long map = index / pixels;
    int p = static_cast<int>(index % pixels), channel = static_cast<int>(map % maps.channels);
    const REAL* x = around + map * maps.padded_pixels();
    REAL own = centre[index] - mean[channel], sum = 0;
    for (int u = 0; u < maps.kernel; ++u)
        for (int v = 0; v < maps.kernel; ++v) sum += own - x[maps.under(p, u, v)];
    of_centre[index] = maps.positions() * constant[channel] + slope[channel] * sum;
}

// dL/daround: minus the same, over the output pixels whose footprints the pixel lies under.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_around(const REAL* __restrict__ centre, const REAL* __restrict__ around, const REAL* __restrict__ mean,
                const REAL* __restrict__ constant, const REAL* __restrict__ slope, REAL* __restrict__ of_around, Maps maps,
                int images) {
    long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x, pixels = maps.padded_pixels();
    if (index >= images * maps.channels * pixels) return;
    long long map = index / pixels;
    int q = static_cast<int>(index % pixels), channel = static_cast<int>(map % maps.channels), count = 0;
    const REAL* c = centre + map * maps.pixels();
    REAL own = around[index] + mean[channel], sum = 0;
    for (int u = 0; u < maps.kernel; ++u)
        for (int v = 0; v < maps.kernel; ++v) {
            int p = maps.over(q, u, v);
            if (p < 0) continue;
            sum += c[p] - own;
            ++count;
        }
    of_around[index] = -(count * constant[channel] + slope[channel] * sum);
}
