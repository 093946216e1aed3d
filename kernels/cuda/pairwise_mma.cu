// Pairwise self-attention on tensor cores: pairwise.cu for bfloat16 values, whose names and formulas these are.
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
// Where registers do not hold all sums, SLICES of a warp's pixels' weights or channels go to several warps.
// Set when compiling: IN, HIDDEN, WEIGHTS, SHARE, WEIGHT_SLICES, MIX_SLICES, WARPS (a block's).
#include "footprint.cuh"
#include "mma.cuh"

constexpr int IN_TILES = (IN + 7) / 8, HIDDEN_TILES = HIDDEN / 8, WEIGHT_TILES = WEIGHTS / 8;
constexpr int IN_STEPS = (IN_TILES + 1) / 2, HIDDEN_STEPS = HIDDEN / 16, WEIGHT_STEPS = (WEIGHT_TILES + 1) / 2;
constexpr int INP = 8 * IN_TILES;  // channels of centre and around, filled up with zeros
constexpr int CHANNELS = SHARE * WEIGHTS, THREADS = 32 * WARPS;
// Blocks that a multiprocessor holds at least, so that while some warps wait for memory others compute.
constexpr int BLOCKS = HIDDEN > 32 ? 2 : HIDDEN > 16 ? 3 : 4;
constexpr int OWN_WEIGHTS = WEIGHT_TILES / WEIGHT_SLICES;                  // weight tiles of a slice
constexpr int OWN_IN = (IN_TILES + MIX_SLICES - 1) / MIX_SLICES;           // channel tiles of a slice
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

// Σ h and Σ h² of 16 pixels and their footprints: partial is (tiles, 2, HIDDEN) in double precision.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
hidden_moments(const float* __restrict__ centre, const float* __restrict__ around, const float* __restrict__ mix,
               double* __restrict__ partial, Maps maps) {
    Layers layers = load_layers(mix, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, 1, true);
    // Around the first value, so that squares lose nothing in single precision.
    float pivot[HIDDEN_TILES][2], sum[HIDDEN_TILES][2], square[HIDDEN_TILES][2];
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4];
        float h[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
#pragma unroll
        for (int t = 0; t < HIDDEN_TILES; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (at.u + at.v == 0) {
                    pivot[t][e] = h[t][e];
                    sum[t][e] = square[t][e] = 0;
                }
                float x = h[t][e] - pivot[t][e], y = fixed[1].there ? h[t][e + 2] - pivot[t][e] : 0.0f;
                sum[t][e] += x + y;
                square[t][e] += x * x + y * y;
            }
    }
    double count = (1 + fixed[1].there) * maps.positions();
    double* to = partial + warp_tile(1) * 2 * HIDDEN;
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            double p = pivot[t][e], s = sum[t][e];
            double first = sum_rows(fixed[0].there ? s + count * p : 0.0);
            double second = sum_rows(fixed[0].there ? square[t][e] + 2 * p * s + count * p * p : 0.0);
            if (lane_row() == 0) {
                to[8 * t + 2 * lane_column() + e] = first;
                to[HIDDEN + 8 * t + 2 * lane_column() + e] = second;
            }
        }
}

// y (pixels, CHANNELS) and the logarithm of the softmax's sum (pixels, WEIGHTS).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attend(const float* __restrict__ centre, const float* __restrict__ around, const unsigned* __restrict__ value,
       const float* __restrict__ mix, const float* __restrict__ scale, const float* __restrict__ shift,
       const float* __restrict__ to_weight, const float* __restrict__ bias, unsigned* __restrict__ y,
       float* __restrict__ log_sum, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, nullptr, nullptr);
    int slice = blockIdx.x % WEIGHT_SLICES;
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, WEIGHT_SLICES, true);
    float highest[OWN_WEIGHTS][4], sum[OWN_WEIGHTS][4], total[OWN_WEIGHTS][4][SHARE];
#pragma unroll
    for (int o = 0; o < OWN_WEIGHTS; ++o)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            highest[o][e] = -infinity();
            sum[o][e] = 0;
