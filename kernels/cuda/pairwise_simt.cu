// Pairwise self-attention without the tensor of all differences (Zhao, Jia, Koltun, CVPR 2020, section 3.1).
//
// For an output pixel i and the pixel q at a position of its footprint, with a padded map `around`:
//     a = relu(centre[i] + around[q])            IN values: the first batch norm is folded into both maps
//     h = mix · a                                HIDDEN values
//     b = relu(scale · h + shift)                the second batch norm
//     l = to_weight · b + bias                   WEIGHTS values, softmaxed over the footprint to w
//     y[c, i] = Σ_q w[c mod WEIGHTS] · value[c, q],   c < SHARE · WEIGHTS
// Nothing with both an i and a q is ever written to memory: every kernel computes a … l anew.
//
// A warp's 32 lanes are 32 pixels; the GROUPS warps that share these pixels have HIDDEN / GROUPS hidden values and
// WEIGHTS / GROUPS weights each, and hand each other a, b and gradients through shared memory, as tiles [row][lane].
// GRADIENT kernels run over output pixels ("centre") or over padded pixels ("around"), each of which every pair
// (i, q) belongs to exactly once: nothing is added atomically, and two runs give the same bits.
//
// Set when compiling: IN, HIDDEN, WEIGHTS, SHARE, GROUPS, TILES (pixel tiles a block), VALUE and REAL (types).
#include "footprint.cuh"
#include "storage.cuh"

constexpr int HID = HIDDEN / GROUPS, WGT = WEIGHTS / GROUPS, CHANNELS = SHARE * WEIGHTS;
constexpr int SLICE = ((IN + GROUPS - 1) / GROUPS + 3) / 4 * 4;  // rows of `a` a warp differentiates
constexpr int ROWS = SLICE * GROUPS;                             // IN, filled up with zeros
constexpr int PITCH = 36;  // of a tile's rows: reads of four lanes by 32 rows at once meet no bank twice
constexpr int THREADS = 32 * GROUPS * TILES;

struct Maps : Footprint {
    int images;
};

struct Pair {  // an output pixel, a padded pixel, and whether they meet at this position of the footprint
    long long image;
    int out, padded;
    bool meet;
};

// The pixel this lane stands for, of `count` pixels a map; the lanes beyond the last repeat it with meet = false.
__device__ Pair lane_pixel(const Maps& maps, int count, bool is_centre) {
    long long tile = static_cast<long long>(blockIdx.x) * TILES + threadIdx.z;
    long long index = tile * 32 + threadIdx.x, total = static_cast<long long>(maps.images) * count;
    bool there = index < total;
    if (!there) index = total - 1;
    int pixel = static_cast<int>(index % count);
    return {index / count, is_centre ? pixel : 0, is_centre ? 0 : pixel, there};
}

// The partner at footprint position (u, v).
__device__ Pair pair_at(const Maps& maps, Pair fixed, bool is_centre, int u, int v) {
    if (is_centre) {
        fixed.padded = maps.under(fixed.out, u, v);
        return fixed;
    }
    int out = maps.over(fixed.padded, u, v);
    fixed.out = out < 0 ? 0 : out;
    fixed.meet = fixed.meet && out >= 0;
    return fixed;
}

struct Tiles {  // what the warps of 32 pixels share, each [row][lane]
    REAL *a, *b, *of_logit, *of_hidden;
};

struct Layers {  // the weights, in shared memory: mix is [HIDDEN][ROWS], to_weight [WEIGHTS][HIDDEN]
    REAL *mix, *to_weight, *scale, *shift, *bias;
};

extern __shared__ unsigned char shared[];

