"""Where the evidence for a class comes from: what a mechanism takes from each position, weighed by what the class
makes of it.

BAT's matrices and SAN's weights tell where features are taken from, not whether they count for anything. So each value
that is taken is multiplied by the gradient of the class's log-odds, carried back through the matrices or weights, which
are held fixed. Summed over all positions this is what the mechanism gives to the class, to first order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.attention.attach import evaluating
from common.attention.bat import BilinearTransform, bilinear_transform, resample
from common.attention.bat_video import BilinearTransform3d, temporal_transform
from common.attention.san import SelfAttention
from common.frames import clips, frames
from kernels.reference import aggregation


@dataclass
class _Watched:
    """A mechanism, what came into it, and what it has made by its matrices or weights, once it has run."""

    module: nn.Module
    entered: Tensor
    made: Tensor


def evidence(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Where the evidence for a class comes from in each of some inputs, by mechanism.

    Args:
        model: gives logits (N, classes), two classes or more.
        inputs: (N, C, H, W), or for video (N, C, T, H, W).
        targets: (N,), each input's class.

    Returns:
        The logits, and by module's name the shares (N, [T,] h, w) of its positions in the class's log-odds, on the grid
        of what it takes; negative where they speak against the class. Empty for a model without BAT and SAN.
    """
    with evaluating(model), torch.enable_grad(), _watching(model) as watched:
        logits = model(inputs.detach().requires_grad_())
        score = log_odds(logits, targets).sum()
        gradients = torch.autograd.grad(score, [each.made for each in watched.values()]) if watched else ()
        shares = {
            name: _share(each, gradient).sum(1).detach()
            for (name, each), gradient in zip(watched.items(), gradients)
        }
    return logits.detach(), shares


def on_inputs(shares: dict[str, Tensor], size: tuple[int, ...]) -> Tensor:
    """The shares of all modules together, (N, \\*size), spread over the pixels of inputs of ``size`` ([T,] H, W).

    Raises:
        ValueError: there are none.
    """
    if not shares:
        raise ValueError("shares: none; the model has neither BAT nor SAN")
    mode = "bilinear" if len(size) == 2 else "trilinear"
    spread = []
    for share in shares.values():
        large = nn.functional.interpolate(share[:, None], size=size, mode=mode, align_corners=False)[:, 0]
        spread.append(large * (share[0].numel() / large[0].numel()))
    return torch.stack(spread).sum(0)


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, classes), (N,) → (N,): the logarithm of a class's probability over that of all others together."""
    own = logits.gather(1, targets[:, None])[:, 0]
    return own - logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1)


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[str, _Watched]]:
    watched: dict[str, _Watched] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (BilinearTransform, BilinearTransform3d, SelfAttention)):
                before, after = _hooks(watched, name)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                if isinstance(module, SelfAttention):
                    hooks.callback(module.register_forward_hook(after).remove)
                else:
                    hooks.callback(module.conv2.register_forward_hook(after).remove)
        yield watched


def _hooks(watched: dict[str, _Watched], name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Before a mechanism, and after it (SAN) or its layer that gets what was moved (BAT)."""

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watched[name] = _Watched(module, inputs[0].detach(), inputs[0])

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watched[name].made = output if isinstance(watched[name].module, SelfAttention) else inputs[0]

    return before, after


def _share(watched: _Watched, gradient: Tensor) -> Tensor:
    """Value times gradient, (N, C, [T,] h, w), at the positions that values are taken from."""
    module, x = watched.module, watched.entered
    if isinstance(module, SelfAttention):
        values, weights = module.conv3(x), module.attention(x).detach()
        window = module.kernel_size, module.stride
        return _carried_back(
            values, lambda v: aggregation(v, weights, *window, dilation=module.dilation), gradient
        )
    if isinstance(module, BilinearTransform):
        x = module.fitted(x)
        p, q = (matrix.detach() for matrix in module.matrices(x))
        return _carried_back(x, lambda z: bilinear_transform(z, p, q), gradient)
    assert isinstance(module, BilinearTransform3d)
    x = module.fitted(x, *x.shape[2:])
    o = module.conv1(x)
    p, q = (matrix.detach() for matrix in module.matrices(o))
    m = module.time_matrices(o).detach() if module.time_groups else None

    def moved(z: Tensor) -> Tensor:
        y = clips(bilinear_transform(frames(z), p, q), z.shape[2])
        return y if m is None else temporal_transform(y, m)

    return _carried_back(x, moved, gradient)


def _carried_back(x: Tensor, move: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    """``x`` times what ``gradient``, at where the linear ``move`` brings it, is at ``x``."""
    x = x.detach().requires_grad_()
    (back,) = torch.autograd.grad(resample(move(x), gradient.shape[2:]), x, gradient)
    return x * back