#pragma unroll
            for (int s = 0; s < SHARE; ++s) total[o][e][s] = 0;
        }
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
#pragma unroll
        for (int o = 0; o < OWN_WEIGHTS; ++o) {
            float l[4];
            logits_of(l, b, slice * OWN_WEIGHTS + o, layers);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                Channels v = channels_of(value, pair[r].padded, slice * OWN_WEIGHTS + o);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int k = 2 * r + e;
                    if (!(l[k] <= highest[o][k])) {  // seldom, after the first positions; also for a NaN
                        float keep = exponential(highest[o][k] - l[k]);
                        highest[o][k] = l[k];
                        sum[o][k] *= keep;
#pragma unroll
                        for (int s = 0; s < SHARE; ++s) total[o][k][s] *= keep;
                    }
                    float w = exponential(l[k] - highest[o][k]);
                    sum[o][k] += w;
#pragma unroll
                    for (int s = 0; s < SHARE; ++s) total[o][k][s] += w * (e ? high(v.at[s]) : low(v.at[s]));
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (!fixed[r].there) continue;
        long long out = fixed[r].at;
#pragma unroll
        for (int o = 0; o < OWN_WEIGHTS; ++o) {
            int weight = 8 * (slice * OWN_WEIGHTS + o) + 2 * lane_column();
#pragma unroll
            for (int e = 0; e < 2; ++e) log_sum[out * WEIGHTS + weight + e] = highest[o][2 * r + e] + log(sum[o][2 * r + e]);
#pragma unroll
            for (int s = 0; s < SHARE; ++s)
                y[(out * CHANNELS + s * WEIGHTS + weight) / 2] =
                    packed(total[o][2 * r][s] / sum[o][2 * r], total[o][2 * r + 1][s] / sum[o][2 * r + 1]);
        }
    }
}

struct Forward {  // what the forward pass was given and gave
    const float *centre, *around;
    const unsigned *value, *of_y;
    const float* softmax;  // (pixels, WEIGHTS / 2, 2, 2): log_sum of two weights, then Σ of_y · y over their channels
};

__device__ inline Four<float> softmax_at(const float* __restrict__ softmax, long long out, int t) {
    return four(softmax + (out * (WEIGHTS / 2) + 4 * t + lane_column()) * 4);
}

// dL/dl of 16 pairs as left factors, and dL/d(scale · h + shift).
__device__ void gradient(float (&of_norm)[HIDDEN_TILES][4], unsigned (&of_l)[WEIGHT_STEPS][4],
                         const unsigned (&b)[HIDDEN_STEPS][4], const Pair (&pair)[2],
                         const Forward& forward, const Layers& layers) {
    of_l[WEIGHT_STEPS - 1][2] = of_l[WEIGHT_STEPS - 1][3] = 0;
#pragma unroll
    for (int t = 0; t < WEIGHT_TILES; ++t) {
        float l[4];
        logits_of(l, b, t, layers);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Channels v = channels_of(forward.value, pair[r].padded, t);
            Channels g = channels_of(forward.of_y, pair[r].out, t);
            Four<float> softmax = softmax_at(forward.softmax, pair[r].out, t);
            float of[2] = {-softmax.at[2], -softmax.at[3]};
#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                of[0] += low(v.at[s]) * low(g.at[s]);
                of[1] += high(v.at[s]) * high(g.at[s]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) of[e] *= exponential(l[2 * r + e] - softmax.at[e]);
            of_l[t / 2][t % 2 * 2 + r] = pair[r].meet ? packed(of[0], of[1]) : 0;
        }
    }
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) of_norm[t][e] = 0;
#pragma unroll
        for (int s = 0; s < WEIGHT_STEPS; ++s)
            multiply(of_norm[t], of_l[s], layers.of_to_weight[(s * HIDDEN_TILES + t) * 32 + threadIdx.x]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            unsigned both = b[t / 2][t % 2 * 2 + e / 2];
            float x = e % 2 ? high(both) : low(both);
            if (x <= 0) of_norm[t][e] = 0;  // where x is NaN, so is this
        }
    }
}

// Sums over 16 pixels and their footprints, one row a tile:
// of_norm and of_norm · h (2, HIDDEN), dL/dbias (WEIGHTS), and dL/dto_weight the other way round (HIDDEN, WEIGHTS).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_sums(const float* __restrict__ centre, const float* __restrict__ around, const unsigned* __restrict__ value,
              const float* __restrict__ mix, const float* __restrict__ scale, const float* __restrict__ shift,
              const float* __restrict__ to_weight, const float* __restrict__ bias, const float* __restrict__ softmax,
              const unsigned* __restrict__ of_y, float* __restrict__ of_norm_sums, float* __restrict__ of_bias,
              float* __restrict__ of_to_weight, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, scale, shift);
    Forward forward = {centre, around, value, of_y, softmax};
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, 1, true);
    float norm_sums[HIDDEN_TILES][4] = {}, bias_sums[WEIGHT_TILES][2] = {}, weight_sums[HIDDEN_STEPS][WEIGHT_TILES][4] = {};
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4], of_l[WEIGHT_STEPS][4];
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, b, pair, forward, layers);
#pragma unroll
        for (int t = 0; t < HIDDEN_TILES; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                norm_sums[t][e] += of_norm[t][e] + of_norm[t][e + 2];
                norm_sums[t][e + 2] += of_norm[t][e] * h[t][e] + of_norm[t][e + 2] * h[t][e + 2];
            }
        unsigned turned[HIDDEN_STEPS][4];  // bᵀ: tiles of hidden channels below each other, pixels beside
