"""A store as its readers see it: committed features, copied once from memory-mapped files into packed arrays.

Shapes: n rows that are asked for, U their units (tokens, labelled tokens or rows), W width.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from store import commits, layout
from store.commits import Commit
from store.errors import CorruptShard, MissingFeature, StoreError
from store.features import ArraySpec, FeatureKey, FeatureSpec
from store.follow import wait
from store.manifest import Manifest, read_manifest
from store.mirror import Mirror
from store.opened import ArrayFiles, Run
from store.remote import url_of
from store.shards import Seal, Shard, numpy_dtype
from store.shipped import shipped
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

    def __init__(
        self, path: Path, manifest: Manifest, mapped: bool | None = None, mirror: Mirror | None = None, follow: float = 0.0
    ) -> None:
        self.path = path
        """Its folder; for a store in object storage the one in the cache, where only some of its files may lie."""
        self.manifest = manifest
        self.rows = RowTable(path, manifest.rows, mapped, mirror)
        self._mapped = mapped
        self._mirror = mirror
        self._follow = follow
        self._specs = {spec.feature.of(name): spec for name, info in manifest.passes.items() for spec in info.features}
        self._sources: dict[FeatureKey, list[_Source]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.where, self._mapped, self._follow)

    @classmethod
    def open(cls, path: Path | str, mapped: bool | None = None, follow: float = 0.0) -> Self:
        """Open the store in a folder, or at an address in object storage (store.remote).

        Args:
            mapped: Whether to map its files into memory; by default where the file system is local.
            follow: Where shards are not committed yet, wait for them, until nothing was committed for so many seconds.

        Raises:
            StoreError: there is none, its rows are unfinished, or it is of another schema.
        """
        if (url := url_of(path)) is None:
            return cls(Path(path), read_manifest(Path(path)), mapped, None, follow)
        mirror = Mirror(url)
        mirror.refresh()
        return cls(mirror.folder, read_manifest(mirror.folder), mapped, mirror, follow)

    @property
    def where(self) -> Path | str:
        """What the store was opened by: its folder or its address."""
        return self.path if self._mirror is None else self._mirror.url

    def refresh(self) -> None:
        """Look again at what there is: a store that is still written has more by now. Rows that were added stay unseen.

        Raises:
            StoreError: it cannot be read any more, or another store is in its place.
        """
        before = self._commits
        if self._mirror is not None:
            self._mirror.refresh()
        manifest, self._commits = read_manifest(self.path), commits.replay(self.path)
        same = all(self._commits.get(name, {}).get(shard) == it for name, shards in before.items() for shard, it in shards.items())
        if manifest.rows != self.manifest.rows:
            if any(manifest.rows.slot_crcs.get(name, ())[: len(crcs)] != crcs for name, crcs in self.manifest.rows.slot_crcs.items()):
                raise StoreError(f"{self.where} is another store than the one that was opened; start again")
            manifest = manifest.model_copy(update={"rows": self.manifest.rows})
        if manifest != self.manifest:
            self.manifest = manifest
            self._specs = {spec.feature.of(name): spec for name, info in manifest.passes.items() for spec in info.features}
            self._sources.clear()
        if not same:  # shards have been made again
            self.rows.files.forget()

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
        if (spec := self._specs.get(key)) is None:
            stored = ", ".join(sorted(map(str, self._specs))) or "no features"
            raise MissingFeature(f"{self.where} has no {key}; it holds {stored}")
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
        try:
            return self._read_all(keys, rows, allocate)
        except CorruptShard:
            if not self._made_again():
                raise
        return self._read_all(keys, rows, allocate)

    def _read_all(self, keys: Sequence[FeatureKey], rows: Ints, allocate: Allocate | None) -> dict[FeatureKey, Arrays]:
        wanted = [(key, source) for key in keys for source in self._sources_of(key)]
        numbers = self.rows.at(rows)
        slots = set(numbers.slot.tolist())
        for pass_name in {key.pass_name for key in keys}:
            if self._follow and self._missing(pass_name, slots):
                wait(self, pass_name, slots, self._follow)
            if missing := self._missing(pass_name, slots):
                have, of = len(self.committed(pass_name)), self.manifest.rows.slots
                raise MissingFeature(
                    f"{self.where}: pass {pass_name} has {have} of {of} shards, not {missing[:5]}; start its dump again to go on"
                )
        self.rows.files.bring((source.files, slots) for _, source in wanted)
        pieces = {cut: _pieces(numbers, *cut) for cut in {(key.positions, source.chunk) for key, source in wanted}}
        places = [pieces[key.positions, source.chunk] for key, source in wanted]
        packed = _buffers([(units, source) for (units, _), (_, source) in zip(places, wanted, strict=True)], allocate)
        found: dict[FeatureKey, Arrays] = {key: {} for key in keys}
        for (key, source), (_, runs), out in zip(wanted, places, packed, strict=True):
            source.files.gather(slots, runs, out)
            found[key][source.name] = out
        return found

    def _missing(self, pass_name: str, slots: set[int]) -> list[int]:
        """Which of the slots have no committed shard, ascending. A store may have far more of them than are asked about."""
        committed = self._commits.get(pass_name, {})
        return sorted(slot for slot in slots if slot not in committed)

    def tokens(self, name: str, rows: Ints) -> NDArray[Any]:
        """Token array ``name`` (input_ids, segments, documents, token_labels, phrases, interchange) for ``rows``, packed [tokens].

        Raises:
            MissingFeature: rows have no such array.
            CorruptShard: a file is missing, of another size, or fails its checksum.
        """
        arrays = self.manifest.rows.token_arrays
        found = [array for array in arrays if array.name == name]
        if not found:
            raise MissingFeature(f"{self.where} has no token array {name!r}; it holds {', '.join(array.name for array in arrays)}")
        return self._tokens(found, rows)[name]

    def all_tokens(self, rows: Ints) -> Arrays:
        """Every token array for ``rows`` by its name, packed [tokens]; one look for what :meth:`tokens` takes several."""
        return self._tokens(self.manifest.rows.token_arrays, rows)

    def _tokens(self, arrays: Sequence[ArraySpec], rows: Ints) -> Arrays:
        numbers = self.rows.at(rows)
        slots = set(numbers.slot.tolist())
        sources = [self._token_source(array) for array in arrays]
        self.rows.files.bring((source.files, slots) for source in sources)
        pieces = {chunk: _pieces(numbers, "all", chunk) for chunk in {source.chunk for source in sources}}
        packed = _buffers([(pieces[source.chunk][0], source) for source in sources], None)
        for source, out in zip(sources, packed, strict=True):
            source.files.gather(slots, pieces[source.chunk][1], out)
        return {source.name: out[:, 0] for source, out in zip(sources, packed, strict=True)}

    def _token_source(self, array: ArraySpec) -> "_Source":
        info = self.manifest.rows

        def find(slot: int) -> tuple[Shard, Seal | None]:
            shard = self.rows.shard(array, "all", slot)
            return shard, Seal(shard.size, info.slot_crcs[array.name][slot])

        files = self.rows.files.of(layout.tokens(self.path, array.name), find, self._mend, dimensions=1)
        return _Source(array.name, 1, numpy_dtype(array), info.chunk(array, "all"), files)

    def statics(self, pass_name: str) -> dict[str, NDArray[Any]]:
        """The weights that ship with a pass, by name (store.shape.STATICS), bfloat16 as uint16."""
        if pass_name not in self.manifest.passes:
            raise MissingFeature(f"{self.where} has no pass {pass_name!r}; it has {', '.join(self.manifest.passes) or 'none'}")
        info = self.manifest.passes[pass_name]
        if self._mirror is not None:
            self._mirror.statics(pass_name, info)
        return {static.name: read_static(self.path, pass_name, static) for static in info.statics}

    def shipped(self, pass_name: str, configured: bool = True) -> Path:
        """The folder of configuration, tokenizer and blocks that ships with a pass, as store.shipped.shipped gives it."""
        if self._mirror is not None:
            self._mirror.shipped(pass_name)
        return shipped(self.path, pass_name, configured)

    @cached_property
    def _commits(self) -> dict[str, dict[int, Commit]]:
        return commits.replay(self.path)

    def _made_again(self) -> bool:
        """Whether shards have been repaired since the store was opened; if so, what stands there now is read from here on.

        Of a store in object storage everything is looked at anew: its files here may have been damaged.
        """
        before = self._commits
        self.refresh()
        if self._mirror is not None:
            self._mirror.doubt()
            self.rows.files.forget()
        return self._mirror is not None or self._commits != before

    @property
    def _mend(self) -> str:
        if self._mirror is not None:
            return f"verify the store that was uploaded to {self._mirror.url} and upload it again"
        return f"mend it with teacher-dump verify --repair {self.path} and start the dump again"

    def _sources_of(self, key: FeatureKey) -> "list[_Source]":
        """The arrays of a key."""
        if (sources := self._sources.get(key)) is None:
            chunk = self.manifest.rows.chunk
            sources = self._sources[key] = [
                _Source(array.name, array.width, numpy_dtype(array), chunk(array, key.positions), self._files(key, array))
                for array in self.spec(key).arrays
            ]
        return sources

    def _files(self, key: FeatureKey, array: ArraySpec) -> ArrayFiles:
        name, vocab = layout.array_name(key, array.name), self.manifest.passes[key.pass_name].shape.vocab

        def find(slot: int) -> tuple[Shard, Seal | None]:
            return self.rows.shard(array, key.positions, slot, vocab), self._commits[key.pass_name][slot].files.get(name)

        return self.rows.files.of(layout.array(self.path, key.pass_name, name), find, self._mend)


class _Source(NamedTuple):
    """One array to read from; worked out once, because it takes about as long as to copy a small batch."""

    name: str
    width: int
    dtype: np.dtype[Any]
    chunk: int
    """Units of an inner chunk."""
    files: ArrayFiles


def _pieces(numbers: Numbers, positions: str, chunk: int) -> tuple[int, list[Run]]:
    """How many units rows have, and the runs of them, cut where a chunk ends."""
    firsts, counts = (column.tolist() for column in numbers.units(positions))
    runs = []
    for slot, first, count in zip(numbers.slot.tolist(), firsts, counts, strict=True):
        number, start = first // chunk, first % chunk
        stop = start + count
        while stop > chunk:
            runs.append((slot, (number, slice(start, chunk))))
            number, start, stop = number + 1, 0, stop - chunk
        if start < stop:
            runs.append((slot, (number, slice(start, stop))))
    return sum(counts), runs


def _buffers(wanted: Sequence[tuple[int, _Source]], allocate: Allocate | None) -> list[NDArray[Any]]:
    """Arrays [units, W] inside one buffer."""
    places, end = [], 0
    for units, source in wanted:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + units * source.width * source.dtype.itemsize
        places.append((start, end))
    buffer = np.empty(end, np.uint8) if allocate is None else allocate(end)
    return [
        buffer[start:end].view(source.dtype).reshape(units, source.width)
        for (start, end), (units, source) in zip(places, wanted, strict=True)
    ]
