"""NOAH: the non-global attentive head, in place of global pooling and a linear classifier.

Li, Zhou and Yao, "NOAH: A New Head Structure To Improve Deep Neural Networks For Image Classification".
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import noah


class NOAH(nn.Module):
    """A classifier that weighs the positions of a feature map for every class, by several small heads.

    The channels are cut in two: the first ``int(in_features · key_ratio)`` feed the query branch, the others
    the value branch. Each branch is a 1×1 convolution, grouped by head, to one map per head and class. The
    query maps, softmaxed over all positions, weigh the value maps; logits sum over positions and heads:
    ``logits[c] = Σ_h Σ_l softmax_l(query[h, c])[l] · dropout(value[h, c, l])``.

    Args:
        in_features: channels C of the features.
        num_classes: logits per image.
        heads: attention heads, H.
        key_ratio: share of the channels that the query branch sees, in (0, 1).
        dropout: probability of dropping an entry of the value maps.
        head_split: each head sees its own share of a branch's channels; else every head sees them all.
        key_value_split: the branches see disjoint channels; else both see all C, and ``key_ratio`` is unused.

    Raises:
        ValueError: an argument is out of range, or a branch's channels do not divide among the heads.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        heads: int = 4,
        key_ratio: float = 0.5,
        dropout: float = 0.0,
        head_split: bool = True,
        key_value_split: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1 or heads < 1:
            raise ValueError(f"num_classes={num_classes}, heads={heads}: both must be 1 or more")
        self.in_features, self.num_classes, self.heads = in_features, num_classes, heads
        self.query_features = _split(in_features, key_ratio) if key_value_split else in_features
        self.value_features = in_features - self.query_features if key_value_split else in_features
        groups = heads if head_split else 1
        _check_divides(groups, in_features, self.query_features, self.value_features)
        self.query = nn.Conv2d(self.query_features, heads * num_classes, 1, groups=groups)
        self.value = nn.Conv2d(self.value_features, heads * num_classes, 1, groups=groups)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal by fan-out (heads · classes) with gain √2; zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def attention(self, features: Tensor) -> Tensor:
        """Weights of the positions: (N, C, \\*positions) → (N, heads, classes, L), of sum 1 over L."""
        return self._maps(self.query, features[:, : self.query_features]).softmax(-1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, \\*positions), any number of position dimensions → logits (N, classes)."""
        if torch.is_grad_enabled() and noah.runs(features.device, features.dtype):
            # The kernel reads the maps once; making them again costs less than keeping heads · classes of them.
            return checkpoint(
                self._logits, features, use_reentrant=False, preserve_rng_state=self.dropout.p > 0
            )
        return self._logits(features)

    def _logits(self, features: Tensor) -> Tensor:
        query = self._maps(self.query, features[:, : self.query_features])
        value = self._maps(self.value, features[:, self.in_features - self.value_features :])
        return noah.weighted_sum(query, self.dropout(value)).sum(1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, heads={self.heads}"

    def _maps(self, conv: nn.Module, features: Tensor) -> Tensor:
        """(N, channels, \\*positions) → (N, heads, classes, L)."""
        maps = conv(features.flatten(2).unsqueeze(-1))
        return maps.flatten(2).unflatten(1, (self.heads, self.num_classes))


def _split(in_features: int, key_ratio: float) -> int:
    """Channels of the query branch, ``int(in_features · key_ratio)``."""
    # 1/49 · 49 is below 1 in floating point: such a ratio must still give the channel it names.
    query_features = int(in_features * key_ratio + 1e-6)
    if not 0 < query_features < in_features:
        raise ValueError(
            f"key_ratio={key_ratio} gives {query_features} of {in_features} channels to the query branch and "
            f"{in_features - query_features} to the value branch: both need some"
        )
    return query_features


def _check_divides(heads: int, in_features: int, query_features: int, value_features: int) -> None:
    """Raise with the values that would work unless ``heads`` divides both branches' channels."""
    common = gcd(query_features, value_features)
    if common % heads == 0:
        return
    advice = f"heads from {[h for h in range(1, common + 1) if common % h == 0][:10]}"
    if query_features < in_features and in_features % heads == 0 and in_features > heads:
        below = max(query_features // heads, 1) * heads
        ratios = [f"{c}/{in_features}" for c in (below, below + heads) if c < in_features]
        advice += f", or key_ratio={' or '.join(ratios)} with heads={heads}"
    raise ValueError(
        f"heads={heads} does not divide the {query_features} query and {value_features} value channels: "
        f"use {advice}"
    )
