"""The processes of a run as writers of one checkpoint: each does its share, and all learn whether all could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; by default alone."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    """Every rank's value, by rank, on every rank. All ranks call this, in one thread each, equally often."""

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` on every rank; what came of it, by rank. All ranks call this.

        Raises:
            OSError: on all ranks, if it failed on one, which is named.
        """
        result, failure, bug = None, None, None
        try:
            result = work()
        except OSError as error:
            failure = error.strerror or str(error)
        except Exception as error:  # the others wait to hear of it
            failure, bug = f"{type(error).__name__}: {error}", error
        outcomes = self.gather((result, failure))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise OSError(0, f"{failed} (rank {rank})" if self.world > 1 else failed) from bug
        return [done for done, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0; what came of it, on all. All ranks call this; raises as :meth:`each`."""
        return self.each(work if self.rank == 0 else lambda: None)[0]  # type: ignore[return-value]


def all_ranks(timeout_minutes: float) -> Ranks:
    """The processes of this run, joined by a group of their own, so that a thread may use it. All ranks call this.

    Args:
        timeout_minutes: the longest wait for another rank.
    """
    if not dist.is_initialized():
        return Ranks()
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
        return values

    return Ranks(dist.get_rank(), dist.get_world_size(), gather)
