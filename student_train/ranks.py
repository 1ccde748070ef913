"""The processes of one run talking about plain numbers, on the CPU: nothing here waits for a device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from store.errors import StoreError

T = TypeVar("T")


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
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], _Bad):
            raise answer[0].error
        return answer[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, element by element, in double precision."""
        if self._group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        summed: list[float] = total.tolist()
        return summed

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._group is not None:
            dist.barrier(group=self._group)
