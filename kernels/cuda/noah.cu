// NOAH's weighted sum: y = Σ_l softmax_l(query)[l] · value[l] for every row of two (rows, length) matrices, each read once.
//
// A warp does a row; its lanes keep a maximum and sums of their own, which are joined at the end.
// Set when compiling: VALUE.
#include "storage.cuh"

using REAL = Computed<VALUE>::type;
constexpr int WARPS = 8;

__device__ inline REAL joined_max(REAL x) {
    for (int lanes = 16; lanes; lanes /= 2) {
        REAL other = __shfl_xor_sync(0xffffffffu, x, lanes);
        x = other > x || other != other ? other : x;  // keeps NaN
    }
    return x;
}

__device__ inline REAL joined_sum(REAL x) {
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

struct Sizes {
    long long rows;
    int length;
};

// y, and log Σ_l exp(query[l]).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
weighted_sum(const VALUE* __restrict__ query, const VALUE* __restrict__ value, REAL* __restrict__ y,
             REAL* __restrict__ log_sum, Sizes sizes) {
    long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.y;
    bool there = row < sizes.rows;
    if (!there) row = sizes.rows - 1;
    query += row * sizes.length;
    value += row * sizes.length;
    REAL highest = -infinity(), sum = 0, total = 0;
    for (int l = threadIdx.x; l < sizes.length; l += 32) {
        REAL x = read(query[l]), before = highest;
        highest = x > before || x != x ? x : before;
        REAL keep = before == highest ? REAL(1) : exp(before - highest), weight = exp(x - highest);
        sum = keep * sum + weight;
        total = keep * total + weight * read(value[l]);
    }
    REAL all = joined_max(highest);
    REAL keep = highest == -infinity() ? REAL(0) : exp(highest - all);  // lanes beyond a short row have nothing
    sum = joined_sum(keep * sum);
    total = joined_sum(keep * total);
    if (there && threadIdx.x == 0) {
        y[row] = total / sum;
        log_sum[row] = all + log(sum);
    }
}

// dL/dvalue[l] = w[l] · dL/dy and dL/dquery[l] = w[l] · (value[l] − y) · dL/dy. One thread a number.
extern "C" __global__ void weighted_sum_gradient(const VALUE* __restrict__ query, const VALUE* __restrict__ value,
                                                 const REAL* __restrict__ y, const REAL* __restrict__ log_sum,
                                                 const REAL* __restrict__ of_y, VALUE* __restrict__ of_query,
                                                 VALUE* __restrict__ of_value, Sizes sizes) {
    long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= sizes.rows * sizes.length) return;
    long long row = index / sizes.length;
    REAL weighted = exp(read(query[index]) - log_sum[row]) * of_y[row];
    write(of_value[index], weighted);
    write(of_query[index], weighted * (read(value[index]) - y[row]));
}
