"""A store as its readers see it: committed features, copied once from memory-mapped files into packed arrays."""

import mmap
import resource
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from store import commits, layout
from store.commits import Commit
from store.errors import CorruptShard, MissingFeature
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.manifest import Manifest, read_manifest
from store.rows import Ints, RowTable
from store.shards import CHUNK, Seal, Shard, numpy_dtype
from store.statics import read_static

_Found = tuple[Path, Shard, Seal | None]


class Store:
    """Read-only view of a store as committed when it was opened. Safe to pickle and to fork, but not for
    several threads at once."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.rows = RowTable(path, manifest.rows)
        self._specs = {(name, spec.feature): spec for name, info in manifest.passes.items() for spec in info.features}
        self._open: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._checked: set[Path] = set()

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

    def read(self, key: FeatureKey, rows: Ints) -> dict[str, NDArray[Any]]:
        """The stored arrays of ``key`` for ``rows``, packed [units, width] in their order (bfloat16 as uint16).

        A row has one unit for each of its tokens, of its labelled tokens, or one, by the key's positions. Each file is
        checked whole when this reader first touches it.

        Raises:
            MissingFeature: the key is not stored, or not yet for all of these rows.
            CorruptShard: a file is missing, of another size, or fails its checksum.
        """
        spec = self.spec(key)
        start, length, _ = self.rows.units(key.positions)
        slots = self.rows.slot[rows]
        committed = self._commits.get(key.pass_name, {})
        if missing := sorted({int(slot) for slot in slots} - committed.keys()):
            have, of = len(self.committed(key.pass_name)), self.manifest.rows.slots
            raise MissingFeature(
                f"{self.path}: pass {key.pass_name} has {have} of {of} shards, not {missing[:5]}; start its dump again to go on"
            )
        packed = {}
        for array in spec.arrays:
            name = layout.array_name(key, array.name)
            views = self._views(f"{key.pass_name}/{name}", slots, partial(self._find, key, array))
            packed[array.name] = _gather(views, slots, start[rows], length[rows], array)
        return packed

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
        slots = self.rows.slot[rows]
        views = self._views(f"tokens/{name}", slots, partial(self._find_tokens, array))
        return _gather(views, slots, self.rows.offset[rows], self.rows.length[rows], array)[:, 0]

    def statics(self, pass_name: str) -> dict[str, NDArray[Any]]:
        """The weights that ship with a pass, by name (store.shape.STATICS), bfloat16 as uint16."""
        if pass_name not in self.manifest.passes:
            raise MissingFeature(f"{self.path} has no pass {pass_name!r}; it has {', '.join(self.manifest.passes) or 'none'}")
        return {static.name: read_static(self.path, pass_name, static) for static in self.manifest.passes[pass_name].statics}

    @cached_property
    def _commits(self) -> dict[str, dict[int, Commit]]:
        return commits.replay(self.path)

    def _views(self, array: str, slots: Ints, find: Callable[[int], _Found]) -> dict[int, NDArray[Any]]:
        """Slot -> its chunks of ``array`` [chunks, 128, W], without a copy; ``find`` tells what file that must be."""
        views = {}
        for slot in set(slots.tolist()):
            if (view := self._open.get((array, slot))) is None:
                view = self._open[array, slot] = self._map(*find(slot))
                if len(self._open) > _most_open():
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end((array, slot))
            views[slot] = view
        return views

    def _find(self, key: FeatureKey, array: ArraySpec, slot: int) -> _Found:
        name = layout.array_name(key, array.name)
        units = int(self.rows.units(key.positions)[2][slot])
        path = layout.slot_file(layout.array(self.path, key.pass_name, name), slot)
        return path, Shard(array, self.manifest.rows.slot_tokens, units), self._commits[key.pass_name][slot].files.get(name)

    def _find_tokens(self, array: ArraySpec, slot: int) -> _Found:
        info = self.manifest.rows
        shard = Shard(array, info.slot_tokens, int(self.rows.slot_tokens[slot]))
        path = layout.slot_file(layout.tokens(self.path, array.name), slot, dimensions=1)
        return path, shard, Seal(shard.size, info.slot_crcs[array.name][slot])

    def _map(self, path: Path, shard: Shard, seal: Seal | None) -> NDArray[Any]:
        try:
            with path.open("rb") as handle:
                file = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FileNotFoundError:
            raise self._corrupt(path, "the file is missing") from None
        except ValueError:
            raise self._corrupt(path, "the file is empty") from None
        if path not in self._checked and (problem := shard.problem(file, seal)):
            raise self._corrupt(path, problem)
        self._checked.add(path)
        return shard.view(file)

    def _corrupt(self, path: Path, what: str) -> CorruptShard:
        return CorruptShard(f"{path}: {what}; mend it with teacher-dump verify --repair {self.path} and start the dump again")


def _most_open() -> int:
    """How many files may be mapped at a time: each map holds a file descriptor, and others need some too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(4096, soft // 2)


def _gather(views: dict[int, NDArray[Any]], slots: Ints, starts: Ints, lengths: Ints, array: ArraySpec) -> NDArray[Any]:
    """Copy each row's units out of the chunks of its slot into one array [units, W]."""
    packed = np.empty((int(lengths.sum()), array.width), numpy_dtype(array))
    at = 0
    for slot, start, left in zip(slots.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        chunks = views[slot]
        while left:
            chunk, first = divmod(start, CHUNK)
            take = min(CHUNK - first, left)
            packed[at : at + take] = chunks[chunk, first : first + take]
            at, start, left = at + take, start + take, left - take
    return packed
