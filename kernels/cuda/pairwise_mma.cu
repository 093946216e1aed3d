// The results of pairwise self-attention on tensor cores.
#include "pairwise_mma.cuh"

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
