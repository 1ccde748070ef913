"""A process that adds a teacher's answers to a store, beside others that do the same.

What waits in memory is the caller's: a writer holds the arrays of the shards that it is told to commit and, of what it writes,
one chunk and a megabyte of buffer.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from store import commits, hierarchy, layout, locks
from store.commits import Commit, Logs
from store.errors import FingerprintMismatch, StoreBusy, StoreError
from store.features import FeatureKey, FeatureSpec
from store.joins import FOR_PEOPLE, different
from store.leases import Leases
from store.locks import Place
from store.manifest import SCHEMA, Manifest, PassInfo, Static, read_manifest
from store.publish import SYNCS, Batch
from store.shards import Shard, write_slot
from store.statics import describe_statics, write_statics
from store.table import RowTable

FOLD = 512
"""Shards of which the commit logs speak when it pays to put them into the table."""


class StoreWriter:
    """A writer of one store; (shard, pass) is the unit of work. Get one from :meth:`open`.

    One thread may commit shards while another asks for more.
    """

    def __init__(self, path: Path, manifest: Manifest, rows: RowTable, place: Place, lock: ExitStack) -> None:
        self.path = path
        self.manifest = manifest
        self.rows = rows
        self._place = place
        self._lock = lock
        self._logs = Logs(path)
        self._reading = threading.Lock()
        self._leases = Leases(path, place)
        self._pool = ThreadPoolExecutor(SYNCS, "fsync")
        self._announcing = False
        self._written: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store whose rows are finished.

        Raises:
            StoreBusy: another process changes it as a whole.
            StoreError: it is absent, unfinished, of another schema, or damaged.
        """
        if (version := read_manifest(path).schema_version) != SCHEMA:
            raise StoreError(
                f"{path} has schema version {version}, which is only read; write it as {SCHEMA} with: teacher-dump copy {path} NEW-FOLDER"
            )
        with ExitStack() as lock:
            place = lock.enter_context(locks.place(path))
            for leftover in (
                layout.building(path),
                layout.temporary(layout.commit_table(path)),
            ):  # nobody makes either while writers are here
                leftover.unlink(missing_ok=True)
            commits.trim(path, place.number)
            with locks.turn(path, layout.passes_lock(path)):  # a pass that this writer has heard of is not replaced any more
                manifest = read_manifest(path)
            writer = cls(path, manifest, RowTable(path, manifest.rows), place, lock.pop_all())
            writer._leases.clear()
            return writer

    @contextlib.contextmanager
    def announcing(self) -> Iterator[None]:
        """Let no other writer announce a pass meanwhile; what they have announced before is known inside."""
        if self._announcing:
            yield
            return
        with locks.turn(self.path, layout.passes_lock(self.path)):
            self.manifest = read_manifest(self.path)
            self._announcing = True
            try:
                yield
            finally:
                self._announcing = False

    def add_pass(self, name: str, info: PassInfo, statics: Mapping[str, NDArray[Any]]) -> None:
        """Announce a teacher's answers, or go on with a pass that is there already.

        A pass of this name with other content gives way as long as no shard of it is committed: nothing of it can be read.
        ``statics`` are its weights (store.shape.STATICS) (bfloat16 as uint16), which ``info.statics`` need not describe yet.

        Raises:
            FingerprintMismatch: the store has committed shards of this name with other content; the message names the field.
            ValueError: the name, a key or an array is not one that a store can hold.
        """
        layout.pass_name(name)
        keys = [feature.feature for feature in info.features]
        if not keys or len(set(keys)) < len(keys) or any(key.pass_name for key in keys):
            raise ValueError(f"pass {name}: expected different features without a pass name, found {[str(key) for key in keys]}")
        info = info.model_copy(update={"statics": describe_statics(statics)})
        for feature in info.features:
            for array in feature.arrays:
                layout.inside(self.path, layout.array(self.path, name, layout.array_name(feature.feature, array.name)))
        with self.announcing():
            known = self.manifest.passes.get(name)
            if known is not None and (other := different(known, info, FOR_PEOPLE)):
                self._give_way(name, known, info, other)
                known = None
            manifest = self.manifest.model_copy(update={"passes": {**self.manifest.passes, name: known or info}})
            write_statics(self.path, name, statics)
            if known is None or hierarchy.differing(self.path, manifest):
                hierarchy.write(self.path, manifest)
            self.manifest = manifest

    def pending(self, pass_name: str) -> list[int]:
        """Shards of the pass that are still to be done, ascending, whoever works on them."""
        done = self._done(pass_name)
        return [shard for shard in range(self.manifest.rows.slots) if shard not in done]

    def shards(self, pass_name: str) -> Iterator[int]:
        """Pending shards, each claimed for this writer, until other writers work on all that are left.

        Claims hold until the shard is committed or the writer closed. The fewer are left, the fewer are claimed at once.
        """
        while mine := self.claim(pass_name, max(1, min(8, len(self.pending(pass_name)) // 64))):
            yield from mine

    def claim(self, pass_name: str, at_most: int = 1) -> list[int]:
        """Up to so many of the first pending shards that nobody works on: this writer does from now on.

        Those of a writer that has ended, or has not renewed its claims in time (store.leases), count as free.
        """
        return self._leases.claim(pass_name, range(self.manifest.rows.slots), lambda: self._done(pass_name), at_most)

    def others(self) -> list[str]:
        """The other processes that write to the store now, as "another process (4711 on node7)"."""
        return list(locks.at_work(self.path, self._place.number).values())

    def commit(
        self,
        pass_name: str,
        shard: int,
        arrays: Mapping[FeatureKey, Mapping[str, NDArray[Any]]],
        batch_tokens: int | None = None,
    ) -> int:
        """Store the answers for one shard, whole or not at all; it is claimed first if it was not yet. The bytes of its files.

        ``arrays`` holds for each key its arrays as their codec encodes them, packed [units of the shard, width] in the
        order of the rows. ``batch_tokens`` is recorded where it is not that of the pass.

        Raises:
            StoreBusy: another writer works on the shard, or has taken it over.
            StoreError: the shard is committed already, or cannot be written.
            ValueError: the arrays are not those of the pass, or of another type or shape.
        """
        self._refuse_committed(pass_name, shard)
        todo = list(self._checked(pass_name, shard, arrays))
        if (pass_name, shard) not in self._leases and not self._leases.claim(pass_name, [shard], lambda: self._done(pass_name), 1):
            raise StoreBusy(f"another process works on shard {shard} of pass {pass_name} of {self.path}; leave it to that")
        with Batch(self._pool, self._place.number) as batch:
            try:
                files = {name: write_slot(path, values, of_slot, batch.add) for name, path, of_slot, values in todo}
                batch.prepare()
            except StoreError:
                self._leases.check(pass_name, shard)  # who takes a shard over clears away what was prepared for it
                raise
            with self._leases.publishing(pass_name, shard):
                self._refuse_committed(pass_name, shard)
                others = [number for number in locks.places(self.path) if number != self._place.number]
                for _, path, _, _ in todo:  # what a writer left that was killed before its commit line, or lost its claim
                    for leftover in (path, *(layout.temporary(path, number) for number in others)):
                        leftover.unlink(missing_ok=True)
                batch.settle()
                other = None if batch_tokens == self.manifest.passes[pass_name].batch_tokens else batch_tokens
                commits.append(self.path, Commit(pass_name, shard, files, self._place.number, other), self._logs.generation)
        self._written.add(pass_name)
        self._leases.release(pass_name, shard)
        return sum(seal.size for seal in files.values())

    def close(self) -> None:
        """Give the writer's place and claims up, and fold the commit logs if a pass is complete and nobody else writes."""
        complete: list[str] = []
        try:
            with contextlib.suppress(StoreError):
                complete = [name for name in self._written if not self.pending(name)]
                for name in complete:
                    self.claim(name, 0)  # removes what killed writers have left
        finally:
            self._written.clear()
            self._pool.shutdown()
            self._leases.close()
            self._lock.close()
        if complete:
            with contextlib.suppress(StoreError):  # nothing but the time to open the store depends on it
                commits.compact(self.path, FOLD)

    def _done(self, pass_name: str) -> Mapping[int, Commit]:
        """The shards of a pass that are committed now."""
        with self._reading:
            self._logs.refresh()
            return self._logs.committed.get(pass_name, {})

    def _refuse_committed(self, pass_name: str, shard: int) -> None:
        if shard in self._done(pass_name) or not 0 <= shard < self.manifest.rows.slots:
            self._leases.check(pass_name, shard)
            raise StoreError(f"shard {shard} of pass {pass_name} is committed already or is not in {self.path}")

    def _checked(
        self, pass_name: str, shard: int, arrays: Mapping[FeatureKey, Mapping[str, NDArray[Any]]]
    ) -> Iterator[tuple[str, Path, Shard, NDArray[Any]]]:
        """Name, file, shape and values of each array of the pass; a ValueError where they are not those."""
        info = self.manifest.passes[pass_name]
        given = {key.of(""): value for key, value in arrays.items()}
        if set(given) != {feature.feature for feature in info.features}:
            wanted = sorted(feature.key for feature in info.features)
            raise ValueError(f"pass {pass_name}: expected features {wanted}, found {sorted(str(key) for key in given)}")
        for feature in info.features:
            key = feature.feature
            if set(given[key]) != {array.name for array in feature.arrays}:
                raise ValueError(f"{key}: expected arrays {[array.name for array in feature.arrays]}, found {sorted(given[key])}")
            for array in feature.arrays:
                name, of_slot = layout.array_name(key, array.name), self.rows.shard(array, key.positions, shard)
                of_slot.check(given[key][array.name], f"shard {shard} of {key}")
                yield name, layout.slot_file(layout.array(self.path, pass_name, name), shard), of_slot, given[key][array.name]

    def _give_way(self, name: str, known: PassInfo, info: PassInfo, other: str) -> None:
        """Remove the files of a pass without commits, before the manifest that names them is replaced.

        A kill in between leaves a pass that is announced and has nothing yet, as one in the middle of its first shard is.
        """
        what = (
            f"pass {name} of {self.path} has another {other}: expected {_short(getattr(known, other))} as stored, "
            f"found {_short(getattr(info, other))}; give the pass another name, or another store"
        )
        if len(self.pending(name)) < self.manifest.rows.slots:
            raise FingerprintMismatch(what)
        if others := self.others():
            raise StoreBusy(f"{what}, or wait until {others[0]} has ended")
        for folder in layout.pass_folders(self.path, name):
            if layout.inside(self.path, folder).exists():
                shutil.rmtree(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _short(value: object) -> str:
    text = ", ".join(map(_named, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _named(item: object) -> str:
    """A feature or a weight as people know it."""
    if isinstance(item, FeatureSpec):
        ids = f" of ids {' '.join(map(str, item.ids))}" if item.ids else ""
        return f"{item.key}{ids} in {item.kept_as}"
    return f"{item.name} in {item.dtype}" if isinstance(item, Static) else str(item)