#pragma unroll
        for (int s = 0; s < HIDDEN_STEPS; ++s)
#pragma unroll
            for (int k = 0; k < 4; ++k) turned[s][k] = transposed(b[s][k % 2 * 2 + k / 2]);
#pragma unroll
        for (int t = 0; t < WEIGHT_TILES; ++t) {
            const unsigned* words = of_l[t / 2] + t % 2 * 2;
            bias_sums[t][0] += low(words[0]) + low(words[1]);
            bias_sums[t][1] += high(words[0]) + high(words[1]);
            Fragment right = {transposed(words[0]), transposed(words[1])};
#pragma unroll
            for (int s = 0; s < HIDDEN_STEPS; ++s) multiply(weight_sums[s][t], turned[s], right);
        }
    }
    long long row = warp_tile(1);
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float sum = sum_rows(norm_sums[t][e]);
            if (lane_row() == 0) of_norm_sums[(row * 2 + e / 2) * HIDDEN + 8 * t + 2 * lane_column() + e % 2] = sum;
        }
#pragma unroll
    for (int t = 0; t < WEIGHT_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int weight = 8 * t + 2 * lane_column() + e;
            float sum = sum_rows(bias_sums[t][e]);
            if (lane_row() == 0) of_bias[row * WEIGHTS + weight] = sum;
#pragma unroll
            for (int s = 0; s < HIDDEN_STEPS; ++s)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    of_to_weight[(row * HIDDEN + 16 * s + lane_row() + 8 * r) * WEIGHTS + weight] = weight_sums[s][t][2 * r + e];
        }
}

// dL/dh of 16 pairs, as left factors. With the second norm's batch statistics it is scale · of_norm + first + second · h.
__device__ void gradient_of_hidden(unsigned (&of_h)[HIDDEN_STEPS][4], const float (&of_norm)[HIDDEN_TILES][4],
                                   const float (&h)[HIDDEN_TILES][4], const Pair (&pair)[2], const Layers& layers) {
#pragma unroll
    for (int t = 0; t < HIDDEN_TILES; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float of[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                int m = 8 * t + 2 * lane_column() + e;
                of[e] = pair[r].meet ? layers.scale[m] * of_norm[t][2 * r + e] + layers.first[m] + layers.second[m] * h[t][2 * r + e] : 0.0f;
            }
            of_h[t / 2][t % 2 * 2 + r] = packed(of[0], of[1]);
        }
}

// dL/da of tile c of the channels, for 16 pairs.
__device__ void gradient_of_inputs(float (&of_a)[4], const unsigned (&of_h)[HIDDEN_STEPS][4], const unsigned (&a)[4], int c,
                                   const Layers& layers) {
#pragma unroll
    for (int e = 0; e < 4; ++e) of_a[e] = 0;
#pragma unroll
    for (int s = 0; s < HIDDEN_STEPS; ++s) multiply(of_a, of_h[s], layers.of_mix[(s * IN_TILES + c) * 32 + threadIdx.x]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        unsigned both = a[c % 2 * 2 + e / 2];
        float x = e % 2 ? high(both) : low(both);
        if (x <= 0) of_a[e] = 0;
    }
}

// Tile c of this lane's pixels, into a map (pixels, IN).
__device__ inline void store_inputs(float* map, long long pixel, int c, float first, float second) {
    int channel = channel_at(8 * c + 2 * lane_column());
    if (channel >= IN) return;
    map[pixel * IN + channel] = first;
    map[pixel * IN + channel + 1] = second;
}

// dL/dcentre (pixels, IN), and dL/dmix as one (HIDDEN, IN) a tile.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_centre(const float* __restrict__ centre, const float* __restrict__ around, const unsigned* __restrict__ value,
                const float* __restrict__ mix, const float* __restrict__ scale, const float* __restrict__ shift,
                const float* __restrict__ to_weight, const float* __restrict__ bias, const float* __restrict__ softmax,
                const unsigned* __restrict__ of_y, const float* __restrict__ first, const float* __restrict__ second,
                float* __restrict__ of_centre, float* __restrict__ of_mix, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, first, second);
    Forward forward = {centre, around, value, of_y, softmax};
    int slice = blockIdx.x % MIX_SLICES;
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, MIX_SLICES, true);
    float total[OWN_IN][4] = {}, mix_sums[HIDDEN_STEPS][OWN_IN][4] = {};
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4], of_l[WEIGHT_STEPS][4], of_h[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, b, pair, forward, layers);
        gradient_of_hidden(of_h, of_norm, h, pair, layers);
        unsigned turned[HIDDEN_STEPS][4];
