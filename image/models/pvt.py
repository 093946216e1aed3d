"""Pyramid Vision Transformer, version 1: four stages of transformer blocks with spatially reduced keys.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions".
``pvt_tiny_075`` and ``pvt_tiny_050`` are NOAH's narrower versions.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from common.weights import StateDict, published_layout
from image.models.noah import imagenet_cfg

Grid = tuple[int, int]

_HEADS = (1, 2, 5, 8)
_REDUCTIONS = (8, 4, 2, 1)
_MLP_RATIOS = (8, 8, 4, 4)
_STRIDE = 32


class PVTBlock(nn.Module):
    """Attention and MLP, each normalised first and added to its input; tokens (N, L, C) → (N, L, C)."""

    def __init__(
        self,
        features: int,
        heads: int,
        reduction: int,
        mlp_ratio: int,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attn = Attention(features, heads, reduction, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(features, eps=1e-6)
        self.mlp = Mlp(features, features * mlp_ratio, drop=proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PVTStage(nn.Module):
    """Patch embedding, position embedding (and class token), blocks: (N, C, H, W) → tokens, and their map."""

    def __init__(
        self,
        patches: PatchEmbed,
        blocks: list[PVTBlock],
        class_token: bool = False,
        pos_drop: float = 0.0,
    ) -> None:
        super().__init__()
        features = patches.proj.out_channels
        self.patch_embed = patches
        self.num_prefix_tokens = int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, features)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches.num_patches + self.num_prefix_tokens, features))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        tokens = self.patch_embed(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = self.pos_drop(tokens + self.positions(grid))
        for block in self.blocks:
            tokens = checkpoint(block, tokens, grid) if self.grad_checkpointing else block(tokens, grid)
        return tokens, tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    def positions(self, grid: Grid) -> Tensor:
        """The position embedding for ``grid``, resampled (bicubic) from the one it was made for."""
        own = self.patch_embed.grid_size
        if grid == own:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(own), self.num_prefix_tokens)


class PVT(nn.Module):
    """PVT with timm's API.

    Images need sides that are multiples of 32. At other sizes than ``img_size`` the position embeddings are
    resampled to the image's own grid in every forward pass; the class token keeps its own entry.

    Args:
        widths, depths: channels and blocks of the four stages.
        class_token: prepend a class token in the last stage, which the classifier sees.
        global_pool: what the classifier sees: ``"token"``, ``"avg"`` over the patches, or ``""``, all tokens.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm's ViT.

    Raises:
        ValueError: an image side is no multiple of 32; ``global_pool`` is unknown, or needs the class token.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        class_token: bool = True,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_prefix_tokens = int(class_token)
        self.num_features = self.head_hidden_size = self.embed_dim = widths[-1]
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info, stages = [], []
        for i, width in enumerate(widths):
            patch, chans = (2, widths[i - 1]) if i else (4, in_chans)
            patches = PatchEmbed(size, patch, chans, width, nn.LayerNorm, strict_img_size=False)
            size = patches.grid_size
            settings = (width, _HEADS[i], _REDUCTIONS[i], _MLP_RATIOS[i], proj_drop_rate, attn_drop_rate)
            blocks = [PVTBlock(*settings, drop_path=rate) for rate in drop_paths[i]]
            stages.append(PVTStage(patches, blocks, class_token and i == len(widths) - 1, pos_drop_rate))
            self.feature_info.append({"module": f"stages.{i}", "num_chs": width, "reduction": 4 << i})
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        if global_pool is None:
            global_pool = "token" if class_token else "avg"
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → logits (N, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → normalised tokens (N, class token + H/32 · W/32, C)."""
        _check_sides(x)
        for stage in self.stages:
            tokens, x = stage(x)
        return self.norm(tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps (N, C, H, W) of the stages ``indices``, before the final norm and without class token.

        As in timm's PVT v2, ``norm`` has no effect. Unless ``intermediates_only``, the tokens of the last stage
        stand before the maps: :meth:`forward_features`' output, or with ``stop_early`` an earlier stage's.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: the only format here is 'NCHW'")
        _check_sides(x)
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            tokens, x = stage(x)
            if i in taken:
                maps.append(x)
        tokens = self.norm(tokens) if stage is self.stages[-1] else tokens
        return maps if intermediates_only else (tokens, maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens → logits (N, classes), or with ``pre_logits`` the features (N, C) that give them."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for ``num_classes`` classes, 0 for none; ``global_pool`` as above."""
        if global_pool is not None:
            pools = ("avg", "", "token") if self.num_prefix_tokens else ("avg", "")
            if global_pool not in pools:
                raise ValueError(f"global_pool={global_pool!r}: expected one of {pools}")
            self.global_pool = global_pool
        weight = self.norm.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(weight.device, weight.dtype)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for stage in self.stages:
            assert isinstance(stage, PVTStage)
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and the class token."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the first patch embedding, then stages (``coarse``) or blocks."""
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:patch_embed|pos_embed|cls_token)", (0,)),
            (r"^norm", (99999,)),
        ]
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": r"^stages\.(\d+)" if coarse else fine,
        }


