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
