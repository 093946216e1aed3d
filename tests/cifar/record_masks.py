"""cifar/train.py that also writes every DropFactor mask of this rank, one a line, to the file $MASKS.RANK."""

from __future__ import annotations

import os

from torch import Tensor

from cifar.train import main
from common.attention.fbn import FactorizedBilinear
from common.errors import run_main

draw = FactorizedBilinear.mask


def recorded(layer: FactorizedBilinear) -> Tensor | None:
    """The mask, written when it is one of training."""
    mask = draw(layer)
    if layer.training and mask is not None:
        with open(f"{os.environ['MASKS']}.{os.environ.get('RANK', '0')}", "a") as file:
            file.write(f"{mask.tolist()}\n")
    return mask


FactorizedBilinear.mask = recorded  # type: ignore[method-assign]
run_main(main)