__device__ Layers load_layers(const REAL* mix, const REAL* to_weight, const REAL* scale, const REAL* shift,
                              const REAL* bias) {
    REAL* at = reinterpret_cast<REAL*>(shared);
    Layers layers;
    layers.mix = at;
    layers.to_weight = layers.mix + HIDDEN * ROWS;
    layers.scale = layers.to_weight + (to_weight ? WEIGHTS * HIDDEN : 0);
    layers.shift = layers.scale + (to_weight ? HIDDEN : 0);
    layers.bias = layers.shift + (to_weight ? HIDDEN : 0);
    int thread = threadIdx.x + 32 * (threadIdx.y + GROUPS * threadIdx.z);
    for (int k = thread; k < HIDDEN * ROWS; k += THREADS)
        layers.mix[k] = k % ROWS < IN ? mix[k / ROWS * IN + k % ROWS] : REAL(0);
    if (!to_weight) return layers;
    for (int k = thread; k < WEIGHTS * HIDDEN; k += THREADS) layers.to_weight[k] = to_weight[k];
    for (int k = thread; k < HIDDEN; k += THREADS) {
        layers.scale[k] = scale[k];
        layers.shift[k] = shift[k];
    }
    for (int k = thread; k < WEIGHTS; k += THREADS) layers.bias[k] = bias[k];
    return layers;
}

// The tiles after `reals` numbers of shared memory (rounded up to four).
__device__ Tiles own_tiles(int reals) {
    REAL* at = reinterpret_cast<REAL*>(shared) + (reals + 3) / 4 * 4;
    at += threadIdx.z * PITCH * (ROWS + 2 * HIDDEN + WEIGHTS);
    return {at, at + PITCH * ROWS, at + PITCH * (ROWS + HIDDEN), at + PITCH * (ROWS + HIDDEN + WEIGHTS)};
}

// sum[k] += Σ_d matrix[k][d] · tile[d][lane], for N rows of `matrix` that begin at `matrix`.
template <int N, int DEPTH> __device__ void rows(REAL (&sum)[N], const REAL* matrix, const REAL* tile) {
    constexpr int STEP = DEPTH % 4 == 0 ? 4 : 1;
    for (int d = 0; d < DEPTH; d += STEP) {
        REAL x[STEP];
#pragma unroll
        for (int t = 0; t < STEP; ++t) x[t] = tile[(d + t) * PITCH + threadIdx.x];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if constexpr (STEP == 4) {
                Four<REAL> m = four(matrix + k * DEPTH + d);
#pragma unroll
                for (int t = 0; t < 4; ++t) sum[k] += m.at[t] * x[t];
            } else {
                sum[k] += matrix[k * DEPTH + d] * x[0];
            }
        }
    }
}

// sum[k] += Σ_d matrix[d][k] · tile[d][lane], for N columns that begin at `matrix`, whose rows are `width` long.
template <int N, int DEPTH> __device__ void columns(REAL (&sum)[N], const REAL* matrix, int width, const REAL* tile) {
    for (int d = 0; d < DEPTH; ++d) {
        REAL x = tile[d * PITCH + threadIdx.x];
#pragma unroll
        for (int k = 0; k < N; k += N % 4 == 0 ? 4 : 1) {
            if constexpr (N % 4 == 0) {
                Four<REAL> m = four(matrix + d * width + k);
#pragma unroll
                for (int t = 0; t < 4; ++t) sum[k + t] += m.at[t] * x;
            } else {
                sum[k] += matrix[d * width + k] * x;
            }
        }
    }
}

