// Bilinear attentional transforms: Y = P · X · Q for the small matrices X that a map is cut into (Chi et al., CVPR 2020).
//
// With t = height / S_ROWS and u = width / S_COLUMNS, the pixels (j·t + r, l·u + v) of a channel's map are one X for every
// (r, v). A thread holds one X; P and Q belong to an image and a group of channels. Maps may lie channels first or last:
// neighbouring threads are neighbours in memory.
// Set when compiling: S_ROWS, S_COLUMNS, THREADS (a block), VALUE.
#include "storage.cuh"

using REAL = Computed<VALUE>::type;

struct Maps {
    long long of_image, of_channel, of_row, of_column;  // strides
    int images, channels, groups, height, width;
    int channels_last;
};

struct Item {  // an X: its first pixel, and the number of its P and Q
    long long at, matrices;
};

__device__ Item item_of(const Maps& maps, long long index) {
    int t = maps.height / S_ROWS, u = maps.width / S_COLUMNS, cells = t * u;
    int c, cell;
    if (maps.channels_last) {
        c = index % maps.channels;
        cell = index / maps.channels % cells;
    } else {
        cell = index % cells;
        c = index / cells % maps.channels;
    }
    long long image = index / (static_cast<long long>(maps.channels) * cells);
    return {image * maps.of_image + c * maps.of_channel + cell / u * maps.of_row + cell % u * maps.of_column,
            image * maps.groups + c / (maps.channels / maps.groups)};
}

__device__ inline long long step_of_row(const Maps& maps) { return maps.height / S_ROWS * maps.of_row; }
__device__ inline long long step_of_column(const Maps& maps) { return maps.width / S_COLUMNS * maps.of_column; }

// to = X · Q
__device__ void times_q(REAL (&to)[S_ROWS][S_COLUMNS], const VALUE* x, const REAL* q, const Maps& maps) {
#pragma unroll
    for (int j = 0; j < S_ROWS; ++j) {
#pragma unroll
        for (int c = 0; c < S_COLUMNS; ++c) to[j][c] = 0;
#pragma unroll
        for (int l = 0; l < S_COLUMNS; ++l) {
            REAL at = read(x[j * step_of_row(maps) + l * step_of_column(maps)]);
#pragma unroll
            for (int c = 0; c < S_COLUMNS; ++c) to[j][c] += at * q[l * S_COLUMNS + c];
        }
    }
}

extern "C" __global__ void transform(const VALUE* __restrict__ x, const REAL* __restrict__ p, const REAL* __restrict__ q,
                                     VALUE* __restrict__ y, Maps maps) {
    long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    long long cells = static_cast<long long>(maps.height / S_ROWS) * (maps.width / S_COLUMNS);
    if (index >= maps.images * cells * maps.channels) return;
    Item item = item_of(maps, index);
    REAL xq[S_ROWS][S_COLUMNS];
    times_q(xq, x + item.at, q + item.matrices * S_COLUMNS * S_COLUMNS, maps);
    p += item.matrices * S_ROWS * S_ROWS;
#pragma unroll
    for (int i = 0; i < S_ROWS; ++i) {
        REAL row[S_COLUMNS] = {};
#pragma unroll
        for (int j = 0; j < S_ROWS; ++j)
#pragma unroll
            for (int c = 0; c < S_COLUMNS; ++c) row[c] += p[i * S_ROWS + j] * xq[j][c];
#pragma unroll
        for (int c = 0; c < S_COLUMNS; ++c)
            write(y[item.at + i * step_of_row(maps) + c * step_of_column(maps)], row[c]);
    }
}

__shared__ REAL partial[(S_ROWS > S_COLUMNS ? S_ROWS * S_ROWS : S_COLUMNS * S_COLUMNS) * (THREADS + 1)];

