// Pairwise self-attention on tensor cores: pairwise_simt.cu for bfloat16 values, with its names and formulas.
//
// Maps have channels last. A warp has 16 pixels and takes their footprints position by position, so that a, b and the
// gradients are matrices of 16 rows:
//     h = a · mixᵀ    l = b · to_weightᵀ + bias    of_b = of_l · to_weight    of_a = of_h · mix
//     of_to_weightᵀ = bᵀ · of_l    of_mix = of_hᵀ · a
// Factors are rounded to bfloat16, sums are float32. Every result lies in the lanes as the next product wants its left
// factor (mma.cuh): memory is read for maps and weights alone, and warps never wait for each other.
//
// Lane 4 g + q has pixels g and g + 8. Of a, it has four neighbouring channels of every sixteen, which a product over
// channels may take in any order; `channel_at` says which. Channels of value and of_y are sorted so that the SHARE
// channels of weights 2k and 2k+1 lie together: (WEIGHTS / 2, SHARE, 2).
//
// Where registers do not hold all sums, several warps have the same pixels and a slice of the weights or channels each.
//
// The steps that pairwise_mma.cu (the results) and pairwise_mma_gradients.cu are made of.
// Set when compiling: IN, HIDDEN, WEIGHTS, SHARE, WEIGHT_SLICES, MIX_SLICES, WARPS (a block's).
#pragma once
#include "footprint.cuh"
#include "mma.cuh"

constexpr int IN_TILES = (IN + 7) / 8, HIDDEN_TILES = HIDDEN / 8, WEIGHT_TILES = WEIGHTS / 8;
constexpr int IN_STEPS = (IN_TILES + 1) / 2, HIDDEN_STEPS = HIDDEN / 16, WEIGHT_STEPS = (WEIGHT_TILES + 1) / 2;
constexpr int INP = 8 * IN_TILES;  // channels of centre and around, filled up with zeros
constexpr int CHANNELS = SHARE * WEIGHTS, THREADS = 32 * WARPS;
// Blocks that a multiprocessor holds at least, so that while some warps wait for memory others compute.
constexpr int BLOCKS = HIDDEN > 32 ? 2 : HIDDEN > 16 ? 3 : 4;
constexpr int OWN_WEIGHTS = WEIGHT_TILES / WEIGHT_SLICES;         // weight tiles of a slice
constexpr int OWN_IN = (IN_TILES + MIX_SLICES - 1) / MIX_SLICES;  // channel tiles of a slice
static_assert(HIDDEN % 16 == 0 && WEIGHTS % 8 == 0 && SHARE % 4 == 0 && IN % 2 == 0 && WEIGHT_TILES % WEIGHT_SLICES == 0);

__device__ inline int lane_row() { return threadIdx.x / 4; }
__device__ inline int lane_column() { return threadIdx.x % 4; }

// The channel at position k of a product over channels: tiles 2s and 2s + 1 share the lanes' fours of 16 s … 16 s + 15.
__device__ inline int channel_at(int k) {
    int step = k / 16, half = k / 8 % 2, column = k % 8;
    if (2 * step + 1 == IN_TILES) return half ? IN : k;  // one tile is left
    return 16 * step + column / 2 * 4 + 2 * half + column % 2;
}

// The weights, in shared memory. Right factors by step over rows, tile of columns, lane.
struct Layers {
    const Fragment *mix, *to_weight;          // mixᵀ and to_weightᵀ
    const Fragment *of_to_weight, *of_mix;    // to_weight and mix
    const float *scale, *shift, *bias, *first, *second;
};

extern __shared__ unsigned char shared[];

// The right factor whose element (k, n) is at(k, n), of 16·steps rows and 8·tiles columns, into shared memory.
template <class At> __device__ const Fragment* fill(Fragment*& to, int steps, int tiles, At at) {
    Fragment* begin = to;
    to += steps * tiles * 32;
    for (int k = threadIdx.x + 32 * threadIdx.y; k < steps * tiles * 32; k += THREADS) {
        int row = k / 32 / tiles * 16 + k % 4 * 2, column = k / 32 % tiles * 8 + k % 32 / 4;
        begin[k] = {packed(at(row, column), at(row + 1, column)), packed(at(row + 8, column), at(row + 9, column))};
    }
    return begin;
}