// sum[k][t] += Σ_lanes left[k][·] · right[lane + 32 t][·], for the N rows of `left` and all `count` rows of `right`.
template <int N, int COLUMNS> __device__ void outer(REAL (&sum)[N][COLUMNS], const REAL* left, const REAL* right, int count) {
    for (int s = 0; s < 32; s += 4) {
        Four<REAL> y[COLUMNS];
#pragma unroll
        for (int t = 0; t < COLUMNS; ++t) {
            int row = threadIdx.x + 32 * t;
            y[t] = four(right + (row < count ? row : 0) * PITCH + s);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            Four<REAL> x = four(left + k * PITCH + s);
#pragma unroll
            for (int t = 0; t < COLUMNS; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[k][t] += x.at[e] * y[t].at[e];
        }
    }
}

// Σ over the 32 lanes of each of N numbers, written by lane k to to[k]; `buffer` is this warp's, N rows of PITCH.
template <int N, class T> __device__ void sum_lanes(const T (&x)[N], T* buffer, T* to) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; ++k) buffer[k * 33 + threadIdx.x] = x[k];
    __syncthreads();
    for (int k = threadIdx.x; k < N; k += 32) {
        T sum = 0;
        for (int lane = 0; lane < 32; ++lane) sum += buffer[k * 33 + lane];
        to[k] = sum;
    }
}

// Which of the partial sums is this warp's: one row for every 32 pixels.
__device__ long long partial_row() { return static_cast<long long>(blockIdx.x) * TILES + threadIdx.z; }

// a for every warp of the pixels, then this warp's h.
__device__ void hidden_of(REAL (&h)[HID], const Maps& maps, const Pair& pair, const REAL* centre, const REAL* around,
                          const Layers& layers, const Tiles& tiles) {
    const REAL* c = centre + pair.image * IN * maps.pixels() + pair.out;
    const REAL* x = around + pair.image * IN * maps.padded_pixels() + pair.padded;
    for (int r = threadIdx.y; r < ROWS; r += GROUPS) {
        REAL sum = 0;
        if (r < IN && pair.meet) {
            sum = c[static_cast<long long>(r) * maps.pixels()] + x[static_cast<long long>(r) * maps.padded_pixels()];
            sum = sum < 0 ? REAL(0) : sum;  // keeps NaN
        }
        tiles.a[r * PITCH + threadIdx.x] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < HID; ++k) h[k] = 0;
    rows<HID, ROWS>(h, layers.mix + threadIdx.y * HID * ROWS, tiles.a);
}

// b for every warp of the pixels, then this warp's logits.
__device__ void logits_of(REAL (&l)[WGT], const REAL (&h)[HID], const Layers& layers, const Tiles& tiles) {
#pragma unroll
    for (int k = 0; k < HID; ++k) {
        int m = threadIdx.y * HID + k;
        REAL b = layers.scale[m] * h[k] + layers.shift[m];
        tiles.b[m * PITCH + threadIdx.x] = b < 0 ? REAL(0) : b;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < WGT; ++t) l[t] = layers.bias[threadIdx.y * WGT + t];
    rows<WGT, HIDDEN>(l, layers.to_weight + threadIdx.y * WGT * HIDDEN, tiles.b);
}

// Channel of `value` that is summand s of this warp's weight t.
__device__ inline long long channel(int s, int t) { return s * WEIGHTS + threadIdx.y * WGT + t; }

// Σ h and Σ h² of 32 pixels and their footprints: partial is (tiles, 2, HIDDEN) in double precision.
extern "C" __global__ void __launch_bounds__(THREADS)
hidden_moments(const REAL* __restrict__ centre, const REAL* __restrict__ around, const REAL* __restrict__ mix,
               double* __restrict__ partial, Maps maps) {
    Layers layers = load_layers(mix, nullptr, nullptr, nullptr, nullptr);
    Tiles tiles = own_tiles(HIDDEN * ROWS);
    Pair fixed = lane_pixel(maps, maps.pixels(), true);
    // Around the first value, so that squares lose nothing in single precision.
    REAL pivot[HID], sum[HID], square[HID];
    for (int j = 0; j < maps.kernel * maps.kernel; ++j) {
        REAL h[HID];
        hidden_of(h, maps, pair_at(maps, fixed, true, j / maps.kernel, j % maps.kernel), centre, around, layers, tiles);
#pragma unroll
        for (int k = 0; k < HID; ++k) {
            if (j == 0) {
                pivot[k] = h[k];
                sum[k] = square[k] = 0;
            }
            REAL x = h[k] - pivot[k];
            sum[k] += x;
            square[k] += x * x;
        }
        __syncthreads();
    }
    double total[2 * HID], count = maps.kernel * maps.kernel;
#pragma unroll
    for (int k = 0; k < HID; ++k) {
        double p = pivot[k], s = sum[k];
        total[k] = fixed.meet ? s + count * p : 0;
        total[HID + k] = fixed.meet ? square[k] + 2 * p * s + count * p * p : 0;
    }
    __syncthreads();
    double* buffer = reinterpret_cast<double*>(shared) + (threadIdx.z * GROUPS + threadIdx.y) * (2 * HID * 33 + 2 * HID);
    double* sums = buffer + 2 * HID * 33;
    sum_lanes(total, buffer, sums);
    __syncthreads();
    double* to = partial + partial_row() * 2 * HIDDEN + threadIdx.y * HID;
    for (int k = threadIdx.x; k < 2 * HID; k += 32) to[k / HID * HIDDEN + k % HID] = sums[k];
}

