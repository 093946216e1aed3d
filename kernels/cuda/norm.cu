// Batch norm, ReLU and max pooling of channels-last maps (images, height, width, channels), pooled ones none in between.
//
// A thread does VECTOR neighbouring channels, read at once; `columns` threads lie side by side along the channels, the others
// of a block on other pixels. Sums are of a part of the pixels, which a second kernel adds up in a fixed order: nothing is
// added atomically.
// Set when compiling: VALUE, the type of the maps; VECTOR; WINDOW, the side of what is pooled, 1 for no pooling.
#include "storage.cuh"

using Real = Computed<VALUE>::type;

constexpr int THREADS = 256, PIXELS = WINDOW * WINDOW;
constexpr int UNROLL = WINDOW == 1 ? 2 : 1;  // enough loads under way, few enough registers
constexpr int LANES = 8;  // channels of a block that adds up parts

struct Maps {  // as in kernels/norm.py
    int images, height, width, channels, columns, at_once, parts;
    double eps, share;  // share: 1 / the pixels that the statistics are of; 0 if they are given

    __device__ long long pixels() const { return static_cast<long long>(images) * height * width; }
    __device__ int down() const { return (height + WINDOW - 1) / WINDOW; }
    __device__ int across() const { return (width + WINDOW - 1) / WINDOW; }
    __device__ long long windows() const { return static_cast<long long>(images) * down() * across(); }
};

struct alignas(sizeof(VALUE) * VECTOR) Vector { VALUE at[VECTOR]; };

// What a thread does: VECTOR channels of every `step`th of some items, which are pixels or windows.
struct Share {
    int channel, step;
    long long first, end, part;

    __device__ Share(const Maps& maps, long long items) {
        int groups = (maps.channels + maps.columns * VECTOR - 1) / (maps.columns * VECTOR);
        part = blockIdx.x / groups;
        channel = (static_cast<int>(blockIdx.x % groups) * maps.columns + threadIdx.x % maps.columns) * VECTOR;
        step = THREADS / maps.columns;
        first = part * maps.at_once + threadIdx.x / maps.columns;
        end = (part + 1) * maps.at_once;
        if (end > items) end = items;
        if (channel >= maps.channels) end = first;
    }
};

__device__ inline Vector at_pixel(const VALUE* map, const Maps& maps, const Share& own, long long pixel) {
    return *reinterpret_cast<const Vector*>(map + pixel * maps.channels + own.channel);
}

__device__ inline void write_at(VALUE* map, const Maps& maps, const Share& own, long long pixel, const Vector& value) {
    *reinterpret_cast<Vector*>(map + pixel * maps.channels + own.channel) = value;
}

// The norm as a scale and a shift.
struct Norm {
    Real scale[VECTOR], shift[VECTOR];

    __device__ Norm(const Maps& maps, const Share& own, const Real* mean, const Real* variance, const Real* gamma,
                    const Real* beta) {
        if (own.channel >= maps.channels) return;
        for (int i = 0; i < VECTOR; ++i) {
            int c = own.channel + i;
            scale[i] = gamma[c] / sqrt(variance[c] + static_cast<Real>(maps.eps));
            shift[i] = beta[c] - mean[c] * scale[i];
        }
    }
};

// The pixels of a window and that of the pooled map; -1 where there is none.
struct Window {
    long long pixel[PIXELS], pooled;

    __device__ Window(const Maps& maps, long long index) {
        if (WINDOW == 1) {
            pixel[0] = pooled = index;
            return;
        }
        int i = static_cast<int>(index / maps.across() % maps.down()), j = static_cast<int>(index % maps.across());
        long long image = index / maps.across() / maps.down();
        for (int k = 0; k < PIXELS; ++k) {
            int y = WINDOW * i + k / WINDOW, x = WINDOW * j + k % WINDOW;
            pixel[k] = y < maps.height && x < maps.width ? (image * maps.height + y) * maps.width + x : -1;
        }
        bool whole = i < maps.height / WINDOW && j < maps.width / WINDOW;
        pooled = whole ? (image * (maps.height / WINDOW) + i) * (maps.width / WINDOW) + j : -1;
    }

    __device__ void read_all(Vector* x, const VALUE* map, const Maps& maps, const Share& own) const {
        for (int k = 0; k < PIXELS; ++k)
            if (pixel[k] >= 0) x[k] = at_pixel(map, maps, own, pixel[k]);
    }
};

