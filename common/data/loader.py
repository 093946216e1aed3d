"""Batches on the device: worker processes decode and augment, the main process only moves tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common.data.order import Division, Draw, Order, evaluation_batches, micro_batches
from common.data.workers import end_with_parent, start_server
from common.errors import UserError

FILLER = -1
"""Target of a row that only fills up an evaluation batch."""
UNREADABLE = -2
"""Target of an evaluation sample that cannot be read: it counts as wrong."""


class Unreadable(NamedTuple):
    """A sample that could not be read."""

    where: str
    reason: str
    detail: str
    shard: str = ""
    """The file with many samples, or the class folder, that it is in."""


class Row(NamedTuple):
    """One sample, ready for a batch."""

    inputs: Any
    """A tensor; anything else of a :class:`BatchMaker`."""
    target: int
    unreadable: tuple[Unreadable, ...] = ()


@dataclass
class Batch:
    """What a step sees, on the device."""

    inputs: Tensor
    """(n, …) float32."""
    targets: Tensor
    """(n,) int64 class indices; in evaluation also FILLER and UNREADABLE."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """The samples that could not be read; in training the rows hold their replacements."""


class DrawDataset(Protocol):
    """A data set that makes the row of a draw; the row is a function of the draw alone."""

    def row(self, draw: Draw) -> Row: ...

    def filler(self) -> Row: ...


@dataclass
class LoaderConfig:
    """How batches are made."""

    workers: int = -1
    """Processes that decode and augment (for DALI read and draw, with as many threads that decode); 0 does it in the
    main process, -1 is one per core but one, 8 at most."""
    prefetch: int = 4
    """Batches that each worker keeps ready."""

    def __post_init__(self) -> None:
        if self.workers < -1:
            raise ValueError(f"workers = {self.workers}: expected -1 (automatic), 0 or more")
        if self.prefetch < 1:
            raise ValueError(f"prefetch = {self.prefetch}: expected at least 1")

    @property
    def processes(self) -> int:
        """The number of worker processes."""
        return self.workers if self.workers >= 0 else min(8, max(1, len(os.sched_getaffinity(0)) - 1))


Draws = Iterator[Sequence[Draw | None]]
Finish = Callable[[Tensor], Tensor]


@runtime_checkable
class BatchMaker(Protocol):
    """A data set whose rows are no tensors yet: it makes the batches of them itself."""

    def batches(
        self, draws: Draws, config: LoaderConfig, device: torch.device, finish: Finish
    ) -> Iterator[Batch]: ...


class _Rows(Dataset):
    def __init__(self, data: DrawDataset) -> None:
        self.data = data

    def __getitem__(self, draw: Draw | None) -> Row | UserError:
        try:
            return self.data.filler() if draw is None else self.data.row(draw)
        except UserError as error:  # raised in a worker, it would arrive as its traceback
            return error


def train_batches(
    data: DrawDataset,
    order: Order,
    division: Division,
    steps: int,
    config: LoaderConfig,
    device: torch.device,
    finish: Finish,
) -> Callable[[int], Iterator[Batch]]:
    """A function that gives this process's micro-batches from any step on, up to ``steps``.

    One loader serves the whole run: workers live through the epochs, and the step is all there is to resume.

    Args:
        finish: applied to the inputs on the device (normalisation).
    """
    if config.processes:
        start_server()  # it is ready by the time the model is

    def start(step: int) -> Iterator[Batch]:
        draws = micro_batches(order, division, step, steps)
        return _batches(data, draws, config, device, finish)

    return start


def evaluation_loader(
    data: DrawDataset,
    samples: int,
    batch_size: int,
    world: int,
    rank: int,
    config: LoaderConfig,
    device: torch.device,
    finish: Finish,
) -> Callable[[], Iterator[Batch]]:
    """A function that gives this process's part of the evaluation set: equally many batches on every rank."""

    def start() -> Iterator[Batch]:
        return _batches(data, evaluation_batches(samples, batch_size, world, rank), config, device, finish)

    return start


def _batches(
    data: DrawDataset,
    draws: Draws,
    config: LoaderConfig,
    device: torch.device,
    finish: Finish,
) -> Iterator[Batch]:
    if isinstance(data, BatchMaker):
        yield from data.batches(draws, config, device, finish)
        return
    loaded = load_rows(data, draws, config, _collate, device.type == "cuda")
    for inputs, targets, unreadable in _copied_ahead(loaded, device) if device.type == "cuda" else loaded:
        yield Batch(finish(inputs.to(device)), targets.to(device), unreadable)


def _copied_ahead(loaded: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """What is ``loaded``, on the GPU: while one batch is used, a stream of its own copies the next."""
    stream, last = torch.cuda.Stream(device), None
    for *tensors, unreadable in loaded:
        with torch.cuda.stream(stream):
            copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
            there = stream.record_event()
        if last:
            yield _once_there(*last, device)
        last = copies, unreadable, there
    if last:
        yield _once_there(*last, device)


def _once_there(
    copies: list[Tensor], unreadable: Any, there: torch.cuda.Event, device: torch.device
) -> tuple:
    """The copies, for the current stream, which waits for them; the host does not."""
    current = torch.cuda.current_stream(device)
    current.wait_event(there)
    for copy in copies:
        copy.record_stream(current)  # their memory is not the other stream's to take until this one is done
    return *copies, unreadable


def load_rows(
    data: DrawDataset,
    draws: Draws,
    config: LoaderConfig,
    collate: Callable[[list[Row]], Any],
    pin: bool = False,
) -> Iterator[Any]:
    """The rows of each list of draws, made by worker processes and put together by ``collate``.

    Raises:
        UserError: a worker met it.
    """
    loader: DataLoader = DataLoader(
        _Rows(data),
        batch_sampler=_Plan(draws),  # type: ignore[arg-type]
        num_workers=config.processes,
        prefetch_factor=config.prefetch if config.processes else None,
        collate_fn=partial(_collate_or_error, collate),
        pin_memory=pin,
        worker_init_fn=end_with_parent,
        multiprocessing_context=start_server() if config.processes else None,
        generator=torch.Generator(),  # its own, so that starting workers draws nothing from the global one
    )
    for collated in loader:
        if isinstance(collated, UserError):
            raise collated
        yield collated


class _Plan:
    """A batch sampler that is walked once."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[Sequence[Draw | None]]:
        return self.draws


def _collate_or_error(collate: Callable[[list[Row]], Any], found: list[Row | UserError]) -> Any:
    errors = [row for row in found if isinstance(row, UserError)]
    return errors[0] if errors else collate(cast("list[Row]", found))


def _collate(rows: list[Row]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    inputs = default_collate([row.inputs for row in rows])  # in a worker straight into shared memory
    targets = torch.tensor([row.target for row in rows])
    return inputs, targets, [bad for row in rows for bad in row.unreadable]