// y (images, CHANNELS, pixels) and the logarithm of the softmax's sum (images, WEIGHTS, pixels).
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const REAL* __restrict__ centre, const REAL* __restrict__ around, const VALUE* __restrict__ value,
       const REAL* __restrict__ mix, const REAL* __restrict__ scale, const REAL* __restrict__ shift,
       const REAL* __restrict__ to_weight, const REAL* __restrict__ bias, VALUE* __restrict__ y,
       REAL* __restrict__ log_sum, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias);
    Tiles tiles = own_tiles(HIDDEN * ROWS + WEIGHTS * HIDDEN + 2 * HIDDEN + WEIGHTS);
    Pair fixed = lane_pixel(maps, maps.pixels(), true);
    REAL highest[WGT], sum[WGT], total[WGT][SHARE];
    for (int j = 0; j < maps.kernel * maps.kernel; ++j) {
        Pair pair = pair_at(maps, fixed, true, j / maps.kernel, j % maps.kernel);
        REAL h[HID], l[WGT];
        hidden_of(h, maps, pair, centre, around, layers, tiles);
        logits_of(l, h, layers, tiles);
        const VALUE* v = value + pair.image * CHANNELS * maps.padded_pixels() + pair.padded;
#pragma unroll
        for (int t = 0; t < WGT; ++t) {
            REAL before = j == 0 ? l[t] : highest[t];
            highest[t] = l[t] > before ? l[t] : before;
            REAL keep = j == 0 ? REAL(0) : exp(before - highest[t]), w = exp(l[t] - highest[t]);
            sum[t] = j == 0 ? w : keep * sum[t] + w;
#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                REAL part = w * read(v[channel(s, t) * maps.padded_pixels()]);
                total[t][s] = j == 0 ? part : keep * total[t][s] + part;
            }
        }
        __syncthreads();
    }
    if (!fixed.meet) return;
#pragma unroll
    for (int t = 0; t < WGT; ++t) {
        log_sum[(fixed.image * WEIGHTS + threadIdx.y * WGT + t) * maps.pixels() + fixed.out] = highest[t] + log(sum[t]);
#pragma unroll
        for (int s = 0; s < SHARE; ++s)
            write(y[(fixed.image * CHANNELS + channel(s, t)) * maps.pixels() + fixed.out], total[t][s] / sum[t]);
    }
}

struct Forward {  // what the forward pass was given and gave; of_y · y is summed over the channels of a weight
    const REAL *centre, *around;
    const VALUE *value, *of_y;
    const REAL *log_sum, *of_y_times_y;
};

