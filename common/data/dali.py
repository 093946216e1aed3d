"""Images decoded, cropped and resized by NVIDIA DALI, in the order and with the draws of the torch backend.

Worker processes read, look at each header and draw the augmentation; what travels is the encoded image and its
:class:`View`. DALI has no order, no random numbers and no state of its own, so that a run resumes as any other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from common.data.augment import AugmentConfig, seeded
from common.data.decode import decode_rgb
from common.data.images import ImageSet
from common.data.jpeg import plain_jpeg
from common.data.loader import FILLER, Batch, Draws, Finish, LoaderConfig, Row, Unreadable, load_rows
from common.data.order import Draw
from common.data.source import Source
from common.data.tensor_augment import Operations, change_colours, rand_augment
from common.data.views import (
    View,
    by_pillow,
    central_view,
    drawing_transform,
    rand_operations,
    random_view,
    refuse_unknown,
)
from common.errors import ConfigError

# Read when DALI is loaded: small pieces of memory come from a pool of its own. Between them the C library could not
# keep together what large ones leave, and would ask the system for new pages for every batch.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")


class Encoded(NamedTuple):
    """An encoded image and what becomes of it."""

    data: bytes
    view: View


class Packed(NamedTuple):
    """A batch of encoded images as it comes from a worker process; few tensors, since each needs an open file."""

    data: Tensor
    """All encoded images, one behind the other, uint8."""
    ends: np.ndarray
    """(n,) where in ``data`` each ends."""
    windows: np.ndarray
    """(n, 4) int32: top, left, height, width."""
    places: np.ndarray
    """(n, 4) int32: height and width of the resized window, top and left of the network's input in it."""
    flips: np.ndarray
    """(n,) int32."""
    factors: np.ndarray
    """(n, 3, 2) float32; see :func:`change_colours`."""
    operations: list[Operations]
    """RandAugment's, of each image."""
    erased: list[tuple[int, int, int, int, int]]
    """Of each erased rectangle: which image, top, left, height, width."""
    noise: Tensor
    """What the rectangles are filled with, (3, height, width) of each, one behind the other, float32."""
    targets: Tensor
    unreadable: list[Unreadable]