// Σ over the block's threads of N numbers each, to to[0 … N−1].
template <int N> __device__ void sum_threads(const REAL* x, REAL* to) {
#pragma unroll
    for (int k = 0; k < N; ++k) partial[k * (THREADS + 1) + threadIdx.x] = x[k];
    __syncthreads();
    for (int k = threadIdx.x; k < N; k += THREADS) {
        REAL sum = 0;
        for (int thread = 0; thread < THREADS; ++thread) sum += partial[k * (THREADS + 1) + thread];
        to[k] = sum;
    }
}

// The items of this block's image and group, one after the other for each thread.
__device__ bool next_item(Item& item, const Maps& maps, int turn) {
    int cells = maps.height / S_ROWS * (maps.width / S_COLUMNS), channels = maps.channels / maps.groups;
    int image = blockIdx.x / maps.groups, group = blockIdx.x % maps.groups;
    int index = turn * THREADS + threadIdx.x;
    if (index >= cells * channels) return false;
    int c = maps.channels_last ? index % channels : index / cells;
    int cell = maps.channels_last ? index / channels : index % cells;
    long long global = static_cast<long long>(image) * cells * maps.channels +
                       (maps.channels_last ? static_cast<long long>(cell) * maps.channels + group * channels + c
                                           : static_cast<long long>(group * channels + c) * cells + cell);
    item = item_of(maps, global);
    return true;
}

// dL/dP = Σ dL/dY · (X · Q)ᵀ over the X of a block's image and group.
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_p(const VALUE* __restrict__ x, const REAL* __restrict__ q, const VALUE* __restrict__ of_y,
           REAL* __restrict__ of_p, Maps maps) {
    REAL sum[S_ROWS * S_ROWS] = {};
    Item item;
    for (int turn = 0; next_item(item, maps, turn); ++turn) {
        REAL xq[S_ROWS][S_COLUMNS];
        times_q(xq, x + item.at, q + item.matrices * S_COLUMNS * S_COLUMNS, maps);
#pragma unroll
        for (int i = 0; i < S_ROWS; ++i)
#pragma unroll
            for (int c = 0; c < S_COLUMNS; ++c) {
                REAL g = read(of_y[item.at + i * step_of_row(maps) + c * step_of_column(maps)]);
#pragma unroll
                for (int j = 0; j < S_ROWS; ++j) sum[i * S_ROWS + j] += g * xq[j][c];
            }
    }
    sum_threads<S_ROWS * S_ROWS>(sum, of_p + static_cast<long long>(blockIdx.x) * S_ROWS * S_ROWS);
}

// dL/dQ = Σ (P · X)ᵀ · dL/dY
extern "C" __global__ void __launch_bounds__(THREADS)
gradient_q(const VALUE* __restrict__ x, const REAL* __restrict__ p, const VALUE* __restrict__ of_y,
           REAL* __restrict__ of_q, Maps maps) {
    REAL sum[S_COLUMNS * S_COLUMNS] = {};
    Item item;
    for (int turn = 0; next_item(item, maps, turn); ++turn) {
        REAL px[S_ROWS][S_COLUMNS] = {};
        const REAL* own = p + item.matrices * S_ROWS * S_ROWS;
#pragma unroll
        for (int j = 0; j < S_ROWS; ++j)
#pragma unroll
            for (int l = 0; l < S_COLUMNS; ++l) {
                REAL at = read(x[item.at + j * step_of_row(maps) + l * step_of_column(maps)]);
#pragma unroll
                for (int i = 0; i < S_ROWS; ++i) px[i][l] += own[i * S_ROWS + j] * at;
            }
#pragma unroll
        for (int i = 0; i < S_ROWS; ++i)
#pragma unroll
            for (int c = 0; c < S_COLUMNS; ++c) {
                REAL g = read(of_y[item.at + i * step_of_row(maps) + c * step_of_column(maps)]);
#pragma unroll
                for (int l = 0; l < S_COLUMNS; ++l) sum[l * S_COLUMNS + c] += px[i][l] * g;
            }
    }
    sum_threads<S_COLUMNS * S_COLUMNS>(sum, of_q + static_cast<long long>(blockIdx.x) * S_COLUMNS * S_COLUMNS);
}