def _check_sides(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height % _STRIDE or width % _STRIDE:
        raise ValueError(f"image of {height}×{width}: PVT takes sides that are multiples of {_STRIDE}")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PVTStage):
        trunc_normal_(module.pos_embed, std=0.02)
        if module.cls_token is not None:
            trunc_normal_(module.cls_token, std=0.02)


CONFIGS: dict[str, dict[str, Any]] = {
    "pvt_tiny": {},
    "pvt_tiny_075": {"widths": (48, 96, 240, 384)},
    "pvt_tiny_050": {"widths": (32, 64, 160, 256)},
    "pvt_small": {"depths": (3, 4, 6, 3)},
    "pvt_medium": {"depths": (3, 4, 18, 3)},
    "pvt_large": {"depths": (3, 8, 27, 3)},
}
ALL_STAGES: dict[str, Any] = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3)}


@published_layout(*CONFIGS, *(f"{name}_noah" for name in CONFIGS))
def from_published(state: StateDict) -> StateDict:
    """The published names number the stages: ``block1.0.attn`` is ``stages.0.blocks.0.attn`` here."""
    own = {"block": "blocks", "patch_embed": "patch_embed", "pos_embed": "pos_embed"}

    def rename(match: re.Match[str]) -> str:
        return f"stages.{int(match[2]) - 1}.{own[match[1]]}" if match[1] else "stages.3.cls_token"

    numbered = re.compile(r"^(?:(block|patch_embed|pos_embed)([1-4])|cls_token$)")
    return {numbered.sub(rename, key): value for key, value in state.items()}


_CFG = imagenet_cfg(interpolation="bicubic", first_conv="stages.0.patch_embed.proj", classifier="head")
default_cfgs = generate_default_cfgs(dict.fromkeys(CONFIGS, _CFG))


def _pvt(variant: str, pretrained: bool, **kwargs: Any) -> PVT:
    return build_model_with_cfg(
        PVT, variant, pretrained, feature_cfg=dict(ALL_STAGES), **(CONFIGS[variant] | kwargs)
    )


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny, 13.23 M parameters, 75.10 % top-1 as NOAH's baseline."""
    return _pvt("pvt_tiny", pretrained, **kwargs)


@register_model
def pvt_tiny_075(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny at three quarters of the width, 7.62 M, 71.81 %."""
    return _pvt("pvt_tiny_075", pretrained, **kwargs)


@register_model
def pvt_tiny_050(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Tiny at half the width, 3.54 M, 65.33 %."""
    return _pvt("pvt_tiny_050", pretrained, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Small of the PVT paper, 24.5 M."""
    return _pvt("pvt_small", pretrained, **kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Medium of the PVT paper, 44.2 M."""
    return _pvt("pvt_medium", pretrained, **kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PVT:
    """PVT-Large of the PVT paper, 61.4 M."""
    return _pvt("pvt_large", pretrained, **kwargs)