@dataclass
class DaliSet(ImageSet):
    """One split of an image data set, for DALI; see :class:`common.data.loader.BatchMaker`."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    device: str = "cpu"
    trust: bool = True
    """Leave to DALI what looks like a plain JPEG; else Pillow decodes all."""

    def inputs(self, data: bytes, where: str, draw: Draw) -> Encoded:
        """The encoded image and its view. What is no plain JPEG is decoded here, as by the torch backend."""
        shape = plain_jpeg(data) if self.trust else None
        if shape:
            return Encoded(data, self._view(shape, draw))
        image = decode_rgb(data, where)
        view = self._view(image.size, draw)
        top, left, height, width = view.window
        pixels = image.crop((left, top, left + width, top + height)).tobytes()
        return Encoded(_pixmap(pixels, width, height), view._replace(window=(0, 0, height, width)))

    def _view(self, shape: tuple[int, int], draw: Draw) -> View:
        if not self.training:
            return central_view(*shape, self.augment)
        with seeded(self.seed, draw):
            return random_view(self.transform, *shape, self.size)

    def filler(self) -> Row:
        """A row that only fills up a batch."""
        return Row(Encoded(_pixmap(bytes(3), 1, 1), View((0, 0, 1, 1), (self.size, self.size))), FILLER)

    def batches(
        self, draws: Draws, config: LoaderConfig, device: torch.device, finish: Finish
    ) -> Iterator[Batch]:
        """The batches of ``draws`` on ``device``; while one is used, the next is finished and DALI decodes another."""
        if self.training:
            refuse_unknown(self.augment)
        decoder = Decoder(self, max(1, config.processes), device)
        with ThreadPoolExecutor(1) as background:
            last: tuple[Future[Tensor], Packed] | None = None
            for decoded, packed in self._decoded(decoder, draws, config):
                this = background.submit(decoder.images, decoded, packed), packed
                if last:
                    yield _batch(last[0].result(), last[1], device, finish)
                last = this
            if last:
                yield _batch(last[0].result(), last[1], device, finish)

    def _decoded(self, decoder: Decoder, draws: Draws, config: LoaderConfig) -> Iterator[tuple[Any, Packed]]:
        ahead, behind = tee(draws)
        for packed, drawn in zip(load_rows(self, ahead, config, pack), behind):
            last = decoder.wait() if decoder.busy else None
            decoder.start(packed, drawn)
            if last:
                yield last
        if decoder.busy:
            yield decoder.wait()


class Decoder:
    """DALI's pipeline: a :class:`Packed` batch in, images (n, 3, size, size) uint8 out.

    On the GPU DALI crops, resizes and flips what it decodes, and torch does the rest. On the CPU DALI decodes the crop,
    torch resizes it in a tenth of the time that DALI takes, and Pillow does the rest.

    Args:
        threads: that work on the CPU.
        device: where images are wanted; with ``data.device`` = gpu they are made there.

    Raises:
        ConfigError: they cannot be made there.
    """

    def __init__(self, data: DaliSet, threads: int, device: torch.device) -> None:
        if data.device == "gpu" and device.type != "cuda":
            raise ConfigError(f"data.device = gpu: this process computes on {device}; use --data.device cpu")
        self.data, self.threads = data, threads
        self.gpu = device if data.device == "gpu" else None
        self.fused = self.gpu is not None
        self.pool = ThreadPoolExecutor(threads)
        self.operations = rand_operations(data.augment) if data.training else {}
        self.pipe: Any = None
        self.room = 0
        self.warned = False
        self.busy: tuple[Packed, Sequence[Draw | None]] | None = None

    def start(self, packed: Packed, draws: Sequence[Draw | None]) -> None:
        """Begin with the batch of ``draws``; returns at once."""
        if len(packed.ends) > self.room:
            self.room = len(packed.ends)
            self.pipe = self._pipeline()
        self.pipe.feed_input("data", np.split(packed.data.numpy(), packed.ends[:-1]))
        corner, shape = np.hsplit(packed.windows, 2)
        self.pipe.feed_input("corner", corner.copy())
        self.pipe.feed_input("shape", shape.copy())
        if self.fused:
            resized, start = np.hsplit(packed.places, 2)
            for name, place in (("start", start), ("end", start + self.data.size)):
                self.pipe.feed_input(name, (place * shape / resized).astype(np.float32))
            self.pipe.feed_input("flip", packed.flips)
        self.pipe.schedule_run()
        self.busy = packed, draws

    def wait(self) -> tuple[Any, Packed]:
        """What DALI made of the batch begun last, for :meth:`images`, and that batch.

        DALI gives up a whole batch for one damaged image. Then all its images are decoded by Pillow, which names
        the damaged ones, as in the torch backend.
        """
        assert self.busy
        packed, draws = self.busy
        try:
            return self._outputs(), packed
        except RuntimeError as error:
            self._warn(error)
        strict = replace(self.data, trust=False)
        packed = pack([strict.filler() if draw is None else strict.row(draw) for draw in draws])
        self.room = 0  # a pipeline that has failed is of no more use
        self.start(packed, draws)
        return self._outputs(), packed

    def images(self, decoded: Any, packed: Packed) -> Tensor:
        """(n, 3, size, size) uint8."""
        if self.fused:
            return self._changed(torch.from_dlpack(decoded.as_tensor()), packed)
        images = torch.empty(len(decoded), 3, self.data.size, self.data.size, dtype=torch.uint8)

        def fill(places: range) -> None:
            for place in places:
                image = self._resize(torch.from_dlpack(decoded[place]), packed, place)
                factors = packed.factors[place].tolist()
                images[place] = by_pillow(image, factors, packed.operations[place], self.operations)

        # A call for each thread, not for each image, which would cost as much as a crop.
        list(self.pool.map(fill, [range(first, len(images), self.threads) for first in range(self.threads)]))
        return images

    def _outputs(self) -> Any:
        self.busy = None
        (decoded,) = self.pipe.share_outputs(torch.cuda.current_stream(self.gpu) if self.gpu else None)
        self.pipe.release_outputs()  # what was made keeps its memory
        return decoded

    def _changed(self, images: Tensor, packed: Packed) -> Tensor:
        augment = self.data.augment
        if (packed.factors[..., 1] != 1).any():
            images = change_colours(images, torch.from_numpy(packed.factors).to(images.device))
        if any(packed.operations):
            red, green, blue = (min(255, round(255 * mean)) for mean in augment.mean)  # as timm fills
            cubic = augment.interpolation == "bicubic"
            images = rand_augment(images, packed.operations, (red, green, blue), cubic)
        return images

    def _resize(self, window: Tensor, packed: Packed, place: int) -> Tensor:
        height, width, top, left = packed.places[place].tolist()
        mode, size = self.data.augment.interpolation, self.data.size
        image = window.permute(2, 0, 1)
        if image.shape[1:] != (height, width):
            image = interpolate(image[None], (height, width), mode=mode, antialias=True)[0]
        image = image[:, top : top + size, left : left + size]
        return image.flip(-1) if packed.flips[place] else image

    def _warn(self, error: RuntimeError) -> None:
        if not self.warned:
            reason = " ".join(str(error).split())[:300]
            print(f"warning: DALI gave up a batch, which Pillow decodes: {reason}", file=sys.stderr)
        self.warned = True

    def _pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        number = torch.empty(0, device=self.gpu).get_device() if self.gpu else None
        pipe = Pipeline(self.room, self.threads, number, exec_dynamic=True, prefetch_queue_depth=1)

        def take(name: str, dtype: Any, ndim: int = 1) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        with pipe:
            images = fn.decoders.image_slice(
                take("data", types.UINT8),
                take("corner", types.INT32),
                take("shape", types.INT32),
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as on the CPU
                output_type=types.RGB,
                device="cpu" if self.gpu is None else "mixed",
            )
            if self.fused:
                cubic = self.data.augment.interpolation == "bicubic"
                images = fn.resize(
                    images,
                    size=(self.data.size, self.data.size),
                    roi_start=take("start", types.FLOAT),
                    roi_end=take("end", types.FLOAT),
                    interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
                    antialias=True,
                )
                images = fn.crop_mirror_normalize(
                    images, mirror=take("flip", types.INT32, 0), dtype=types.UINT8, output_layout="CHW"
                )
            pipe.set_outputs(images)
        pipe.build()
        return pipe


def open_dali(source: Source, device: str, augment: AugmentConfig, training: bool, seed: int) -> DaliSet:
    """A split for DALI.

    Raises:
        ConfigError: there is no DALI, or no GPU that ``device`` asks for.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"data.backend = dali: NVIDIA DALI cannot be imported ({error}): "
            f"pip install nvidia-dali-cuda130, or --data.backend torch"
        ) from None
    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("data.device = gpu: there is no GPU; use --data.device cpu")
    transform = drawing_transform(augment)
    return DaliSet(source, transform, seed, augment.size, training, augment=augment, device=device)


