"""The one process that adds a teacher's answers to a store."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from store import commits, hierarchy, layout
from store.commits import Commit
from store.errors import FingerprintMismatch, StoreError
from store.features import FeatureKey, FeatureSpec
from store.manifest import SCHEMA, Manifest, PassInfo, Static, read_manifest
from store.shards import write_slot
from store.statics import describe_statics, write_statics
from store.table import RowTable

_FOR_PEOPLE = {"made", "model"}
"""Fields of a pass that say where it came from, not what it is."""


class StoreWriter:
    """Exclusive writer of one store; (shard, pass) is the unit of work. Get one from :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest, rows: RowTable, lock: ExitStack) -> None:
        self.path = path
        self.manifest = manifest
        self.rows = rows
        self._lock = lock
        self._committed = commits.replay(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store whose rows are finished.

        Raises:
            StoreBusy: another process writes to it.
            StoreError: it is absent, unfinished, of another schema, or damaged.
        """
        read_manifest(path)
        with ExitStack() as lock:
            lock.enter_context(commits.locked(path))
            layout.building(path).unlink(missing_ok=True)
            commits.trim(path)
            manifest = read_manifest(path)
            if manifest.schema_version != SCHEMA:
                raise StoreError(
                    f"{path} has schema version {manifest.schema_version}, which is only read; "
                    f"write it as {SCHEMA} with: teacher-dump copy {path} NEW-FOLDER"
                )
            return cls(path, manifest, RowTable(path, manifest.rows), lock.pop_all())

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
        known = self.manifest.passes.get(name)
        other = _other_field(known, info) if known is not None else None
        if known is not None and other is None:
            info = known
        for feature in info.features:
            for array in feature.arrays:
                layout.inside(self.path, layout.array(self.path, name, layout.array_name(feature.feature, array.name)))
        if known is not None and other is not None:
            if self._committed.get(name):
                raise FingerprintMismatch(
                    f"pass {name} of {self.path} has another {other}: expected {_short(getattr(known, other))} as stored, "
                    f"found {_short(getattr(info, other))}; give the pass another name, or another store"
                )
            self._clear(name)
            known = None
        manifest = self.manifest.model_copy(update={"passes": {**self.manifest.passes, name: info}})
        write_statics(self.path, name, statics)
        if known is None or hierarchy.differing(self.path, manifest):
            hierarchy.write(self.path, manifest)
        self.manifest = manifest

    def pending(self, pass_name: str) -> list[int]:
        """Shards of the pass that are still to be done, ascending."""
        done = self._committed.get(pass_name, {})
        return [shard for shard in range(self.manifest.rows.slots) if shard not in done]

    def commit(self, pass_name: str, shard: int, arrays: Mapping[FeatureKey, Mapping[str, NDArray[Any]]]) -> None:
        """Store the answers for one shard: every feature of the pass, whole, or nothing.

        ``arrays`` holds for each key its arrays as their codec encodes them, packed [units of the shard, width] in the
        order of the rows.

        Raises:
            StoreError: the shard is committed already, or cannot be written.
            ValueError: the arrays are not those of the pass, or of another type or shape.
        """
        info = self.manifest.passes[pass_name]
        if shard in self._committed.get(pass_name, {}) or not 0 <= shard < self.manifest.rows.slots:
            raise StoreError(f"shard {shard} of pass {pass_name} is committed already or is not in {self.path}")
        given = {key.of(""): value for key, value in arrays.items()}
        if set(given) != {feature.feature for feature in info.features}:
            wanted = sorted(feature.key for feature in info.features)
            raise ValueError(f"pass {pass_name}: expected features {wanted}, found {sorted(str(key) for key in given)}")
        todo = []
        for feature in info.features:
            key = feature.feature
            if set(given[key]) != {array.name for array in feature.arrays}:
                raise ValueError(f"{key}: expected arrays {[array.name for array in feature.arrays]}, found {sorted(given[key])}")
            for array in feature.arrays:
                values = given[key][array.name]
                of_slot = self.rows.shard(array, key.positions, shard)
                of_slot.check(values, f"shard {shard} of {key}")
                todo.append((layout.array_name(key, array.name), of_slot, values))
        files = {}
        for name, of_slot, values in todo:
            path = layout.slot_file(layout.array(self.path, pass_name, name), shard)
            path.unlink(missing_ok=True)  # a run that was killed before its commit line may have left one
            files[name] = write_slot(path, values, of_slot)
        commits.append(self.path, pass_name, shard, files)
        self._committed.setdefault(pass_name, {})[shard] = Commit(pass_name, shard, files)

    def _clear(self, name: str) -> None:
        """Remove the files of a pass without commits, before the manifest that names them is replaced.

        A kill in between leaves a pass that is announced and has nothing yet, as one in the middle of its first shard is.
        """
        for folder in layout.pass_folders(self.path, name):
            if layout.inside(self.path, folder).exists():
                shutil.rmtree(folder)

    def close(self) -> None:
        """Let other processes write."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _other_field(known: PassInfo, info: PassInfo) -> str | None:
    """The first field in which ``info`` is another pass than the ``known`` one."""
    different = (field for field in PassInfo.model_fields if getattr(known, field) != getattr(info, field))
    return next((field for field in different if field not in _FOR_PEOPLE), None)


def _short(value: object) -> str:
    text = ", ".join(map(_named, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _named(item: object) -> str:
    """A feature or a weight as people know it."""
    if isinstance(item, FeatureSpec):
        ids = f" of ids {' '.join(map(str, item.ids))}" if item.ids else ""
        return f"{item.key}{ids} in {item.arrays[-1].dtype}"
    return f"{item.name} in {item.dtype}" if isinstance(item, Static) else str(item)
