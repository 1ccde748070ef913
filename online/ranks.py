"""The processes of one run talking about plain numbers, on the CPU: nothing here waits for a device."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from store.errors import StoreError

T = TypeVar("T")


class RankLost(StoreError):
    """Another process of the run does not answer any more."""


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Raise RankLost where ranks that talk to each other inside fail because one of them is gone, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:  # gloo has no types of its own
        if not isinstance(error, dist.DistError) and not _SIGNS.search(str(error)):
            raise
        why = _PLACE.sub("", str(error).splitlines()[0]).partition(". ")[0]
        raise RankLost(f"another rank of this run is gone or does not answer ({why}); start the same command again") from error


_PLACE = re.compile(r"^\[[^]]*\]\s*")
"""Where in gloo's source an error was raised."""
_SIGNS = re.compile(r"gloo|nccl|connection (?:closed|reset|refused)|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class _Bad:
    error: Exception


class Ranks:
    """All processes of a run, or the one that it has; made after torch.distributed is set up.

    Args:
        timeout: seconds that ranks wait for each other, while the first one evaluates for instance.
    """

    def __init__(self, timeout: float) -> None:
        together = dist.is_available() and dist.is_initialized()
        self._group = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo") if together else None
        self.number = dist.get_rank() if self._group is not None else 0
        self.count = dist.get_world_size() if self._group is not None else 1

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on all ranks; an error that names bad input is raised on all of them."""
        if self._group is None:
            return function()
        answer: list[T | _Bad] = []
        if self.number == 0:
            try:
                answer.append(function())
            except (ValueError, StoreError) as error:
                answer.append(_Bad(error))
        else:
            answer.append(_Bad(AssertionError("no answer")))
        with talking():
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], _Bad):
            raise answer[0].error
        return answer[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, element by element, in double precision."""
        if self._group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with talking():
            dist.all_reduce(total, group=self._group)
        summed: list[float] = total.tolist()
        return summed

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest over ranks, element by element."""
        if self._group is None:
            return list(values)
        most = torch.tensor(values, dtype=torch.int64)
        with talking():
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        found: list[int] = most.tolist()
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._group is not None:
            with talking():
                dist.barrier(group=self._group)
