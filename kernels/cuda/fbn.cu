// What a factorized bilinear layer does to its products (rows, outputs, factors) before and after the matrix product:
// one pass each, in the products' own type.
// Set when compiling: VALUE.
#include "storage.cuh"

using REAL = Computed<VALUE>::type;

struct Sizes {
    long long outputs;  // rows · outputs
    int factors;
};

// y[m, j] = Σ_k power[k] · product[m, j, k]². One thread an output: its neighbours' factors share the cache's lines.
extern "C" __global__ void square_sum(const VALUE* __restrict__ products, const REAL* __restrict__ power,
                                      REAL* __restrict__ y, Sizes sizes) {
    long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= sizes.outputs) return;
    REAL sum = 0;
    for (int k = 0; k < sizes.factors; ++k) {
        REAL x = read(products[index * sizes.factors + k]);
        sum += power[k] * x * x;
    }
    y[index] = sum;
}

// dL/dproduct[m, j, k] = 2 · power[k] · product[m, j, k] · dL/dy[m, j]. One thread a product.
extern "C" __global__ void square_sum_gradient(const REAL* __restrict__ of_y, const VALUE* __restrict__ products,
                                               const REAL* __restrict__ power, VALUE* __restrict__ of_products,
                                               Sizes sizes) {
    long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= sizes.outputs * sizes.factors) return;
    REAL slope = 2 * power[index % sizes.factors] * of_y[index / sizes.factors];
    write(of_products[index], slope * read(products[index]));
}
