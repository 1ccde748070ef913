"""Bytes of the tensors that a piece of work makes, counted as it runs; tensors without data will do."""

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online.batch import IGNORED, Batch

_COPIES = frozenset({torch.ops.aten.logsumexp.default})
"""Operations that work in a copy of their argument, which only the real ones make."""


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that are made under this context and not yet dropped: ``now``, and the most there were at once, ``peak``."""

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:  # whether words are equally likely: they are not
            return False
        made = func(*args, **(kwargs or {}))
        if func in _COPIES:
            argument = args[0]
            assert isinstance(argument, Tensor)
            self.peak = max(self.peak, self.now + argument.nbytes)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or written in place
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def blank_batch(rows: int, tokens: int, labelled: int, paired: bool = False) -> Batch:
    """``rows`` of ``tokens`` tokens each without padding, with ``labelled`` labelled ones in all; ``paired`` for an intervention."""
    ids, number = torch.zeros(rows, tokens, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    batch = Batch(
        rows=number,
        input_ids=ids,
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        segments=None,
        documents=None,
        position_ids=None,
        token_labels=torch.full_like(ids, IGNORED) if labelled else None,
        row_labels=None,
        groups=number,
        interchange=ids if paired else None,
        draws=number if paired else None,
    )
    # How many there are would have to be read from tensors without data.
    vars(batch).update(
        padded_behind=True, real=torch.zeros(rows * tokens, dtype=torch.int64), scored=torch.zeros(labelled, dtype=torch.int64)
    )
    return batch
