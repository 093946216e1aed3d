// The gradients of pairwise self-attention on tensor cores.
#include "pairwise_mma.cuh"

struct Forward {  // what the forward pass was given and gave
    const float *centre, *around;
    const unsigned *value, *of_y;
    const float* softmax;  // (pixels, WEIGHTS / 2, 2, 2): log_sum of two weights, then Σ of_y · y over their channels
};

__device__ inline Four<float> softmax_at(const float* __restrict__ softmax, long long out, int t) {
    return four(softmax + (out * (WEIGHTS / 2) + 4 * t + lane_column()) * 4);
}

// Of 16 pairs w, dL/dl as left factors, and dL/d(scale · h + shift).
__device__ void gradient(float (&of_norm)[HIDDEN_TILES][4], unsigned (&of_l)[WEIGHT_STEPS][4], float (&w)[WEIGHT_TILES][4],
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
            for (int e = 0; e < 2; ++e) {
                w[t][2 * r + e] = pair[r].meet ? exponential(l[2 * r + e] - softmax.at[e]) : 0.0f;
                of[e] *= w[t][2 * r + e];
            }
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
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4], w[WEIGHT_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, w, b, pair, forward, layers);
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
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4], w[WEIGHT_TILES][4];
        pairs_at(pair, maps, fixed, true, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, w, b, pair, forward, layers);
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

struct Values {  // Σ w · dL/dy over the footprints that this lane's pixels lie under, for OWN_WEIGHTS tiles of weights
    float total[OWN_WEIGHTS][2][SHARE][2] = {};

    __device__ void add(int o, int r, const float* w, const Channels& of_y) {
#pragma unroll
        for (int s = 0; s < SHARE; ++s) {
            total[o][r][s][0] += w[0] * low(of_y.at[s]);
            total[o][r][s][1] += w[1] * high(of_y.at[s]);
        }
    }

    // The first of the tiles is `first`.
    __device__ void store(unsigned* of_value, const Fixed (&fixed)[2], int first) const {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int o = 0; o < OWN_WEIGHTS; ++o)
#pragma unroll
                for (int s = 0; s < SHARE; ++s)
                    if (fixed[r].there)
                        of_value[channels_at(fixed[r].at, first + o) + s] = packed(total[o][r][s][0], total[o][r][s][1]);
    }
};

// dL/daround (padded pixels, IN), and where one warp has all weights dL/dvalue (padded pixels, sorted channels).
extern "C" __global__ void __launch_bounds__(THREADS, HIDDEN > 16 ? 2 : 3)
gradient_around(const float* __restrict__ centre, const float* __restrict__ around, const unsigned* __restrict__ value,
                const float* __restrict__ mix, const float* __restrict__ scale, const float* __restrict__ shift,
                const float* __restrict__ to_weight, const float* __restrict__ bias, const float* __restrict__ softmax,
                const unsigned* __restrict__ of_y, const float* __restrict__ first, const float* __restrict__ second,
                float* __restrict__ of_around, unsigned* __restrict__ of_value, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, first, second);
    Forward forward = {centre, around, value, of_y, softmax};
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, 1, false);
    float total[IN_TILES][4] = {};
    Values values;
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4], of_l[WEIGHT_STEPS][4], of_h[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4], of_norm[HIDDEN_TILES][4], w[WEIGHT_TILES][4];
        pairs_at(pair, maps, fixed, false, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
        gradient(of_norm, of_l, w, b, pair, forward, layers);
        if constexpr (WEIGHT_SLICES == 1)
#pragma unroll
            for (int t = 0; t < WEIGHT_TILES; ++t)
#pragma unroll
                for (int r = 0; r < 2; ++r) values.add(t, r, w[t] + 2 * r, channels_of(of_y, pair[r].out, t));
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
    if constexpr (WEIGHT_SLICES == 1) values.store(of_value, fixed, 0);
}

// dL/dvalue alone, by slices of the weights.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_value(const float* __restrict__ centre, const float* __restrict__ around, const float* __restrict__ mix,
               const float* __restrict__ scale, const float* __restrict__ shift, const float* __restrict__ to_weight,
               const float* __restrict__ bias, const float* __restrict__ softmax, const unsigned* __restrict__ of_y,
               unsigned* __restrict__ of_value, Maps maps) {
    Layers layers = load_layers(mix, to_weight, scale, shift, bias, nullptr, nullptr);
    int first = blockIdx.x % WEIGHT_SLICES * OWN_WEIGHTS;
    Fixed fixed[2];
    Pair pair[2];
    lane_pixels(fixed, maps, WEIGHT_SLICES, false);
    Values values;
    for (Position at = {}; at.u < maps.kernel; at.next(maps.kernel)) {
        unsigned a[IN_STEPS][4], b[HIDDEN_STEPS][4];
        float h[HIDDEN_TILES][4];
        pairs_at(pair, maps, fixed, false, at);
        inputs_of(a, pair, centre, around);
        hidden_of(h, a, layers);
        activations_of(b, h, layers);
#pragma unroll
        for (int o = 0; o < OWN_WEIGHTS; ++o) {
            float l[4];
            logits_of(l, b, first + o, layers);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                Four<float> given = softmax_at(softmax, pair[r].out, first + o);
                float w[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) w[e] = pair[r].meet ? exponential(l[2 * r + e] - given.at[e]) : 0.0f;
                values.add(o, r, w, channels_of(of_y, pair[r].out, first + o));
            }
        }
    }
    values.store(of_value, fixed, first);
}