// The largest of a whole window's values once normed, the first of equal ones or a NaN.
struct Largest {
    int which = 0;
    Real value, normed;

    __device__ Largest(const Vector* x, int i, const Norm& norm) {
        for (int k = 0; k < PIXELS; ++k) {
            Real own = read(x[k].at[i]), result = norm.scale[i] * own + norm.shift[i];
            if (k == 0 || result > normed || result != result) which = k, value = own, normed = result;
        }
    }
};

__shared__ Real sums[2 * VECTOR * THREADS];

// Both sums over the block's pixels into (parts, 2, channels).
__device__ inline void store(const Real* first, const Real* second, Real* partial, const Maps& maps, const Share& own) {
    for (int i = 0; i < VECTOR; ++i) {
        sums[i * THREADS + threadIdx.x] = first[i];
        sums[(VECTOR + i) * THREADS + threadIdx.x] = second[i];
    }
    for (int half = THREADS / 2; half >= maps.columns; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            for (int k = 0; k < 2 * VECTOR; ++k) sums[k * THREADS + threadIdx.x] += sums[k * THREADS + threadIdx.x + half];
    }
    if (threadIdx.x >= maps.columns || own.channel >= maps.channels) return;
    for (int k = 0; k < 2 * VECTOR; ++k)
        partial[(2 * own.part + k / VECTOR) * maps.channels + own.channel + k % VECTOR] = sums[k * THREADS + threadIdx.x];
}

// Σ d and Σ d² with d = x − the channel's first value, so that squares lose nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
value_sums(const VALUE* __restrict__ x, Real* __restrict__ partial, Maps maps) {
    Share own(maps, maps.pixels());
    Real pivot[VECTOR], sum[VECTOR] = {}, square[VECTOR] = {};
    if (own.first < own.end) {
        Vector first = at_pixel(x, maps, own, 0);
        for (int i = 0; i < VECTOR; ++i) pivot[i] = read(first.at[i]);
    }
#pragma unroll 4
    for (long long pixel = own.first; pixel < own.end; pixel += own.step) {
        Vector value = at_pixel(x, maps, own, pixel);
        for (int i = 0; i < VECTOR; ++i) {
            Real d = read(value.at[i]) - pivot[i];
            sum[i] += d;
            square[i] += d * d;
        }
    }
    store(sum, square, partial, maps, own);
}

// Σ g and Σ g · (x − mean) with g the gradient of the normed value.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_sums(const VALUE* __restrict__ of_y, const VALUE* __restrict__ x, const Real* __restrict__ mean,
              const Real* __restrict__ variance, const Real* __restrict__ gamma, const Real* __restrict__ beta,
              Real* __restrict__ partial, Maps maps) {
    Share own(maps, maps.windows());
    Norm norm(maps, own, mean, variance, gamma, beta);
    Real middle[VECTOR], sum[VECTOR] = {}, times_x[VECTOR] = {};
    if (own.first < own.end)
        for (int i = 0; i < VECTOR; ++i) middle[i] = mean[own.channel + i];
#pragma unroll UNROLL
    for (long long index = own.first; index < own.end; index += own.step) {
        Window window(maps, index);
        if (window.pooled < 0) continue;
        Vector value[PIXELS], gradient = at_pixel(of_y, maps, own, window.pooled);
        window.read_all(value, x, maps, own);
        for (int i = 0; i < VECTOR; ++i) {
            Largest chosen(value, i, norm);
            Real g = chosen.normed <= 0 ? 0 : read(gradient.at[i]);
            sum[i] += g;
            times_x[i] += g * (chosen.value - middle[i]);
        }
    }
    store(sum, times_x, partial, maps, own);
}

__shared__ double totals[2 * THREADS];

// A channel's sums over all parts, for the threads of the block's first LANES.
__device__ inline int added_up(const Real* partial, const Maps& maps, double& first, double& second) {
    int channel = blockIdx.x * LANES + threadIdx.x % LANES;
    first = second = 0;
    if (channel < maps.channels)
        for (int part = threadIdx.x / LANES; part < maps.parts; part += THREADS / LANES) {
            first += partial[2LL * part * maps.channels + channel];
            second += partial[(2LL * part + 1) * maps.channels + channel];
        }
    totals[threadIdx.x] = first;
    totals[THREADS + threadIdx.x] = second;
    for (int half = THREADS / 2; half >= LANES; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            totals[threadIdx.x] += totals[threadIdx.x + half];
            totals[THREADS + threadIdx.x] += totals[THREADS + threadIdx.x + half];
        }
    }
    first = totals[threadIdx.x];
    second = totals[THREADS + threadIdx.x];
    return threadIdx.x < LANES && channel < maps.channels ? channel : -1;
}

