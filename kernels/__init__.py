"""CUDA kernels as torch operators, and the pure-torch reference that judges them."""


class KernelError(RuntimeError):
    """``PAIRWISE_KERNELS`` asks for what is not there; the message says what is missing."""
