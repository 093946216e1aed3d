"""What makes sense as an operator's arguments; anything else is a ValueError that names the argument and its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.footprint import output_side, same_padding

PAD_MODES = ("reflect", "zero")


def check_patches(
    x: Tensor, scale: Tensor, shift: Tensor, mix: Tensor, kernel_size: int, stride: int, dilation: int
) -> None:
    """Raise ValueError unless the arguments of :func:`mix_patches` fit each other."""
    check_footprint("x", x, kernel_size, stride, 0, dilation, "zero")
    exact = torch.promote_types(x.dtype, torch.float32)
    footprints = (x.shape[1], kernel_size**2)
    for name, t, shape in (
        ("scale", scale, footprints),
        ("shift", shift, footprints),
        ("mix", mix, (mix.shape[0], *footprints)),
    ):
        if tuple(t.shape) != shape or t.dtype != exact or t.device != x.device:
            raise ValueError(
                f"{name}, shape {tuple(t.shape)}, is {t.dtype} on {t.device}, expected {shape}, {exact} on {x.device}"
            )


def check_transform(x: Tensor, p: Tensor, q: Tensor) -> None:
    """Raise ValueError unless the arguments of :func:`bilinear_transform` fit each other."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, C, H, W)")
    for name, matrix, side in (("p", p, x.shape[2]), ("q", q, x.shape[3])):
        fits = matrix.dim() == 4 and matrix.shape[0] == x.shape[0] and matrix.shape[2] == matrix.shape[3]
        if not fits or matrix.shape[1] != p.shape[1]:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected ({x.shape[0]}, k, s, s)")
        if x.shape[1] % matrix.shape[1] or side % matrix.shape[3]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: {name} of shape {tuple(matrix.shape)} does not divide it"
            )
        if matrix.device != x.device:
            raise ValueError(f"{name} is on {matrix.device}, expected {x.device} as x")


def check_norm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, window: int) -> None:
    """Raise ValueError unless the arguments of :func:`norm_relu` fit each other."""
    if x.dim() != 4 or window < 1 or min(x.shape[2:]) < window:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (N, C, H, W) with sides of at least {max(window, 1)}"
        )
    if mean is None and not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}: no pixel to take statistics of")
    exact = torch.promote_types(x.dtype, torch.float32)
    for name, t in (("gamma", gamma), ("beta", beta)):
        if tuple(t.shape) != (x.shape[1],) or t.dtype != exact or t.device != x.device:
            raise ValueError(
                f"{name}, shape {tuple(t.shape)}, is {t.dtype} on {t.device}, "
                f"expected ({x.shape[1]},), {exact} on {x.device}"
            )


def check_rows(query: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the arguments of :func:`weighted_sum` fit each other."""
    check_alike("query", query, "value", value)
    if query.shape != value.shape or query.dim() < 1 or query.shape[-1] < 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and value {tuple(value.shape)}, expected (…, L) twice"
        )


def check_products(products: Tensor, power: Tensor) -> None:
    """Raise ValueError unless the arguments of :func:`square_sum` fit each other."""
    exact = torch.promote_types(products.dtype, torch.float32)
    if power.shape != products.shape[-1:] or power.dtype != exact or power.device != products.device:
        raise ValueError(
            f"power, shape {tuple(power.shape)}, is {power.dtype} on {power.device}, "
            f"expected shape {tuple(products.shape[-1:])}, {exact} on {products.device}"
        )


def check_footprint(
    name: str, x: Tensor, kernel_size: int, stride: int, padding: int | None, dilation: int, pad_mode: str
) -> None:
    """Raise ValueError unless the footprint fits at least once into the padded map ``x``, called ``name``."""
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (N, C, H, W) with C, H, W at least 1")
    for argument, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if size < 1:
            raise ValueError(f"{argument} is {size}, expected at least 1")
    if padding is not None and padding < 0:
        raise ValueError(f"padding is {padding}, expected at least 0")
    if pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode is {pad_mode!r}, expected one of {PAD_MODES}")
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    if min(output_side(side, kernel_size, stride, padding, dilation) for side in x.shape[2:]) < 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: too small for kernel_size {kernel_size}, "
            f"dilation {dilation}, padding {padding}"
        )


def check_weight(
    value: Tensor, weight: Tensor, kernel_size: int, stride: int, padding: int | None, dilation: int
) -> None:
    """Raise ValueError unless ``weight`` fits ``value`` in :func:`aggregation`."""
    check_alike("value", value, "weight", weight)
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    height, width = (output_side(side, kernel_size, stride, padding, dilation) for side in value.shape[2:])
    expected = (value.shape[0], kernel_size**2, height * width)
    if weight.dim() != 4 or (weight.shape[0], *weight.shape[2:]) != expected:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (N, Cw, K, P) with N, K, P = {expected}"
        )
    if weight.shape[1] < 1 or value.shape[1] % weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: its {weight.shape[1]} channels do not divide "
            f"the {value.shape[1]} of value"
        )


def check_pairwise(
    centre: Tensor,
    around: Tensor,
    value: Tensor,
    mix: Tensor,
    gamma: Tensor,
    beta: Tensor,
    to_weight: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> None:
    """Raise ValueError unless the arguments of :func:`pairwise_attention` fit each other."""
    for name, x in (("around", around), ("value", value)):
        check_footprint(name, x, kernel_size, stride, 0, dilation, "zero")
    images, inputs, *sides = around.shape
    hidden, weights = mix.shape[0], to_weight.shape[0]
    output = tuple(output_side(side, kernel_size, stride, 0, dilation) for side in sides)
    expected = {
        "centre": (centre, (images, inputs, *output)),
        "value": (value, (images, value.shape[1], *sides)),
        "mix": (mix, (hidden, inputs)),
        "gamma": (gamma, (hidden,)),
        "beta": (beta, (hidden,)),
        "to_weight": (to_weight, (weights, hidden)),
        "bias": (bias, (weights,)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
        if x.device != around.device or (name != "value" and x.dtype != around.dtype):
            raise ValueError(
                f"{name}, shape {shape}, is {x.dtype} on {x.device}, "
                f"expected {around.dtype} on {around.device} as around"
            )
    if weights < 1 or value.shape[1] % weights:
        raise ValueError(
            f"to_weight has shape {tuple(to_weight.shape)}: its {weights} channels do not divide "
            f"the {value.shape[1]} of value"
        )


def check_alike(first_name: str, first: Tensor, name: str, x: Tensor) -> None:
    """Raise ValueError unless both tensors have one dtype and device."""
    if x.dtype != first.dtype or x.device != first.device:
        raise ValueError(
            f"{name}, shape {tuple(x.shape)}, is {x.dtype} on {x.device}, "
            f"expected {first.dtype} on {first.device} as {first_name}"
        )