extern "C" __global__ void __launch_bounds__(THREADS)
statistics(const VALUE* __restrict__ x, const Real* __restrict__ partial, Real* __restrict__ mean,
           Real* __restrict__ variance, Maps maps) {
    double sum, square;
    int channel = added_up(partial, maps, sum, square);
    if (channel < 0) return;
    sum *= maps.share;
    mean[channel] = static_cast<Real>(read(x[channel]) + sum);
    double spread = square * maps.share - sum * sum;
    variance[channel] = static_cast<Real>(spread < 0 ? 0 : spread);
}

extern "C" __global__ void __launch_bounds__(THREADS)
gradient_totals(const Real* __restrict__ partial, const Real* __restrict__ variance, Real* __restrict__ of_gamma,
                Real* __restrict__ of_beta, Maps maps) {
    double sum, times_x;
    int channel = added_up(partial, maps, sum, times_x);
    if (channel < 0) return;
    of_beta[channel] = static_cast<Real>(sum);
    of_gamma[channel] = static_cast<Real>(times_x / sqrt(variance[channel] + maps.eps));
}

extern "C" __global__ void __launch_bounds__(THREADS)
norm_relu(const VALUE* __restrict__ x, const Real* __restrict__ mean, const Real* __restrict__ variance,
          const Real* __restrict__ gamma, const Real* __restrict__ beta, VALUE* __restrict__ y, Maps maps) {
    Share own(maps, maps.windows());
    Norm norm(maps, own, mean, variance, gamma, beta);
#pragma unroll UNROLL
    for (long long index = own.first; index < own.end; index += own.step) {
        Window window(maps, index);
        if (window.pooled < 0) continue;
        Vector value[PIXELS], result;
        window.read_all(value, x, maps, own);
        for (int i = 0; i < VECTOR; ++i) {
            Real normed = Largest(value, i, norm).normed;
            write(result.at[i], normed <= 0 ? 0 : normed);
        }
        write_at(y, maps, own, window.pooled, result);
    }
}

// scale · (g − share · (Σ g + x̂ · Σ g·x̂)), of every pixel, also of those that no whole window has.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient(const VALUE* __restrict__ of_y, const VALUE* __restrict__ x, const Real* __restrict__ mean,
         const Real* __restrict__ variance, const Real* __restrict__ gamma, const Real* __restrict__ beta,
         const Real* __restrict__ of_gamma, const Real* __restrict__ of_beta, VALUE* __restrict__ of_x, Maps maps) {
    Share own(maps, maps.windows());
    Norm norm(maps, own, mean, variance, gamma, beta);
    Real middle[VECTOR], constant[VECTOR], slope[VECTOR];
    if (own.first < own.end)
        for (int i = 0; i < VECTOR; ++i) {
            int c = own.channel + i;
            Real share = static_cast<Real>(maps.share), deviation = sqrt(variance[c] + static_cast<Real>(maps.eps));
            middle[i] = mean[c];
            constant[i] = -norm.scale[i] * share * of_beta[c];
            slope[i] = -norm.scale[i] * share * of_gamma[c] / deviation;
        }
#pragma unroll UNROLL
    for (long long index = own.first; index < own.end; index += own.step) {
        Window window(maps, index);
        Vector value[PIXELS], result[PIXELS], of_pooled = {};
        window.read_all(value, x, maps, own);
        if (window.pooled >= 0) of_pooled = at_pixel(of_y, maps, own, window.pooled);
        for (int i = 0; i < VECTOR; ++i) {
            Largest chosen(value, i, norm);  // without a pooled pixel the gradient is 0, whichever it is
            Real g = chosen.normed <= 0 ? 0 : norm.scale[i] * read(of_pooled.at[i]);
            for (int k = 0; k < PIXELS; ++k) {
                Real through_statistics = constant[i] + slope[i] * (read(value[k].at[i]) - middle[i]);
                write(result[k].at[i], through_statistics + (k == chosen.which ? g : 0));
            }
        }
        for (int k = 0; k < PIXELS; ++k)
            if (window.pixel[k] >= 0) write_at(of_x, maps, own, window.pixel[k], result[k]);
    }
}
