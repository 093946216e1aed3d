"""Put a mechanism into any timm model, keeping the model's class, its parameter names and timm's API.

:func:`attach` has two halves, for heads and blocks of any kind: :func:`replace_head`, :func:`insert_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from math import isqrt
from operator import attrgetter
from typing import Any

import torch
from timm.models.regnet import RegStage
from torch import Tensor, nn

from common.attention.bat import BATBlock
from common.attention.fbn import FBNHead
from common.attention.noah import NOAH
from common.attention.non_local import NonLocal

HEADS: dict[str, Callable[..., nn.Module]] = {"noah": NOAH, "fbn": FBNHead}
BLOCKS: dict[str, Callable[..., nn.Module]] = {"bat": BATBlock, "nl": NonLocal}

MakeHead = Callable[[int, int], nn.Module]
MakeBlock = Callable[[int], nn.Module]


def attach(model: nn.Module, mechanism: str, after: Collection[str] = (), **options: Any) -> nn.Module:
    """Attach a mechanism to any timm model, in place.

    - ``attach(model, "noah", heads=4, key_ratio=0.5)``: the head becomes :class:`common.attention.noah.NOAH`.
    - ``attach(model, "fbn", factors=20)``: it becomes :class:`common.attention.fbn.FBNHead`. The network's
      last activation becomes tanh; where the features do not come straight from one, the head applies it.
    - ``attach(model, "bat", after={"layer2.1", "layer3.1"}, size=7)``: a
      :class:`common.attention.bat.BATBlock` after each of these modules.
    - ``attach(model, "nl", after={"stages.2.blocks.1"})``: likewise
      :class:`common.attention.non_local.NonLocal`.

    See :func:`replace_head` and :func:`insert_blocks` for the names in the state dict.

    Args:
        model: of timm's; the heads need a classification model, the blocks any that runs.
        mechanism: ``"noah"``, ``"fbn"``, ``"bat"`` or ``"nl"``.
        after: names of modules, for the blocks only.
        options: keyword arguments of the mechanism's class.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown mechanism or module, features of an unfit shape, or options that do not fit
            the channels; the message says which would.
    """
    if mechanism in BLOCKS:
        return insert_blocks(model, mechanism, after, partial(BLOCKS[mechanism], **options))
    if mechanism not in HEADS:
        raise ValueError(f"mechanism={mechanism!r}: must be one of {sorted(HEADS | BLOCKS)}")
    if after:
        raise ValueError(
            f"after={after!r}: only blocks ({', '.join(BLOCKS)}) go after modules, {mechanism} is a head"
        )
    replace_head(model, partial(HEADS[mechanism], **options))
    if mechanism == "fbn" and not _end_in_tanh(model):
        replace_head(model, partial(FBNHead, tanh=True, **options))
    return model


@dataclass(frozen=True)
class Layout:
    """How features are laid out: (N, C, H, W) maps, (N, H, W, C) maps, or (N, prefix + L, C) tokens."""

    ndim: int
    channels_last: bool = False
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None  # of the tokens; a square where their number is another

    @classmethod
    def of(cls, x: object, model: nn.Module, prefix_tokens: int) -> Layout | None:
        """The layout of ``x``, features of ``model``; None where it is not one map or one row of tokens."""
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            return None
        tokens = x.ndim == 3
        channels_last = tokens or getattr(model, "output_fmt", "NCHW") == "NHWC"
        return cls(x.ndim, channels_last, prefix_tokens if tokens else 0)

    def channels_first(self, x: Tensor) -> Tensor:
        """To (N, C, H, W), or to (N, C, L) without the prefix tokens."""
        return x[:, self.prefix_tokens :].movedim(-1, 1) if self.channels_last else x

    def maps(self, x: Tensor) -> Tensor:
        """To (N, C, H, W), with tokens, but for the prefix tokens, on their grid."""
        y = self.channels_first(x)
        if self.ndim == 4:
            return y
        if not self.fits(x.shape[1]):
            raise ValueError(f"features: {y.shape[2]} tokens fill neither the grid {self.grid} nor a square")
        return y.unflatten(2, self._grid(x.shape[1]))

    def from_maps(self, maps: Tensor, x: Tensor) -> Tensor:
        """``maps`` in the layout of ``x``, from which the prefix tokens are taken."""
        if self.ndim == 3:
            return torch.cat([x[:, : self.prefix_tokens], maps.flatten(2).mT], 1)
        return maps.movedim(1, -1) if self.channels_last else maps

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens, with the prefix tokens, fill a grid."""
        height, width = self._grid(tokens)
        return height * width == tokens - self.prefix_tokens

    def _grid(self, tokens: int) -> tuple[int, int]:
        tokens -= self.prefix_tokens
        if self.grid is not None and tokens == self.grid[0] * self.grid[1]:
            return self.grid
        return isqrt(tokens), isqrt(tokens)

    def positions(self, x: object) -> int:
        """How many positions ``x`` has, 0 where it has another layout."""
        return self.channels_first(x)[0, 0].numel() if isinstance(x, Tensor) and x.ndim == self.ndim else 0


