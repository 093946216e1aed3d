// Enough of CUDA to run a kernel of kernels/cuda on the CPU, one block after the other: a thread is a fiber that runs
// until __syncthreads. Shared memory begins as NaN, so that what was never written is seen; and threads can take turns
// backwards, so that a result that depends on their order, for want of a barrier, is seen too.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define PAIRWISE_ON_CPU
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
using std::exp;
using std::log;

struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t SHARED_LIMIT = 227 << 10;
alignas(16) unsigned char shared[SHARED_LIMIT + 64];

inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    bool done;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static size_t running;
static bool backwards;
static void (*body)(void**);
static void** arguments;

inline void __syncthreads() {
    size_t own = running;
    swapcontext(&fibers[own].context, &scheduler);
}

// All threads of a block must call it: each leaves its number, then takes that of the lane whose index differs by `lanes`.
static std::vector<double> exchanged(1024);
template <class T> T __shfl_xor_sync(unsigned, T x, int lanes) {
    size_t own = running;
    exchanged[own] = x;
    __syncthreads();
    T other = exchanged[own ^ lanes];
    __syncthreads();
    return other;
}

// The warp's products of matrices, by the layouts in kernels/cuda/mma.cuh. All threads of a block must call them.
static std::vector<unsigned> words(1024 * 4);
static const unsigned* words_of_warp(const unsigned* own, int count) {
    memcpy(&words[running * 4], own, 4 * count);
    __syncthreads();
    return &words[running / 32 * 32 * 4];
}
static float half_of(unsigned word, int which) { return __uint_as_float(which ? word & 0xffff0000u : word << 16); }

template <class Fragment> void multiply(float (&sum)[4], const unsigned (&left)[4], Fragment right) {
    int lane = running % 32;
    float a[16][16], b[16][8];
    const unsigned* of_warp = words_of_warp(left, 4);
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < 8; ++k) a[l / 4 + 8 * (k / 2 % 2)][l % 4 * 2 + k % 2 + 8 * (k / 4)] = half_of(of_warp[4 * l + k / 2], k % 2);
    __syncthreads();
    unsigned own[2] = {right.first, right.last};
    of_warp = words_of_warp(own, 2);
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < 4; ++k) b[l % 4 * 2 + k % 2 + 8 * (k / 2)][l / 4] = half_of(of_warp[4 * l + k / 2], k % 2);
    __syncthreads();
    for (int k = 0; k < 16; ++k)
        for (int e = 0; e < 4; ++e) sum[e] += a[lane / 4 + 8 * (e / 2)][k] * b[k][lane % 4 * 2 + e % 2];
}

static unsigned transposed(unsigned matrix) {
    int lane = running % 32, row = lane / 4, column = lane % 4 * 2;
    const unsigned* of_warp = words_of_warp(&matrix, 1);
    unsigned mirrored = 0;
    for (int e = 0; e < 2; ++e)  // element (row, column + e) is (column + e, row) of the matrix
        mirrored |= (of_warp[4 * ((column + e) * 4 + row / 2)] >> 16 * (row % 2) & 0xffffu) << 16 * e;
    __syncthreads();
    return mirrored;
}

static unsigned rounded(float x) {
    unsigned bits = __float_as_uint(x);
    return x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}
static unsigned packed(float low, float high) { return rounded(low) | rounded(high) << 16; }
static unsigned packed_relu(float low, float high) { return packed(low < 0 ? 0 : low, high < 0 ? 0 : high); }

static void run_thread() {
    body(arguments);
    fibers[running].done = true;
    swapcontext(&fibers[running].context, &scheduler);
}

// Runs `kernel` over the grid. Exits with 3 when threads disagree on how often they meet, with 4 when shared memory
// beyond `shared_bytes` was written.
static void launch_on_cpu(void (*kernel)(void**), dim3 grid, dim3 block, size_t shared_bytes, void** args) {
    size_t threads = size_t(block.x) * block.y * block.z;
    body = kernel; arguments = args; gridDim = grid; blockDim = block;
    if (fibers.size() < threads) fibers.resize(threads);
    for (auto& fiber : fibers) fiber.stack.resize(256 << 10);
    for (unsigned z = 0; z < grid.z; ++z) for (unsigned y = 0; y < grid.y; ++y) for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx.x = x; blockIdx.y = y; blockIdx.z = z;
        memset(shared, 0xff, sizeof shared);
        for (size_t t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[t];
            fiber.index.x = t % block.x; fiber.index.y = t / block.x % block.y; fiber.index.z = t / block.x / block.y;
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_thread, 0);
        }
        for (size_t done = 0; done < threads;) {
            size_t met = 0;
            done = 0;
            for (size_t turn = 0; turn < threads; ++turn) {
                running = backwards ? threads - 1 - turn : turn;
                if (!fibers[running].done) {
                    threadIdx = fibers[running].index;
                    swapcontext(&scheduler, &fibers[running].context);
                    if (!fibers[running].done) ++met;
                }
                if (fibers[running].done) ++done;
            }
            if (met && done) { fprintf(stderr, "%zu threads wait, %zu have ended\n", met, done); exit(3); }
        }
        for (size_t at = shared_bytes; at < sizeof shared; ++at)
            if (shared[at] != 0xff) { fprintf(stderr, "shared memory written at %zu of %zu\n", at, shared_bytes); exit(4); }
    }
}