// `count` numbers into shared memory, where there are any.
__device__ const float* copy(Fragment*& to, const float* vector, int count) {
    float* begin = reinterpret_cast<float*>(to);
    if (!vector) return nullptr;
    to += count / 2;
    for (int k = threadIdx.x + 32 * threadIdx.y; k < count; k += THREADS) begin[k] = vector[k];
    return begin;
}

// What a kernel has no use for is null: the gradients alone have `first`.
__device__ Layers load_layers(const float* mix, const float* to_weight, const float* scale, const float* shift,
                              const float* bias, const float* first, const float* second) {
    Fragment* at = reinterpret_cast<Fragment*>(shared);
    Layers layers = {};
    layers.mix = fill(at, IN_STEPS, HIDDEN_TILES, [=](int k, int n) {
        int channel = channel_at(k);
        return channel < IN ? mix[n * IN + channel] : 0.0f;
    });
    layers.scale = copy(at, scale, HIDDEN);
    layers.shift = copy(at, shift, HIDDEN);
    layers.bias = copy(at, bias, WEIGHTS);
    layers.first = copy(at, first, HIDDEN);
    layers.second = copy(at, second, HIDDEN);
    if (to_weight)
        layers.to_weight = fill(at, HIDDEN_STEPS, WEIGHT_TILES, [=](int k, int n) { return to_weight[n * HIDDEN + k]; });
    if (first) {
        layers.of_to_weight = fill(at, WEIGHT_STEPS, HIDDEN_TILES,
                                   [=](int k, int n) { return k < WEIGHTS ? to_weight[k * HIDDEN + n] : 0.0f; });
        layers.of_mix = fill(at, HIDDEN_STEPS, IN_TILES, [=](int k, int n) {
            int channel = channel_at(n);
            return channel < IN ? mix[k * IN + channel] : 0.0f;
        });
    }
    __syncthreads();
    return layers;
}

struct Maps : Footprint {  // as in kernels/pairwise.py
    int images;
};

// Which 16 pixels are this warp's; a block's warps have neighbouring ones, `slices` blocks the same.
__device__ inline long long warp_tile(int slices) {
    return static_cast<long long>(blockIdx.x / slices) * WARPS + threadIdx.y;
}

// A pixel of the map that a kernel runs over; indices count through all images.
struct Fixed {
    long long at, partner;  // itself; of the other map, the first pixel under its footprint or else of its image
    int y, x;
    bool there;
};

// This lane's two pixels; beyond the map's end its last, with there = false.
__device__ void lane_pixels(Fixed (&fixed)[2], const Maps& maps, int slices, bool is_centre) {
    long long count = is_centre ? maps.pixels() : maps.padded_pixels(), total = maps.images * count;
    int width = is_centre ? maps.width : maps.padded_width;
    for (int r = 0; r < 2; ++r) {
        long long index = warp_tile(slices) * 16 + lane_row() + 8 * r;
        fixed[r].there = index < total;
        fixed[r].at = index = fixed[r].there ? index : total - 1;
        int pixel = static_cast<int>(index % count);
        fixed[r].y = pixel / width;
        fixed[r].x = pixel % width;
        fixed[r].partner = index / count * (is_centre ? maps.padded_pixels() : maps.pixels());
        if (is_centre) fixed[r].partner += maps.under(pixel, 0, 0);
    }
}

struct Position {  // of a footprint; for (Position at = {}; at.u < kernel; at.next(kernel)) runs over all
    int u, v;
    __device__ void next(int kernel) {
        if (++v == kernel) {
            v = 0;
            ++u;
        }
    }
};

struct Pair {  // an output pixel, a padded pixel, and whether they meet at this position of the footprint
    long long out, padded;
    bool meet;
};