// This warp's dL/d(scale · h + shift), for one pair; on the way w, dL/dl (into tiles.of_logit), h and b (into tiles.b).
__device__ void gradient(REAL (&of_norm)[HID], REAL (&h)[HID], REAL (&w)[WGT], REAL (&of_l)[WGT], const Maps& maps,
                         const Pair& pair, const Forward& forward, const Layers& layers, const Tiles& tiles) {
    REAL l[WGT];
    hidden_of(h, maps, pair, forward.centre, forward.around, layers, tiles);
    logits_of(l, h, layers, tiles);
    const VALUE* v = forward.value + pair.image * CHANNELS * maps.padded_pixels() + pair.padded;
    const VALUE* g = forward.of_y + pair.image * CHANNELS * maps.pixels() + pair.out;
#pragma unroll
    for (int t = 0; t < WGT; ++t) {
        long long at = (pair.image * WEIGHTS + threadIdx.y * WGT + t) * maps.pixels() + pair.out;
        REAL of_w = 0;
#pragma unroll
        for (int s = 0; s < SHARE; ++s)
            of_w += read(v[channel(s, t) * maps.padded_pixels()]) * read(g[channel(s, t) * maps.pixels()]);
        w[t] = pair.meet ? exp(l[t] - forward.log_sum[at]) : REAL(0);
        of_l[t] = pair.meet ? w[t] * (of_w - forward.of_y_times_y[at]) : REAL(0);
        tiles.of_logit[(threadIdx.y * WGT + t) * PITCH + threadIdx.x] = of_l[t];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < HID; ++k) of_norm[k] = 0;
    columns<HID, WEIGHTS>(of_norm, layers.to_weight + threadIdx.y * HID, HIDDEN, tiles.of_logit);
#pragma unroll
    for (int k = 0; k < HID; ++k) {
        REAL b = tiles.b[(threadIdx.y * HID + k) * PITCH + threadIdx.x];
        of_norm[k] = b > 0 ? of_norm[k] : b == b ? REAL(0) : b;
    }
}

// Sums over 32 pixels and their footprints, one row a tile:
// of_norm and of_norm · h (2, HIDDEN), dL/dbias (WEIGHTS), dL/dto_weight (WEIGHTS, HIDDEN).
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_sums(const REAL* __restrict__ centre, const REAL* __restrict__ around, const VALUE* __restrict__ value,
              const REAL* __restrict__ mix, const REAL* __restrict__ scale, const REAL* __restrict__ shift,
              const REAL* __restrict__ to_weight, const REAL* __restrict__ bias, const REAL* __restrict__ log_sum,
              const VALUE* __restrict__ of_y, const REAL* __restrict__ of_y_times_y, REAL* __restrict__ of_norm_sums,
              REAL* __restrict__ of_bias, REAL* __restrict__ of_to_weight, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias);
    Tiles tiles = own_tiles(HIDDEN * ROWS + WEIGHTS * HIDDEN + 2 * HIDDEN + WEIGHTS);
    Forward forward = {centre, around, value, of_y, log_sum, of_y_times_y};
    Pair fixed = lane_pixel(maps, maps.pixels(), true);
    constexpr int COLUMNS = (HIDDEN + 31) / 32;
    REAL norm_sums[2 * HID] = {}, bias_sums[WGT] = {}, weight_sums[WGT][COLUMNS] = {};
    for (int j = 0; j < maps.kernel * maps.kernel; ++j) {
        REAL of_norm[HID], h[HID], w[WGT], of_l[WGT];
        Pair pair = pair_at(maps, fixed, true, j / maps.kernel, j % maps.kernel);
        gradient(of_norm, h, w, of_l, maps, pair, forward, layers, tiles);
#pragma unroll
        for (int k = 0; k < HID; ++k) {
            norm_sums[k] += of_norm[k];
            norm_sums[HID + k] += of_norm[k] * h[k];
        }
#pragma unroll
        for (int t = 0; t < WGT; ++t) bias_sums[t] += of_l[t];
        outer<WGT, COLUMNS>(weight_sums, tiles.of_logit + threadIdx.y * WGT * PITCH, tiles.b, HIDDEN);
        __syncthreads();
    }
    long long row = partial_row();
