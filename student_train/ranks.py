"""The processes of one run talking about plain numbers, on the CPU: nothing here waits for a device."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed as dist

from store.errors import StoreError

T = TypeVar("T")


class Ranks:
    """All processes of a run, or the one that it has; make it after torch.distributed is set up."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self.number = dist.get_rank() if self._group is not None else 0
        self.count = dist.get_world_size() if self._group is not None else 1

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on all ranks; an error that names bad input is raised on all of them."""
        if self._group is None:
            return function()
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.number == 0:
            try:
                answer = [(function(), None)]
            except (ValueError, StoreError) as error:
                answer = [(None, error)]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        value, error = answer[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

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
