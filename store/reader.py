"""A store as its readers see it: committed features, copied once from memory-mapped files into packed arrays.

Shapes: n rows that are asked for, U their units (tokens, labelled tokens or rows), W width.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from store import commits, layout
from store.commits import Commit
from store.errors import MissingFeature
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import Manifest, read_manifest
from store.opened import SlotFile
from store.shards import Seal, Shard, numpy_dtype
from store.statics import read_static
from store.table import Ints, Numbers, RowTable

Arrays = dict[str, NDArray[Any]]
"""The stored arrays of one feature by name, packed [U, W]; bfloat16 as uint16."""

Allocate = Callable[[int], NDArray[np.uint8]]
"""Gives so many bytes to write into."""

_ALIGNED = 64
"""Arrays in one buffer start at multiples of this many bytes."""


class Store:
    """Read-only view of a store as committed when it was opened. Safe to pickle and to fork, but not for
    several threads at once."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.rows = RowTable(path, manifest.rows)
        self._specs = {(name, spec.feature): spec for name, info in manifest.passes.items() for spec in info.features}

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store in folder ``path``.

        Raises:
            StoreError: there is none, its rows are unfinished, or it is of another schema.
        """
        return cls(path, read_manifest(path))

    def committed(self, pass_name: str) -> dict[int, Commit]:
        """Shard -> what was committed for it."""
        return {shard: commit for shard, commit in self._commits.get(pass_name, {}).items() if 0 <= shard < self.manifest.rows.slots}

    def complete(self, pass_name: str) -> bool:
        """Whether every shard of the pass is committed."""
        return len(self.committed(pass_name)) == self.manifest.rows.slots

    def spec(self, key: FeatureKey) -> FeatureSpec:
        """How ``key`` (with its pass) is stored.

        Raises:
            MissingFeature: it is not.
        """
        if (spec := self._specs.get((key.pass_name, key.of("")))) is None:
            stored = ", ".join(sorted(str(feature.of(name)) for name, feature in self._specs)) or "no features"
            raise MissingFeature(f"{self.path} has no {key}; it holds {stored}")
        return spec

    def read(self, key: FeatureKey, rows: Ints) -> Arrays:
        """The stored arrays of ``key`` for ``rows``, packed in their order; :meth:`read_all` of one key."""
        return self.read_all([key], rows)[key]

    def read_all(self, keys: Sequence[FeatureKey], rows: Ints, allocate: Allocate | None = None) -> dict[FeatureKey, Arrays]:
        """The stored arrays of ``keys`` for ``rows`` [n], packed in their order into one buffer, one copy for each byte.

        A row has one unit for each of its tokens, of its labelled tokens, or one, by the key's positions. Chunks are
        compared with their checksums when this reader first touches them.

        Args:
            allocate: Where the buffer comes from; by default NumPy. Memory that processes share spares them a copy.

        Raises:
            MissingFeature: a key is not stored, or not yet for all of these rows.
            CorruptShard: a file is missing, of another size, or fails its checksum.
        """
        specs = {key: self.spec(key) for key in keys}
        numbers = self.rows.at(rows)
        slots = set(numbers.slot.tolist())
        for pass_name in {key.pass_name for key in keys}:
            if missing := sorted(slots - self._commits.get(pass_name, {}).keys()):
                have, of = len(self.committed(pass_name)), self.manifest.rows.slots
                raise MissingFeature(
                    f"{self.path}: pass {pass_name} has {have} of {of} shards, not {missing[:5]}; start its dump again to go on"
                )
        arrays = [(key, array) for key, spec in specs.items() for array in spec.arrays]
        counts = {positions: int(numbers.units(positions)[1].sum()) for positions in {key.positions for key in keys}}
        packed = _buffers([(counts[key.positions], array) for key, array in arrays], allocate)
        pieces: dict[tuple[str, int], _Pieces] = {}
        found: dict[FeatureKey, Arrays] = {key: {} for key in keys}
        for (key, array), out in zip(arrays, packed, strict=True):
            chunk = self.manifest.rows.chunk(array, key.positions)
            if (places := pieces.get((key.positions, chunk))) is None:
                places = pieces[key.positions, chunk] = _pieces(numbers, key.positions, chunk)
            folder = layout.array(self.path, key.pass_name, layout.array_name(key, array.name))
            _gather({slot: self._slot_file(folder, key, array, slot) for slot in slots}, places, out)
            found[key][array.name] = out
        return found

    def tokens(self, name: str, rows: Ints) -> NDArray[Any]:
        """Token array ``name`` (input_ids, segments, documents, token_labels) for ``rows``, packed [tokens].

        Raises:
            MissingFeature: rows have no such array.
            CorruptShard: a file is missing, of another size, or fails its checksum.
        """
        info = self.manifest.rows
        array = next((array for array in info.token_arrays if array.name == name), None)
        if array is None:
            raise MissingFeature(
                f"{self.path} has no token array {name!r}; it holds {', '.join(array.name for array in info.token_arrays)}"
            )
        numbers = self.rows.at(rows)
        (out,) = _buffers([(int(numbers.length.sum()), array)], None)
        folder = layout.tokens(self.path, name)

        def find(slot: int) -> tuple[Shard, Seal | None]:
            shard = self.rows.shard(array, "all", slot)
            return shard, Seal(shard.size, info.slot_crcs[name][slot])

        files = {slot: self.rows.files.get(folder, slot, find, self._mend, dimensions=1) for slot in set(numbers.slot.tolist())}
        _gather(files, _pieces(numbers, "all", info.chunk(array, "all")), out)
        return out[:, 0]

    def statics(self, pass_name: str) -> dict[str, NDArray[Any]]:
        """The weights that ship with a pass, by name (store.shape.STATICS), bfloat16 as uint16."""
        if pass_name not in self.manifest.passes:
            raise MissingFeature(f"{self.path} has no pass {pass_name!r}; it has {', '.join(self.manifest.passes) or 'none'}")
        return {static.name: read_static(self.path, pass_name, static) for static in self.manifest.passes[pass_name].statics}

    @cached_property
    def _commits(self) -> dict[str, dict[int, Commit]]:
        return commits.replay(self.path)

    @property
    def _mend(self) -> str:
        return f"mend it with teacher-dump verify --repair {self.path} and start the dump again"

    def _slot_file(self, folder: Path, key: FeatureKey, array: ArraySpec, slot: int) -> SlotFile:
        def find(slot: int) -> tuple[Shard, Seal | None]:
            seal = self._commits[key.pass_name][slot].files.get(layout.array_name(key, array.name))
            return self.rows.shard(array, key.positions, slot), seal

        return self.rows.files.get(folder, slot, find, self._mend)


class _Pieces(NamedTuple):
    """Runs of units inside one chunk: which, and where they go. Lists, because the loop over them is Python's."""

    slot: list[int]
    chunk: list[int]
    first: list[int]
    after: list[int]
    start: list[int]
    stop: list[int]