#pragma unroll
    for (int t = 0; t < WGT; ++t)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            int column = threadIdx.x + 32 * c;
            if (column < HIDDEN) of_to_weight[(row * WEIGHTS + threadIdx.y * WGT + t) * HIDDEN + column] = weight_sums[t][c];
        }
    // The tiles' memory is free now: 2 HID + WGT rows of 33 and as many sums a warp.
    __syncthreads();
    constexpr int NUMBERS = 2 * HID + WGT;
    REAL all[NUMBERS];
#pragma unroll
    for (int k = 0; k < NUMBERS; ++k) all[k] = k < 2 * HID ? norm_sums[k] : bias_sums[k - 2 * HID];
    REAL* buffer = reinterpret_cast<REAL*>(shared) + (threadIdx.z * GROUPS + threadIdx.y) * NUMBERS * 34;
    REAL* sums = buffer + NUMBERS * 33;
    sum_lanes(all, buffer, sums);
    __syncthreads();
    for (int k = threadIdx.x; k < NUMBERS; k += 32) {
        if (k < 2 * HID) of_norm_sums[(row * 2 + k / HID) * HIDDEN + threadIdx.y * HID + k % HID] = sums[k];
        else of_bias[row * WEIGHTS + threadIdx.y * WGT + k - 2 * HID] = sums[k];
    }
}

// dL/da of this warp's SLICE rows. With the second norm's batch statistics, dL/dh = scale · of_norm + first + second · h.
__device__ void gradient_of_inputs(REAL (&of_a)[SLICE], const REAL (&of_norm)[HID], const REAL (&h)[HID], bool meet,
                                   const REAL* first, const REAL* second, const Layers& layers, const Tiles& tiles) {
#pragma unroll
    for (int k = 0; k < HID; ++k) {
        int m = threadIdx.y * HID + k;
        REAL of_h = layers.scale[m] * of_norm[k] + first[m] + second[m] * h[k];
        tiles.of_hidden[m * PITCH + threadIdx.x] = meet ? of_h : REAL(0);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < SLICE; ++r) of_a[r] = 0;
    columns<SLICE, HIDDEN>(of_a, layers.mix + threadIdx.y * SLICE, ROWS, tiles.of_hidden);
#pragma unroll
    for (int r = 0; r < SLICE; ++r) {
        REAL a = tiles.a[(threadIdx.y * SLICE + r) * PITCH + threadIdx.x];
        of_a[r] = a > 0 ? of_a[r] : a == a ? REAL(0) : a;
    }
}

// dL/dcentre (images, IN, pixels), and dL/dmix as one (HIDDEN, IN) a tile.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_centre(const REAL* __restrict__ centre, const REAL* __restrict__ around, const VALUE* __restrict__ value,
                const REAL* __restrict__ mix, const REAL* __restrict__ scale, const REAL* __restrict__ shift,
                const REAL* __restrict__ to_weight, const REAL* __restrict__ bias, const REAL* __restrict__ log_sum,
                const VALUE* __restrict__ of_y, const REAL* __restrict__ of_y_times_y, const REAL* __restrict__ first,
                const REAL* __restrict__ second, REAL* __restrict__ of_centre, REAL* __restrict__ of_mix, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias);
    Tiles tiles = own_tiles(HIDDEN * ROWS + WEIGHTS * HIDDEN + 2 * HIDDEN + WEIGHTS);
    Forward forward = {centre, around, value, of_y, log_sum, of_y_times_y};
    Pair fixed = lane_pixel(maps, maps.pixels(), true);
    constexpr int COLUMNS = (IN + 31) / 32;
    REAL total[SLICE] = {}, mix_sums[HID][COLUMNS] = {};
    for (int j = 0; j < maps.kernel * maps.kernel; ++j) {
        REAL of_norm[HID], h[HID], w[WGT], of_l[WGT], of_a[SLICE];
        Pair pair = pair_at(maps, fixed, true, j / maps.kernel, j % maps.kernel);
        gradient(of_norm, h, w, of_l, maps, pair, forward, layers, tiles);
        gradient_of_inputs(of_a, of_norm, h, pair.meet, first, second, layers, tiles);
#pragma unroll
        for (int r = 0; r < SLICE; ++r) total[r] += of_a[r];
        outer<HID, COLUMNS>(mix_sums, tiles.of_hidden + threadIdx.y * HID * PITCH, tiles.a, IN);
        __syncthreads();
    }
    long long row = partial_row();
