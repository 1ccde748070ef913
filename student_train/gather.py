"""Rows of all ranks side by side, for losses that compare the rows of a batch with each other.

Every function here is a collective: all ranks call it, in the same order, or none. ``training`` says whether they train
together; what is measured runs on one rank alone and sees its own rows.

The trainer multiplies each rank's loss by their number, because DDP averages gradients. So a rank's loss is over its own
rows as anchors and all rows as counterparts, and the gradients of counterparts travel back to the rank that has them.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from online.ranks import talking

_groups: dict[str, dist.ProcessGroup | None] = {}
"""Process groups of our own, by backend."""


def together(training: bool) -> bool:
    """Whether there are other ranks to gather from."""
    return training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(x: Tensor, training: bool) -> Tensor:
    """[sum of B over ranks, ...]: the rows ``x`` [B, ...] of all ranks, in their order; differentiable.

    Ranks may hold different numbers of rows; the other sizes must agree (``longest`` helps).
    """
    if not together(training):
        return x
    gathered_x: Tensor = _Gather.apply(x, _rows(x))
    return gathered_x


def own(x: Tensor, training: bool) -> slice:
    """Where this rank's rows ``x`` stand among the gathered ones."""
    if not together(training):
        return slice(0, len(x))
    rows, rank = _rows(x), dist.get_rank()
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def summed(x: Tensor, training: bool) -> Tensor:
    """The sum of ``x`` over ranks, without gradient."""
    total = x.detach().clone()
    if together(training):
        with talking():
            dist.all_reduce(total, group=_group())
    return total


def longest(length: int, training: bool) -> int:
    """The largest ``length`` of all ranks, to pad rows to before they are gathered."""
    if not together(training):
        return length
    most = torch.tensor(length)
    with talking():
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=_group("gloo"))
    return int(most)


def _group(backend: str = "") -> dist.ProcessGroup | None:
    """A process group of its own: DDP's reductions, which start by themselves in the backward pass, never mix with these.

    Made at the first use, which all ranks reach together.
    """
    if backend not in _groups:
        _groups[backend] = dist.new_group(backend=backend or None)
    return _groups[backend]


def _rows(x: Tensor) -> list[int]:
    """Rows of each rank."""
    rows = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    rows[dist.get_rank()] = len(x)
    with talking():
        dist.all_reduce(rows, group=_group("gloo"))
    found: list[int] = rows.tolist()
    return found


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums what all ranks made of these rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        most = max(rows)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in rows]
        with talking():
            dist.all_gather(parts, padded, group=_group())
        return torch.cat([part[:number] for part, number in zip(parts, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        with talking():
            dist.all_reduce(total, group=_group())
        rank, rows = dist.get_rank(), ctx.rows  # type: ignore[attr-defined]
        start = sum(rows[:rank])
        return total[start : start + rows[rank]], None
