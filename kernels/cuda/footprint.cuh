// Which pixels of a map, padded already, lie under the footprints of which output pixels. As in kernels/footprint.py.
#pragma once

struct Footprint {
    int height, width, padded_height, padded_width, kernel, stride, dilation;
    // Of one map; offsets that span several are long long.
    __device__ long long pixels() const { return static_cast<long long>(height) * width; }
    __device__ long long padded_pixels() const { return static_cast<long long>(padded_height) * padded_width; }
    __device__ int positions() const { return kernel * kernel; }
    // The padded pixel under position (u, v) of output pixel p.
    __device__ int under(int p, int u, int v) const {
        return (p / width * stride + u * dilation) * padded_width + p % width * stride + v * dilation;
    }
    // The output pixel that has padded pixel q under position (u, v), or -1.
    __device__ int over(int q, int u, int v) const {
        int y = q / padded_width - u * dilation, x = q % padded_width - v * dilation;
        if (y < 0 || x < 0 || y % stride || x % stride || y / stride >= height || x / stride >= width) return -1;
        return y / stride * width + x / stride;
    }
};