#pragma unroll
    for (int k = 0; k < HID; ++k)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            int column = threadIdx.x + 32 * c;
            if (column < IN) of_mix[(row * HIDDEN + threadIdx.y * HID + k) * IN + column] = mix_sums[k][c];
        }
    if (!fixed.meet) return;
#pragma unroll
    for (int r = 0; r < SLICE; ++r) {
        int in = threadIdx.y * SLICE + r;
        if (in < IN) of_centre[(fixed.image * IN + in) * maps.pixels() + fixed.out] = total[r];
    }
}

// dL/daround (images, IN, padded pixels) and dL/dvalue (images, CHANNELS, padded pixels).
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_around(const REAL* __restrict__ centre, const REAL* __restrict__ around, const VALUE* __restrict__ value,
                const REAL* __restrict__ mix, const REAL* __restrict__ scale, const REAL* __restrict__ shift,
                const REAL* __restrict__ to_weight, const REAL* __restrict__ bias, const REAL* __restrict__ log_sum,
                const VALUE* __restrict__ of_y, const REAL* __restrict__ of_y_times_y, const REAL* __restrict__ first,
                const REAL* __restrict__ second, REAL* __restrict__ of_around, VALUE* __restrict__ of_value, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias);
    Tiles tiles = own_tiles(HIDDEN * ROWS + WEIGHTS * HIDDEN + 2 * HIDDEN + WEIGHTS);
    Forward forward = {centre, around, value, of_y, log_sum, of_y_times_y};
    Pair fixed = lane_pixel(maps, maps.padded_pixels(), false);
    REAL total[SLICE] = {}, value_sums[WGT][SHARE] = {};
    for (int j = 0; j < maps.kernel * maps.kernel; ++j) {
        REAL of_norm[HID], h[HID], w[WGT], of_l[WGT], of_a[SLICE];
        Pair pair = pair_at(maps, fixed, false, j / maps.kernel, j % maps.kernel);
        gradient(of_norm, h, w, of_l, maps, pair, forward, layers, tiles);
        gradient_of_inputs(of_a, of_norm, h, pair.meet, first, second, layers, tiles);
#pragma unroll
        for (int r = 0; r < SLICE; ++r) total[r] += of_a[r];
        const VALUE* g = of_y + pair.image * CHANNELS * maps.pixels() + pair.out;
#pragma unroll
        for (int t = 0; t < WGT; ++t)
#pragma unroll
            for (int s = 0; s < SHARE; ++s)
                if (pair.meet) value_sums[t][s] += w[t] * read(g[channel(s, t) * maps.pixels()]);
        __syncthreads();
    }
    if (!fixed.meet) return;
#pragma unroll
    for (int r = 0; r < SLICE; ++r) {
        int in = threadIdx.y * SLICE + r;
        if (in < IN) of_around[(fixed.image * IN + in) * maps.padded_pixels() + fixed.padded] = total[r];
    }
#pragma unroll
    for (int t = 0; t < WGT; ++t)
#pragma unroll
        for (int s = 0; s < SHARE; ++s)
            write(of_value[(fixed.image * CHANNELS + channel(s, t)) * maps.padded_pixels() + fixed.padded], value_sums[t][s]);
}
