// Subtraction and aggregation over footprints (Zhao, Jia, Koltun, CVPR 2020, section 3), on maps that are padded
// already. Every gradient is gathered, not scattered: nothing is added atomically, two runs give the same bits.
//
// One thread a pixel of one channel's map; neighbouring threads are neighbouring pixels.
// Set when compiling: VALUE, the type in memory.
#include "footprint.cuh"
#include "storage.cuh"

using REAL = Computed<VALUE>::type;

struct Maps : Footprint {
    int images, channels, weights;
};

__device__ inline long long thread_index() { return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; }

// y (images, channels, positions, pixels) = a at the footprint's centre - b under each position.
extern "C" __global__ void subtract(const VALUE* __restrict__ a, const VALUE* __restrict__ b, VALUE* __restrict__ y,
                                    Maps maps) {
    long long index = thread_index(), map = index / maps.pixels(), p = index % maps.pixels();
    if (map >= static_cast<long long>(maps.images) * maps.channels) return;
    int middle = (maps.kernel - 1) / 2;
    REAL centre = read(a[map * maps.padded_pixels() + maps.under(p, middle, middle)]);
    for (int j = 0; j < maps.positions(); ++j) {
        REAL near = read(b[map * maps.padded_pixels() + maps.under(p, j / maps.kernel, j % maps.kernel)]);
        write(y[(map * maps.positions() + j) * maps.pixels() + p], centre - near);
    }
}

extern "C" __global__ void subtract_gradient(const VALUE* __restrict__ of_y, VALUE* __restrict__ of_a,
                                             VALUE* __restrict__ of_b, Maps maps) {
    long long index = thread_index(), map = index / maps.padded_pixels(), q = index % maps.padded_pixels();
    if (map >= static_cast<long long>(maps.images) * maps.channels) return;
    int middle = (maps.kernel - 1) / 2;
    const VALUE* g = of_y + map * maps.positions() * maps.pixels();
    long long centre = maps.over(q, middle, middle);
    REAL sum_a = 0, sum_b = 0;
    for (int j = 0; j < maps.positions(); ++j) {
        long long p = maps.over(q, j / maps.kernel, j % maps.kernel);
        if (centre >= 0) sum_a += read(g[j * maps.pixels() + centre]);
        if (p >= 0) sum_b -= read(g[j * maps.pixels() + p]);
    }
    write(of_a[index], sum_a);
    write(of_b[index], sum_b);
}

// y (images, channels, pixels): channel c weighed by weight channel c mod weights. A thread does 8 such channels.
extern "C" __global__ void aggregate(const VALUE* __restrict__ value, const VALUE* __restrict__ weight,
                                     VALUE* __restrict__ y, Maps maps) {
    constexpr int AT_ONCE = 8;
    long long index = thread_index(), map = index / maps.pixels(), p = index % maps.pixels();
    if (map >= static_cast<long long>(maps.images) * maps.weights) return;
    long long image = map / maps.weights, w = map % maps.weights;
    const VALUE* weights = weight + map * maps.positions() * maps.pixels() + p;
    for (long long first = w; first < maps.channels; first += AT_ONCE * maps.weights) {
        REAL sum[AT_ONCE] = {};
        for (int j = 0; j < maps.positions(); ++j) {
            REAL x = read(weights[j * maps.pixels()]);
            long long q = maps.under(p, j / maps.kernel, j % maps.kernel);
#pragma unroll
            for (int s = 0; s < AT_ONCE; ++s) {
                long long c = first + s * maps.weights;
                if (c < maps.channels) sum[s] += x * read(value[(image * maps.channels + c) * maps.padded_pixels() + q]);
            }
        }
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) {
            long long c = first + s * maps.weights;
            if (c < maps.channels) write(y[(image * maps.channels + c) * maps.pixels() + p], sum[s]);
        }
    }
}

extern "C" __global__ void aggregate_gradient_value(const VALUE* __restrict__ of_y, const VALUE* __restrict__ weight,
                                                    VALUE* __restrict__ of_value, Maps maps) {
    long long index = thread_index(), map = index / maps.padded_pixels(), q = index % maps.padded_pixels();
    if (map >= static_cast<long long>(maps.images) * maps.channels) return;
    long long image = map / maps.channels, w = map % maps.channels % maps.weights;
    const VALUE* weights = weight + (image * maps.weights + w) * maps.positions() * maps.pixels();
    REAL sum = 0;
    for (int j = 0; j < maps.positions(); ++j) {
        long long p = maps.over(q, j / maps.kernel, j % maps.kernel);
        if (p >= 0) sum += read(weights[j * maps.pixels() + p]) * read(of_y[map * maps.pixels() + p]);
    }
    write(of_value[index], sum);
}

extern "C" __global__ void aggregate_gradient_weight(const VALUE* __restrict__ of_y, const VALUE* __restrict__ value,
                                                     VALUE* __restrict__ of_weight, Maps maps) {
    long long index = thread_index(), rest = index / maps.pixels(), p = index % maps.pixels();
    long long j = rest % maps.positions(), map = rest / maps.positions();
    if (map >= static_cast<long long>(maps.images) * maps.weights) return;
    long long image = map / maps.weights;
    long long q = maps.under(p, j / maps.kernel, j % maps.kernel);
    REAL sum = 0;
    for (long long c = map % maps.weights; c < maps.channels; c += maps.weights) {
        long long channel = image * maps.channels + c;
        sum += read(of_y[channel * maps.pixels() + p]) * read(value[channel * maps.padded_pixels() + q]);
    }
    write(of_weight[index], sum);
}