#pragma unroll
        for (int s = 0; s < HIDDEN_STEPS; ++s)
#pragma unroll
            for (int k = 0; k < 4; ++k) turned[s][k] = transposed(of_h[s][k % 2 * 2 + k / 2]);
#pragma unroll
        for (int c = 0; c < IN_TILES; ++c) {
            if (c / OWN_IN != slice) continue;
            float of_a[4];
            gradient_of_inputs(of_a, of_h, a[c / 2], c, layers);
#pragma unroll
            for (int e = 0; e < 4; ++e) total[c % OWN_IN][e] += of_a[e];
            Fragment right = {transposed(a[c / 2][c % 2 * 2]), transposed(a[c / 2][c % 2 * 2 + 1])};
#pragma unroll
            for (int s = 0; s < HIDDEN_STEPS; ++s) multiply(mix_sums[s][c % OWN_IN], turned[s], right);
        }
    }
    float* row = of_mix + warp_tile(MIX_SLICES) * HIDDEN * IN;
#pragma unroll
    for (int c = 0; c < IN_TILES; ++c) {
        if (c / OWN_IN != slice) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float* own = total[c % OWN_IN] + 2 * r;
            if (fixed[r].there) store_inputs(of_centre, fixed[r].at, c, own[0], own[1]);
#pragma unroll
            for (int s = 0; s < HIDDEN_STEPS; ++s) {
                const float* sums = mix_sums[s][c % OWN_IN] + 2 * r;
                store_inputs(row, 16 * s + lane_row() + 8 * r, c, sums[0], sums[1]);
            }
        }
    }
}

// dL/daround (padded pixels, IN).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_around(const float* __restrict__ centre, const float* __restrict__ around, const unsigned* __restrict__ value,
                const float* __restrict__ mix, const float* __restrict__ scale, const float* __restrict__ shift,
                const float* __restrict__ to_weight, const float* __restrict__ bias, const float* __restrict__ softmax,
                const unsigned* __restrict__ of_y, const float* __restrict__ first, const float* __restrict__ second,
                float* __restrict__ of_around, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, first, second);
    Forward forward = {centre, around, value, of_y, softmax};
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, 1, false);
    float total[IN_TILES][4] = {};
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4], of_l[WEIGHT_STEPS][4], of_h[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, false, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, b, pair, forward, layers);
        gradient_of_hidden(of_h, of_norm, h, pair, layers);
#pragma unroll
        for (int c = 0; c < IN_TILES; ++c) {
            float of_a[4];
            gradient_of_inputs(of_a, of_h, a[c / 2], c, layers);
#pragma unroll
            for (int e = 0; e < 4; ++e) total[c][e] += of_a[e];
        }
    }
#pragma unroll
    for (int c = 0; c < IN_TILES; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (fixed[r].there) store_inputs(of_around, fixed[r].at, c, total[c][2 * r], total[c][2 * r + 1]);
}

// dL/dvalue (padded pixels, sorted channels).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_value(const float* __restrict__ centre, const float* __restrict__ around, const float* __restrict__ mix,
               const float* __restrict__ scale, const float* __restrict__ shift, const float* __restrict__ to_weight,
               const float* __restrict__ bias, const float* __restrict__ softmax, const unsigned* __restrict__ of_y,
               unsigned* __restrict__ of_value, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, nullptr, nullptr);
    int slice = blockIdx.x % WEIGHT_SLICES;
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, WEIGHT_SLICES, false);
    float total[OWN_WEIGHTS][4][SHARE] = {};
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, false, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
#pragma unroll
        for (int o = 0; o < OWN_WEIGHTS; ++o) {
            int t = slice * OWN_WEIGHTS + o;
            float l[4];
            logits_of(l, b, t, layers);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                Channels g = channels_of(of_y, pair[r].out, t);
                Four<float> given = softmax_at(softmax, pair[r].out, t);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (!pair[r].meet) continue;
                    float w = exponential(l[2 * r + e] - given.at[e]);
#pragma unroll
                    for (int s = 0; s < SHARE; ++s) total[o][2 * r + e][s] += w * (e ? high(g.at[s]) : low(g.at[s]));
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (!fixed[r].there) continue;
#pragma unroll
        for (int o = 0; o < OWN_WEIGHTS; ++o)
#pragma unroll
            for (int s = 0; s < SHARE; ++s)
                of_value[channels_at(fixed[r].at, slice * OWN_WEIGHTS + o) + s] =
                    packed(total[o][2 * r][s], total[o][2 * r + 1][s]);
    }
}