__device__ inline void pairs_at(Pair (&pair)[2], const Maps& maps, const Fixed (&fixed)[2], bool is_centre, Position at) {
    int down = at.u * maps.dilation, right = at.v * maps.dilation;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (is_centre) {
            pair[r] = {fixed[r].at, fixed[r].partner + (down * maps.padded_width + right), fixed[r].there};
        } else {
            int y = fixed[r].y - down, x = fixed[r].x - right;
            bool meet = fixed[r].there && y >= 0 && x >= 0;
            if (maps.stride > 1) {
                meet = meet && y % maps.stride == 0 && x % maps.stride == 0;
                y /= maps.stride;
                x /= maps.stride;
            }
            meet = meet && y < maps.height && x < maps.width;
            pair[r] = {fixed[r].partner + (meet ? y * maps.width + x : 0), fixed[r].at, meet};
        }
    }
}

// a of this lane's pixels, as left factors; 0 where the pixels do not meet.
__device__ void inputs_of(unsigned (&a)[IN_STEPS][4], const Pair (&pair)[2],
                          const float* __restrict__ centre, const float* __restrict__ around) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float* c = centre + pair[r].out * INP;
        const float* x = around + pair[r].padded * INP;
#pragma unroll
        for (int s = 0; s < IN_STEPS; ++s) {
            a[s][r + 2] = 0;
            if (2 * s + 1 < IN_TILES) {
                Four<float> p = four(c + 16 * s + 4 * lane_column()), n = four(x + 16 * s + 4 * lane_column());
                a[s][r] = packed_relu(p.at[0] + n.at[0], p.at[1] + n.at[1]);
                a[s][r + 2] = packed_relu(p.at[2] + n.at[2], p.at[3] + n.at[3]);
            } else {
                int at = 16 * s + 2 * lane_column();
                a[s][r] = packed_relu(c[at] + x[at], c[at + 1] + x[at + 1]);
            }
            if (!pair[r].meet) a[s][r] = a[s][r + 2] = 0;
        }
    }
}

__device__ void hidden_of(float (&h)[HIDDEN_TILES][4], const unsigned (&a)[IN_STEPS][4], const Layers& layers) {
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) h[t][e] = 0;
#pragma unroll
        for (int s = 0; s < IN_STEPS; ++s) multiply(h[t], a[s], layers.mix[(s * HIDDEN_TILES + t) * 32 + threadIdx.x]);
    }
}

// b, as left factors: tile t's words are at [t / 2][2 (t % 2)], for pixel g, and behind it, for g + 8.
__device__ void activations_of(unsigned (&b)[HIDDEN_STEPS][4], const float (&h)[HIDDEN_TILES][4], const Layers& layers) {
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t) {
        int m = 8 * t + 2 * lane_column();
        float scale[2] = {layers.scale[m], layers.scale[m + 1]}, shift[2] = {layers.shift[m], layers.shift[m + 1]};
#pragma unroll
        for (int r = 0; r < 2; ++r)
            b[t / 2][t % 2 * 2 + r] = packed_relu(scale[0] * h[t][2 * r] + shift[0], scale[1] * h[t][2 * r + 1] + shift[1]);
    }
}

// The logits of one tile of weights.
__device__ void logits_of(float (&l)[4], const unsigned (&b)[HIDDEN_STEPS][4], int t, const Layers& layers) {
#pragma unroll
    for (int e = 0; e < 4; ++e) l[e] = layers.bias[8 * t + 2 * lane_column() + e % 2];
#pragma unroll
    for (int s = 0; s < HIDDEN_STEPS; ++s) multiply(l, b[s], layers.to_weight[(s * WEIGHT_TILES + t) * 32 + threadIdx.x]);
}

// The channels of this lane's two weights in tile t, at a pixel of a map of sorted channels; a word has both weights'.
struct Channels { unsigned at[SHARE]; };
__device__ inline long long channels_at(long long pixel, int t) {
    return (pixel * (WEIGHTS / 2) + 4 * t + lane_column()) * SHARE;
}
__device__ inline Channels channels_of(const unsigned* __restrict__ map, long long pixel, int t) {
    Channels all;
#pragma unroll
    for (int s = 0; s < SHARE; s += 4) {
        Words four = *reinterpret_cast<const Words*>(map + channels_at(pixel, t) + s);
#pragma unroll
        for (int e = 0; e < 4; ++e) all.at[s + e] = four.at[e];
    }
    return all;
}

// Σ over the eight lanes that have the same columns.
template <class T> __device__ inline T sum_rows(T x) {
    for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