def pack(rows: list[Row]) -> Packed:
    """Rows of :class:`Encoded` images as a batch."""
    data, views = zip(*(row.inputs for row in rows))
    patches = [(place, *view.patch) for place, view in enumerate(views) if view.patch]
    return Packed(
        data=torch.frombuffer(bytearray().join(data), dtype=torch.uint8),
        ends=np.cumsum([len(image) for image in data]),
        windows=np.array([view.window for view in views], np.int32),
        places=np.array([view.resized + view.corner for view in views], np.int32),
        flips=np.array([view.flip for view in views], np.int32),
        factors=np.array([view.factors for view in views], np.float32),
        operations=[view.operations for view in views],
        erased=[(place, top, left, *pixels.shape[1:]) for place, top, left, pixels in patches],
        noise=torch.cat([torch.empty(0), *(pixels.flatten() for *_, pixels in patches)]),
        targets=torch.tensor([row.target for row in rows]),
        unreadable=[bad for row in rows for bad in row.unreadable],
    )


def _batch(images: Tensor, packed: Packed, device: torch.device, finish: Finish) -> Batch:
    images = finish(images.to(device, non_blocking=True))
    sizes = [3 * height * width for *_, height, width in packed.erased]
    for (place, top, left, height, width), noise in zip(packed.erased, packed.noise.to(device).split(sizes)):
        images[place, :, top : top + height, left : left + width] = noise.view(3, height, width)
    return Batch(images, packed.targets.to(device, non_blocking=True), packed.unreadable)


def _pixmap(pixels: bytes, width: int, height: int) -> bytes:
    """8-bit RGB pixels as an image file without compression."""
    return b"P6 %d %d 255\n" % (width, height) + pixels
