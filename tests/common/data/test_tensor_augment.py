"""RandAugment as tensor operations is Pillow's: operation by operation, at every strength, and of a whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import AugmentOp

from common.data.augment import AugmentConfig, policy_operations, train_transform
from common.data.tensor_augment import rand_augment
from common.data.views import by_pillow, drawing_transform, rand_operations, random_view

WIDTH, HEIGHT = 40, 34


def pictures() -> torch.Tensor:
    """Parts of photographs, one of few values, one of a single colour and one of noise: (n, 3, 34, 40) uint8."""
    photos = [Image.fromarray(photo).resize((WIDTH, HEIGHT)) for photo in load_sample_images().images]
    images = [
        *photos,
        photos[0].point(lambda value: value // 4 + 60),
        Image.new("RGB", (WIDTH, HEIGHT), (5, 200, 77)),
    ]
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in [*images, noise]])


def policy(
    interpolation: str, increasing: str
) -> tuple[AugmentConfig, dict[str, AugmentOp], tuple[int, int, int]]:
    augment = AugmentConfig(size=WIDTH, auto=f"rand-m9{increasing}", interpolation=interpolation)  # type: ignore[arg-type]
    operations = {operation.name: operation for operation in policy_operations(train_transform(augment))}
    return augment, operations, next(iter(operations.values())).kwargs["fillcolor"]


@pytest.mark.parametrize("increasing", ["", "-inc1"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_operation_at_every_strength(interpolation: str, increasing: str) -> None:
    """Equal, but for one value in ten thousand that is 1 off: sines differ in their last bit."""
    images, (augment, operations, fill) = pictures(), policy(interpolation, increasing)
    known = rand_operations(augment)
    assert len(operations) == 15
    for name, operation in operations.items():
        for strength in range(11):
            level = operation.level_fn
            drawn = [level(strength, operation.hparams) if level else () for _ in images]
            made = rand_augment(
                images, [((name, arguments),) for arguments in drawn], fill, interpolation == "bicubic"
            )
            wanted = [by_pillow(image, (), ((name, a),), known) for image, a in zip(images, drawn)]
            off = (made.int() - torch.stack(wanted).int()).abs()
            assert off.max() <= 1, (name, strength)
            assert off.float().mean() <= 1e-4, (name, strength)


def test_a_batch_of_which_each_image_has_operations_of_its_own() -> None:
    augment = AugmentConfig(size=WIDTH, auto="rand-m9-n4-mstd0.5-inc1", scale=(1, 1))
    transform, known = drawing_transform(augment), rand_operations(augment)
    torch.manual_seed(0)
    images = pictures().repeat(8, 1, 1, 1)
    chosen = [random_view(transform, WIDTH, HEIGHT, WIDTH).operations for _ in images]
    assert len({name for operations in chosen for name, _ in operations}) == 15
    before = images.clone()
    made = rand_augment(images, chosen, (124, 116, 104), cubic=False)
    assert torch.equal(images, before), "what is given stays as it is"
    wanted = torch.stack(
        [by_pillow(image, (), operations, known) for image, operations in zip(images, chosen)]
    )
    equal = (made == wanted).flatten(1).all(1)
    assert equal.float().mean() > 0.9
    assert not torch.equal(wanted, images)
    few = (made != wanted).flatten(1).float().mean(1)
    assert few.max() < 0.05, "one value off, which steep operations may spread"
    assert torch.equal(rand_augment(images, [()] * len(images), (0, 0, 0), False), images)
