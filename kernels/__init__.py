"""CUDA kernels as torch operators, and the pure-torch reference that judges them."""
