"""The NOAH head against its definition, its memory, its initial values and its messages."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch
from torch import nn

import kernels.noah
from common.attention.noah import NOAH


def definition(head: NOAH, features: torch.Tensor, split: bool, key_value_split: bool) -> torch.Tensor:
    """The formula of the paper, one image, head and class at a time."""
    n, channels = features.shape[:2]
    x = features.reshape(n, channels, -1)
    keys = int(channels * 0.25)
    parts = (x[:, :keys], x[:, keys:]) if key_value_split else (x, x)
    logits = torch.zeros(n, head.num_classes, dtype=x.dtype)
    for i in range(n):
        for h in range(head.heads):
            for c in range(head.num_classes):
                row = h * head.num_classes + c
                maps = []
                for conv, part in zip((head.query, head.value), parts):
                    width = part.shape[1] // head.heads
                    seen = part[i, h * width : (h + 1) * width] if split else part[i]
                    maps.append(conv.weight[row, :, 0, 0] @ seen + conv.bias[row])
                weights = maps[0].exp() / maps[0].exp().sum()
                logits[i, c] += (weights * maps[1]).sum()
    return logits


def randomised(*args, **kwargs) -> NOAH:
    torch.manual_seed(0)
    head = NOAH(*args, **kwargs).double().eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


@pytest.mark.parametrize("key_value_split", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("positions", [(3, 5), (7,), (2, 3, 2)])
def test_equals_its_definition(positions, split, key_value_split):
    head = randomised(24, 5, heads=3, key_ratio=0.25, head_split=split, key_value_split=key_value_split)
    features = torch.randn(2, 24, *positions, dtype=torch.float64)
    expected = definition(head, features, split, key_value_split)
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-12)


def test_gradients():
    head = randomised(8, 3, heads=2)
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*head.named_parameters())
    values = [value.detach().requires_grad_() for value in values]

    def run(x, *values):
        return torch.func.functional_call(head, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_attention_sums_to_one_and_forgets_the_query_bias():
    head = randomised(16, 4, heads=2)
    x = torch.randn(3, 16, 4, 5, dtype=torch.float64)
    attention, logits = head.attention(x), head(x)
    assert attention.shape == (3, 2, 4, 20)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 4, dtype=torch.float64))
    head.query.bias.data += 3
    torch.testing.assert_close(head(x), logits)


def test_without_a_query_it_is_global_pooling_and_a_linear_layer():
    head = randomised(16, 4, heads=2)
    nn.init.zeros_(head.query.weight)
    x = torch.randn(3, 16, 4, 5, dtype=torch.float64)
    value = head.value(x.mean((2, 3), keepdim=True)[:, 8:]).flatten(1)
    torch.testing.assert_close(head(x), value.unflatten(1, (2, 4)).sum(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts_agree(layout):
    head = randomised(16, 4)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(head(x.contiguous(memory_format=layout)), head(x.flatten(2)))


def test_tokens_as_a_view_of_channels_last():
    head = randomised(16, 4)
    tokens = torch.randn(2, 15, 16, dtype=torch.float64)
    torch.testing.assert_close(head(tokens.movedim(-1, 1)), head(tokens.movedim(-1, 1).contiguous()))


def test_dropout_drops_single_entries_of_the_value_maps():
    head = NOAH(8, 3, heads=2, dropout=0.5).train()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(head.value.bias)  # every value is 1, every weight 1/L: an entry is 0 or 2 / L
    torch.manual_seed(0)
    entries = head(torch.randn(64, 8, 5, 5)) * 25 / 2
    torch.testing.assert_close(entries, entries.round(), rtol=0, atol=1e-4)
    assert entries.unique().numel() > 10
    assert entries.mean().item() == pytest.approx(25, abs=1)
    torch.testing.assert_close(head.eval()(torch.randn(4, 8, 5, 5)), torch.full((4, 3), 2.0))


def test_keeps_two_maps_for_the_backward_pass():
    head = NOAH(16, 100, heads=4)
    x = torch.randn(2, 16, 7, 7, requires_grad=True)
    size, kept = 2 * 4 * 100 * 49, set()

    def pack(tensor):
        if tensor.numel() >= size:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = head(x)
    assert len(kept) == 2  # the weights and the values
    logits.sum().backward()


def test_initial_values():
    head = NOAH(512, 1000, heads=4)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "query.weight": (4000, 64, 1, 1),
        "query.bias": (4000,),
        "value.weight": (4000, 64, 1, 1),
        "value.bias": (4000,),
    }
    for conv in (head.query, head.value):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 4000), rel=0.01)
        assert not conv.bias.any()


def test_autocast_and_half():
    head = NOAH(32, 10, key_ratio=0.25)
    x = torch.randn(2, 32, 7, 7)
    expected = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    half = head.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_a_ratio_that_names_a_channel_gives_it():
    assert int(49 * (1 / 49)) == 0
    assert NOAH(49, 2, heads=1, key_ratio=1 / 49).query_features == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"in_features": 60, "heads": 4},
        {"in_features": 2048, "heads": 4, "key_ratio": 0.3},
        {"in_features": 512, "heads": 8, "key_ratio": 0.99},
        {"in_features": 96, "heads": 7, "key_value_split": False},
        {"in_features": 30, "heads": 4},
    ],
)
def test_heads_that_do_not_divide_say_what_would_work(kwargs):
    with pytest.raises(ValueError, match=f"heads={kwargs['heads']} does not divide") as error:
        NOAH(num_classes=3, **kwargs)
    message = str(error.value)
    for heads in ast.literal_eval(re.search(r"heads from (\[.*?\])", message)[1]):
        NOAH(num_classes=3, **kwargs | {"heads": heads})
    ratios = re.findall(r"(\d+)/(\d+)", message)
    assert bool(ratios) == (kwargs["in_features"] % kwargs["heads"] == 0 and "key_value_split" not in kwargs)
    for channels, of in ratios:
        assert NOAH(num_classes=3, **kwargs | {"key_ratio": int(channels) / int(of)}).query_features == int(
            channels
        )


def test_heads_that_do_not_divide_are_right_without_head_split():
    assert NOAH(30, 3, heads=4, head_split=False)(torch.randn(1, 30, 2, 2)).shape == (1, 3)


@pytest.mark.parametrize("key_ratio", [0.0, 1.0, -0.5, 1.5, 0.01])
def test_a_branch_without_channels(key_ratio):
    with pytest.raises(
        ValueError, match=rf"key_ratio={key_ratio} gives .* of 16 channels to the query branch"
    ):
        NOAH(16, 3, key_ratio=key_ratio)


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"num_classes": 3, "heads": 0}])
def test_counts_below_one(kwargs):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        NOAH(16, **kwargs)


def test_with_a_kernel_no_map_per_class_is_kept(monkeypatch):
    """The path that a GPU takes, with the operator's reference in the kernel's place."""
    torch.manual_seed(0)
    head = NOAH(8, 50, heads=2).double()
    features = torch.randn(3, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = head(features)
    wanted = torch.autograd.grad(expected.square().sum(), [features, *head.parameters()])
    monkeypatch.setattr(kernels.noah, "runs", lambda *_: True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        logits = head(features)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        torch.autograd.grad(logits.square().sum(), [features, *head.parameters()]), wanted
    )
    assert max(kept, default=0) < 3 * 2 * 50 * 20
