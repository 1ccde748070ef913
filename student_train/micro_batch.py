"""What one forward pass reads: rows of one source with their stored features.

A loader process reads them straight into shared memory, one piece for all arrays of an item: the training process gets
the piece (student_train.lending), and no byte is copied or sent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch
from online.teacher import Fetched
from store.features import FeatureKey
from store.reader import Allocate
from student_train.lending import HEAD, borrowed, lend

Arrays = list[NDArray[Any]]
Name = str | tuple[FeatureKey, str]
"""A tensor of the batch, or an array of a feature."""

_ALIGNED = 64
"""Arrays start at multiples of this many bytes: of other places, products may differ in the last bit."""


class Place(NamedTuple):
    """Where an array lies in a piece of memory."""

    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Parcel:
    """Arrays by name, side by side."""

    memory: NDArray[np.uint8]
    places: dict[Name, Place]
    piece: Tensor | None = None
    """The memory, where this process has lent it to another."""

    def arrays(self) -> dict[Name, NDArray[Any]]:
        """Views of the memory, which they keep alive."""
        found: dict[Name, NDArray[Any]] = {}
        for name, place in self.places.items():
            found[name] = self.memory[place.start : place.start + place.size].view(place.dtype).reshape(place.shape)
        return found

    def pinned(self) -> "Parcel":
        """A copy in page-locked memory."""
        return Parcel(_pinned(self.memory[: max(place.start + place.size for place in self.places.values())]), self.places)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one source with the stored arrays of their features."""

    source: int
    """Number of the source in ``MicroBatches.sources``."""
    taught: bool
    """Whether the source has a teacher."""
    batch: Batch
    fetched: Fetched
    parcel: Parcel | None = None
    """What ``batch`` and ``fetched`` are views of, where a loader process made them."""
    meta: "MicroBatch | None" = None
    """Held-out rows that go with it, where the phase has such data."""

    @classmethod
    def of(cls, source: int, taught: bool, parcel: Parcel) -> Self:
        """The micro-batch whose arrays are in ``parcel``."""
        arrays, fetched = parcel.arrays(), Fetched()
        for name, array in arrays.items():
            if not isinstance(name, str):
                fetched.setdefault(name[0], {})[name[1]] = array
        tensors: dict[str, Any] = {field.name: None for field in fields(Batch)}
        tensors |= {name: torch.from_numpy(array) for name, array in arrays.items() if isinstance(name, str)}
        return cls(source, taught, Batch(**tensors), fetched, parcel)

    @classmethod
    def lent(cls, source: int, taught: bool, batch: Batch, fetch: Callable[[Allocate], Fetched]) -> Self:
        """``batch`` and what ``fetch`` reads into memory that it asks for, in memory that is lent to the training process."""
        tensors = {field.name: value for field in fields(Batch) if (value := getattr(batch, field.name)) is not None}
        names: list[Name] = list(tensors)
        own = [value.numpy() for value in tensors.values()]

        def read(allocate: Allocate) -> Arrays:
            fetched = fetch(allocate)
            names.extend((key, name) for key, arrays in fetched.items() for name in arrays)
            return [array for arrays in fetched.values() for array in arrays.values()]

        piece, places = packed(own, read)
        return cls.of(source, taught, Parcel(piece.numpy(), dict(zip(names, places, strict=True)), piece))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.parcel is None or self.parcel.piece is None:
            return MicroBatch, (self.source, self.taught, self.batch, self.fetched, None, self.meta)
        return _received, (self.source, self.taught, self.parcel.piece, self.parcel.places, self.meta)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on ``device``; the arrays stay, the teacher moves what it needs."""
        return replace(self, batch=self.batch.to(device), meta=None if self.meta is None else self.meta.to(device))

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory; a data loader calls it."""
        meta = None if self.meta is None else self.meta.pin_memory()
        if self.parcel is not None:
            return replace(MicroBatch.of(self.source, self.taught, self.parcel.pinned()), meta=meta)
        given = {field.name: getattr(self.batch, field.name) for field in fields(Batch)}
        tensors: dict[str, Any] = {name: None if value is None else value.pin_memory() for name, value in given.items()}
        fetched = {key: {name: _pinned(array) for name, array in arrays.items()} for key, arrays in self.fetched.items()}
        return replace(self, batch=Batch(**tensors), fetched=fetched, meta=meta)


def packed(own: Sequence[NDArray[Any]], read: Callable[[Allocate], Arrays]) -> tuple[Tensor, list[Place]]:
    """Copies of ``own`` and the arrays that ``read`` gives in a piece of memory that is lent, and their places in it.

    What ``read`` puts into memory that it asks for is not copied again; where it asks twice, it starts over.
    """
    own = list(own)
    start, piece = HEAD, None

    def allocate(size: int) -> NDArray[np.uint8]:
        nonlocal piece, start
        start = HEAD + -(-size // _ALIGNED) * _ALIGNED
        if piece is None:
            piece = lend(start + sum(map(_room, own)))
        given: NDArray[np.uint8] = piece.numpy()[HEAD : HEAD + size]
        return given

    arrays = read(allocate)
    if piece is None:
        own, arrays = own + arrays, []
        piece = lend(HEAD + sum(map(_room, own)))
    memory, places = piece.numpy(), []
    for array in own:
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        places.append(Place(start, array.dtype.str, array.shape))
        start += _room(array)
    for array in arrays:
        places.append(Place(array.__array_interface__["data"][0] - piece.data_ptr(), array.dtype.str, array.shape))
    return piece, places


def _received(source: int, taught: bool, piece: Tensor, places: dict[Name, Place], meta: MicroBatch | None) -> MicroBatch:
    return replace(MicroBatch.of(source, taught, Parcel(borrowed(piece), places)), meta=meta)


def _room(array: NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNED) * _ALIGNED


def _pinned(array: NDArray[Any]) -> NDArray[Any]:
    return torch.from_numpy(array).pin_memory().numpy()