def _pieces(numbers: Numbers, positions: str, chunk: int) -> _Pieces:
    """The units of rows, cut where a chunk ends."""
    first, count = numbers.units(positions)
    chunks = np.where(count > 0, (first + count - 1) // chunk - first // chunk + 1, 0)
    row = np.repeat(np.arange(len(first)), chunks)
    number = first[row] // chunk + np.arange(len(row)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    begin = np.maximum(first[row] - number * chunk, 0)
    end = np.minimum((first + count)[row] - number * chunk, chunk)
    stop = np.cumsum(end - begin)
    columns = (numbers.slot[row], number, begin, end, stop - (end - begin), stop)
    return _Pieces(*(column.tolist() for column in columns))


def _gather(files: dict[int, SlotFile], pieces: _Pieces, out: NDArray[Any]) -> None:
    """Copy every piece out of the chunks of its slot to its place in ``out`` [U, W]."""
    if not all(file.sound for file in files.values()):
        for slot, chunk in set(zip(pieces.slot, pieces.chunk, strict=True)):
            if not files[slot].checked(chunk):
                files[slot].check(chunk)
    chunks = {slot: file.chunks for slot, file in files.items()}
    for slot, chunk, first, after, start, stop in zip(*pieces, strict=True):
        out[start:stop] = chunks[slot][chunk, first:after]


def _buffers(wanted: Sequence[tuple[int, ArraySpec]], allocate: Allocate | None) -> list[NDArray[Any]]:
    """Arrays [units, W] inside one buffer."""
    sizes = [units * array.width * numpy_dtype(array).itemsize for units, array in wanted]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + math.ceil(size / _ALIGNED) * _ALIGNED)
    buffer = np.empty(starts[-1], np.uint8) if allocate is None else allocate(starts[-1])
    return [
        buffer[start : start + size].view(numpy_dtype(array)).reshape(units, array.width)
        for start, size, (units, array) in zip(starts, sizes, wanted, strict=False)
    ]