class UnpooledHead(nn.Module):
    """What :func:`replace_head` changes in a timm model: mixed in front of the model's own class."""

    backbone_class: type[nn.Module]
    num_classes: int
    head_hidden_size: int
    _classifier_name: str
    _make_head: MakeHead
    _layout: Layout
    _uses_forward_head: bool
    _pooled: bool

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of ``forward_features`` to logits (N, classes); (N, head_hidden_size) with ``pre_logits``.

        A head over positions has no pooled features of its own: ``pre_logits`` and ``num_classes=0`` give
        the mean over the positions; ``reset_classifier(0, "")`` gives the unpooled features, as in timm.
        """
        x = self._unpooled(x)
        if self.num_classes == 0 and not self._pooled:
            return x
        x = self._layout.channels_first(x)
        return x.flatten(2).mean(2) if pre_logits or self.num_classes == 0 else self.get_classifier()(x)

    def get_classifier(self, name_only: bool = False) -> Any:
        """The head, or its name in the model."""
        return self._classifier_name if name_only else attrgetter(self._classifier_name)(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of the same kind for ``num_classes`` classes; 0 removes it (see ``forward_head``)."""
        head = self._make_head(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        own = next(self.parameters())
        head = head.to(own.device, own.dtype).train(self.training)
        self.set_submodule(self._classifier_name, head)
        self.num_classes = num_classes
        if global_pool is not None:
            self._pooled = global_pool != ""

    def _unpooled(self, features: Tensor) -> Tensor:
        own: Any = super()
        return own.forward_head(features, pre_logits=True) if self._uses_forward_head else features

    def __reduce__(self) -> tuple:
        return _empty, (self.backbone_class,), self.__dict__


@cache
def _with_unpooled_head(backbone_class: Any) -> type[nn.Module]:
    """A subclass of the same name; one a backbone class, so that models of one kind share their class."""
    names = {"backbone_class": backbone_class, "__module__": backbone_class.__module__}
    return type(backbone_class.__name__, (UnpooledHead, backbone_class), names)


def _empty(backbone_class: Any) -> nn.Module:
    made = _with_unpooled_head(backbone_class)
    return made.__new__(made)


def replace_head(model: nn.Module, make_head: MakeHead) -> nn.Module:
    """Replace the pooling and the classifier of a timm model by a head that sees unpooled features.

    The head takes the place, and so the state-dict name, of the model's own classifier: ``head.*`` in ViTs
    and MLPs, ``fc.*`` in ResNets, ``classifier.*`` in MobileNets, ``head.fc.*`` in ConvNeXt and its like.
    Norms and convolutions between the backbone and the classifier stay, and act on every position; where
    they cannot (VGG's mix positions) they go. Prefix tokens (class, distillation) are not positions.
    The classifier's own dropout (``drop_rate``) stays, in front of the head.

    Args:
        model: a classification model of timm, changed in place; it stays an instance of its class.
        make_head: ``make_head(in_features, num_classes)`` gives a module from (N, in_features, H, W) maps
            or (N, in_features, L) tokens to logits (N, num_classes). Kept, for ``reset_classifier``.

    Returns:
        ``model``; ``forward_features``, ``forward_head``, ``get_classifier``, ``reset_classifier``,
        ``forward_intermediates`` and gradient checkpointing work as before.

    Raises:
        ValueError: the model's features are not one map or one row of tokens, or ``make_head`` refuses them.
            The model has lost its classifier then.
    """
    made: Any = model
    if not all(hasattr(model, part) for part in ("forward_head", "reset_classifier", "num_classes")):
        raise ValueError(f"model: {type(model).__name__} is not a classification model of timm with a head")
    num_classes, name, prefix_tokens = made.num_classes, _classifier_name(model), _prefix_tokens(model)
    if isinstance(model, UnpooledHead):
        made.__class__ = model.backbone_class
    try:
        made.reset_classifier(0, "")
    except AssertionError:  # its head works on pooled features only
        made.reset_classifier(0)
    features, unpooled, head_only = _features(model)
    layout = Layout.of(features, model, prefix_tokens)
    if layout is None or layout.positions(features) < 2:
        raise ValueError(f"model: {type(model).__name__} has no single map of features for a head to see")
    made._uses_forward_head = layout.positions(unpooled) == layout.positions(features)
    if not made._uses_forward_head:
        for unused in head_only:
            model.set_submodule(unused, nn.Identity())
    seen = unpooled if made._uses_forward_head else features
    made._layout, made._classifier_name, made._make_head, made._pooled = layout, name, make_head, True
    made.__class__ = _with_unpooled_head(made.__class__)
    made.head_hidden_size = layout.channels_first(seen).shape[1]
    made.reset_classifier(num_classes)
    return model


def _features(model: Any) -> tuple[Any, Any, list[str]]:
    """The features and pre-logits of ``model``, and the names of the modules that only its head uses."""
    owners = {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    with evaluating(model), recording(owners) as outputs:
        features = model.forward_features(example_input(model))
        in_features = set(outputs)
        unpooled = model.forward_head(features, pre_logits=True)
    return features, unpooled, sorted(set(outputs) - in_features)


def _classifier_name(model: Any) -> str:
    if isinstance(model, UnpooledHead):
        return model._classifier_name
    classifier = model.get_classifier()
    if isinstance(classifier, tuple):  # distilled networks have two
        classifier = classifier[0]
    classifier = getattr(classifier, "fc", classifier)  # some give their whole head
    return next(name for name, module in model.named_modules() if module is classifier)


def _prefix_tokens(model: Any) -> int:
    if isinstance(model, UnpooledHead):
        return model._layout.prefix_tokens
    takes_first = getattr(model, "global_pool", None) == "token"
    return getattr(model, "num_prefix_tokens", 1 if takes_first else 0)


def _end_in_tanh(model: Any) -> bool:
    """Make the activation that gives the head's features a tanh; False where no single one does."""
    kinds = ("torch.nn.modules.activation", "timm.layers.activations")
    activations = {name: m for name, m in model.named_modules() if type(m).__module__.startswith(kinds)}
    with evaluating(model), recording(activations) as outputs:
        seen = model._unpooled(model.forward_features(example_input(model)))
    found = [name for name, calls in outputs.items() if calls[-1] is seen and len(calls) == 1]
    if found:
        model.set_submodule(found[-1], nn.Tanh())
    return bool(found)


def insert_blocks(model: nn.Module, name: str, after: Collection[str], make_block: MakeBlock) -> nn.Module:
    """Put a block behind each of the modules ``after``, in place.

    The block becomes the module's child ``name`` and works on what the module gives, so that all other names
    and all code around stay as they are: ``layer2.1.bat.*`` after ``layer2.1``. After a sequence it belongs
    to the last module in it. Blocks see (N, C, H, W) maps: (N, H, W, C) maps are permuted, and
    tokens put on their grid, without the prefix tokens, which pass by.

    Args:
        model: any model that runs on :func:`example_input`.
        name: of the block in its module.
        after: names of modules that give one map, or one row of tokens.
        make_block: ``make_block(channels)`` gives a module from (N, C, H, W) to the same shape.

    Raises:
        ValueError: a name is unknown (the nearest are named), or its module's output is not such features.
    """
    modules = dict(model.named_modules())
    names = {_last(modules, wanted) for wanted in ([after] if isinstance(after, str) else after)}
    if not names:
        raise ValueError(
            f"after={after!r}: name the modules after which the blocks go, such as {_examples(modules)}"
        )
    places = {place: modules[place] for place in sorted(names)}
    with evaluating(model), recording(places) as outputs:
        model(example_input(model))
    blocks = {}
    for place, module in places.items():
        if hasattr(module, name):
            raise ValueError(f"after: {place!r} has a {name!r} already")
        if place not in outputs:
            raise ValueError(f"after: {place!r} is not called when the model runs; name another module")
        layout = _map_layout(model, place, outputs[place][-1])
        like = outputs[place][-1]
        blocks[place] = make_block(layout.channels_first(like).shape[1]).to(like.device, like.dtype), layout
    for place, (block, layout) in blocks.items():
        places[place].add_module(name, block.train(places[place].training))
        places[place].register_forward_hook(partial(_through_block, name, layout))
    return model


def _through_block(name: str, layout: Layout, module: nn.Module, _: Any, x: Tensor) -> Tensor:
    return layout.from_maps(getattr(module, name)(layout.maps(x)), x)


def _last(modules: dict[str, Any], wanted: str) -> str:
    """``wanted``, or the last module of the sequence that it names."""
    if wanted not in modules or not wanted:
        near = get_close_matches(wanted, list(modules), n=3, cutoff=0.0)
        raise ValueError(f"after: the model has no module {wanted!r}; the nearest are {', '.join(near)}")
    module = modules[wanted]
    if type(module).forward in (nn.Sequential.forward, RegStage.forward) and len(module._modules):
        return _last(modules, f"{wanted}.{list(module._modules)[-1]}")
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"after: {wanted!r} is a container with its own way of calling; name a module in it")
    return wanted


def _examples(modules: dict[str, nn.Module]) -> list[str]:
    """A few modules in sequences, as names that ``after`` may have."""
    sequences = (n for n, m in modules.items() if type(m) is nn.Sequential and len(m) > 1)
    return [f"{n}.{next(iter(modules[n]._modules))}" for n in sequences][:3]


def _map_layout(model: Any, place: str, x: object) -> Layout:
    """How ``x``, the output of the module ``place`` on :func:`example_input`, holds a map."""
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"after: {place!r} gives {what}; blocks go after modules that give (N, C, H, W) maps"
        )
    if x.ndim == 4:  # the order inside a model is not always that of its output: example inputs are square
        a, b, c = x.shape[1:]
        by_model = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return Layout(4, channels_last=a == b != c or (by_model and not b == c != a))
    embeddings = (getattr(model, n, None) for n in ("patch_embed", "stem"))
    grid = next((g for e in embeddings if (g := getattr(e, "grid_size", None))), None)
    for prefix_tokens in (_prefix_tokens(model), 0):
        layout = Layout(3, True, prefix_tokens, grid)
        if layout.fits(x.shape[1]):
            return layout
    raise ValueError(f"after: {place!r} gives {x.shape[1]} tokens, which are no grid")


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Record every output of some named modules: name → outputs, in the order of the calls."""
    outputs: dict[str, list[Any]] = {}

    def record(name: str, module: nn.Module, _: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def example_input(model: nn.Module) -> Tensor:
    """Zeros (1, in_chans, H, W) of a size that ``model`` takes, on its device and of its dtype."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    in_chans, *size = cfg.get("input_size") or (3, 224, 224)
    sizes = [getattr(getattr(model, name, None), "img_size", None) for name in ("patch_embed", "stem")]
    height, width = next((s for s in sizes if s is not None), size)
    return next(model.parameters()).new_zeros(1, getattr(model, "in_chans", in_chans), height, width)
