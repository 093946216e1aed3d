"""PVT: position embeddings at other sizes, the class token, timm's features and weight-decay groups."""

from __future__ import annotations

import pytest
import timm
import torch

import image.models.pvt  # noqa: F401
from image.models.pvt import PVT

NARROW = {"widths": (8, 16, 40, 64), "depths": (1, 1, 1, 1), "num_classes": 5}


def narrow(**kwargs) -> PVT:
    torch.manual_seed(0)
    return timm.create_model("pvt_tiny", **(NARROW | kwargs)).eval()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(448, 448), (224, 256), (192, 320), (32, 32)])
def test_other_sizes(size, class_token):
    model = narrow(class_token=class_token)
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(2, 3, *size))
        assert tokens.shape == (2, (size[0] // 32) * (size[1] // 32) + class_token, 64)
        assert model.forward_head(tokens).isfinite().all()


def test_position_embeddings_are_resampled_to_the_grid_and_the_class_token_keeps_its_entry():
    stage = narrow().stages[3]
    assert stage.positions((7, 7)) is stage.pos_embed
    ramp = torch.arange(7.0)
    with torch.no_grad():
        stage.pos_embed[0, 1:] = (ramp[:, None] + 10 * ramp).reshape(49, 1)  # rows by 1, columns by 10
    resampled = stage.positions((14, 7))
    assert resampled.shape == (1, 99, 64)
    assert torch.equal(resampled[:, 0], stage.pos_embed[:, 0])
    grid = resampled[0, 1:, 0].reshape(14, 7)
    # Halfway between the old rows, columns as they were; the borders bend.
    torch.testing.assert_close(grid[4:10, 3], 30 + (torch.arange(4.0, 10) + 0.5) / 2 - 0.5, rtol=0, atol=0.05)
    torch.testing.assert_close(grid[7, 1:] - grid[7, :-1], torch.full((6,), 10.0), rtol=0, atol=1e-4)


def test_equal_positions_stay_equal_at_other_sizes():
    model = narrow(class_token=False)
    for stage in model.stages:
        torch.nn.init.constant_(stage.pos_embed, 0.3)
    with torch.no_grad():  # an image of one colour: every token is the same, at every size
        one = model(torch.ones(1, 3, 224, 224))
        torch.testing.assert_close(model(torch.ones(1, 3, 320, 192)), one, rtol=1e-4, atol=1e-5)


def test_a_model_made_for_another_size():
    model = narrow(img_size=(448, 224))
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [6272, 1568, 392, 99]
    assert model(torch.randn(1, 3, 448, 224)).shape == (1, 5)


@pytest.mark.parametrize("size", [(200, 224), (224, 240)])
def test_sides_that_are_no_multiples_of_32(size):
    with pytest.raises(ValueError, match=rf"{size[0]}×{size[1]}: PVT takes sides that are multiples of 32"):
        narrow()(torch.randn(1, 3, *size))


def test_intermediates():
    model = narrow()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        assert torch.equal(tokens, model.forward_features(x))
        assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (40, 4, 6), (64, 2, 3)]
        torch.testing.assert_close(model.norm(maps[-1].flatten(2).transpose(1, 2)), tokens[:, 1:])
        (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early, maps[1])
        tokens, (early,) = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(tokens.transpose(1, 2).flatten(2), early.flatten(2))
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pooling():
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for pool in ("token", "avg"):
            model = narrow(global_pool=pool)
            tokens = model.forward_features(x)
            seen = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
            torch.testing.assert_close(model(x), model.head(seen))
        model = narrow(global_pool="", num_classes=0)
        assert model(x).shape == (1, 5, 64)
    with pytest.raises(ValueError, match="global_pool='token': expected one of"):
        narrow(class_token=False, global_pool="token")


def test_no_weight_decay_names_parameters():
    model = narrow()
    names = model.no_weight_decay()
    assert names == {"stages.3.cls_token", *(f"stages.{i}.pos_embed" for i in range(4))}
    assert names <= {name for name, _ in model.named_parameters()}


def test_drop_path_rises_from_the_first_block_to_the_last():
    model = timm.create_model("pvt_small", drop_path_rate=0.3, widths=(8, 16, 40, 64))
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert len(rates) == 16
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)])
