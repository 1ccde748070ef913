"""Shared memory that loader processes fill and the training process reads, used again and again.

To make and map a fresh piece for each item costs many times the copy that it saves: every page is zeroed, entered and
removed in two processes. So a loader process keeps its pieces. The first byte of one says whether it is lent; the
training process clears it when the last array in the piece is gone, and remembers where the piece is mapped.
"""

import os
import weakref
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HEAD = 64
"""Bytes in front of what is lent, so that it is aligned."""

KEPT = 256
"""Pieces that the training process keeps mapped."""

_GRAIN = 1 << 20

_own: list[Tensor] = []
_mapped: OrderedDict[int, Tensor] = OrderedDict()


def lend(size: int) -> Tensor:
    """[size or more] uint8 that other processes can map, HEAD of them taken; lent again when :func:`borrowed` has given it back."""
    free = [piece for piece in _own if not piece.numpy()[0]]
    piece = next((piece for piece in free if len(piece) >= size), None)
    if piece is None:
        _own[:] = [lent for lent in _own if lent.numpy()[0]]  # the others are too small
        room = -(-(size + size // 4) // _GRAIN) * _GRAIN  # the next item may be larger
        piece = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(room))
        _own.append(piece)
    piece.numpy()[0] = 1
    return piece


def borrowed(piece: Tensor) -> NDArray[np.uint8]:
    """The bytes of a piece that another process has lent; it gets it back when they and all views of them are gone."""
    place = piece.data_ptr()
    _mapped[place] = piece
    _mapped.move_to_end(place)
    if len(_mapped) > KEPT:
        _mapped.popitem(last=False)
    view: NDArray[np.uint8] = piece.numpy()  # a new array each time, and the one that all views of it refer to
    weakref.finalize(view, _give_back, piece, os.getpid()).atexit = False
    return view


def forget() -> None:
    """Unmap what is not in use."""
    _mapped.clear()


def _give_back(piece: Tensor, reader: int) -> None:
    if os.getpid() == reader:  # a process that was forked meanwhile has no say
        piece.numpy()[0] = 0
