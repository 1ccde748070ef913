"""Files of a store that nothing accounts for: what a killed command, or a dropped pass, has left.

Only names that a store gives out are looked at, so that a file that somebody put beside them is never touched.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from store import commits, layout
from store.commits import Commit
from store.features import FeatureKey
from store.manifest import Manifest, PassInfo, RowsInfo, read_manifest

_SLOT = re.compile(r"c\.(\d+)(?:\.0)?")
_PART = re.compile(r"part-(\d{5,})\.parquet")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


class Freed(NamedTuple):
    """What removing files did."""

    files: int
    freed: int
    """Bytes of disk that others can use once no reader has the files open."""
    shared: int
    """Bytes that stay, because another store has the same files."""


def strays(path: Path) -> list[Path]:
    """Files and folders of the store that no reader looks at; the caller holds the store (commits.exclusive).

    Raises:
        StoreError: there is no store, or a link leads out of it.
    """
    manifest = read_manifest(path)
    committed = commits.replay(path, damaged=True)
    found = [*row_strays(path, manifest.rows), *_passes(path, manifest)]
    groups = [path, path / "tokens", path / "static", path / "commits"]
    for name, info in manifest.passes.items():
        found += _features(path, name, info, committed.get(name, {}))
        statics = layout.static(path, name, "x").parent
        found += _others(statics, {static.name for static in info.statics})
        groups += [path / layout.safe(name), statics, *(layout.static(path, name, static.name) for static in info.statics)]
    return [*found, *(file for group in groups for file in _entries(layout.inside(path, group)) if _TEMPORARY.fullmatch(file.name))]


def row_strays(path: Path, rows: RowsInfo) -> list[Path]:
    """Slots, parts and temporary files of the row table and the tokens beyond those of ``rows``; the caller holds the store."""
    folders = [layout.rows_array(path, name) for name in rows.row_arrays]
    folders += [layout.tokens(path, array.name) for array in rows.token_arrays]
    found = [file for folder in folders for file in _slots(layout.inside(path, folder), lambda slot: slot < rows.slots)]
    for file in _entries(path / "rows"):
        part = _PART.fullmatch(file.name)
        if _TEMPORARY.fullmatch(file.name) or (part and int(part[1]) >= len(rows.parts)):
            found.append(file)
    return found


def remove(files: Collection[Path]) -> Freed:
    """Remove files and whole folders. What readers have open stays theirs until they close it."""
    done = Freed(0, 0, 0)
    for path in files:
        done = Freed(*map(sum, zip(done, weigh([path]), strict=True)))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return done


def weigh(files: Collection[Path]) -> Freed:
    """What :func:`remove` would do."""
    count, freed, shared = 0, 0, 0
    for path in files:
        for file in _tree(path):
            with contextlib.suppress(FileNotFoundError):  # a writer has gone on meanwhile
                about = file.lstat()
                count += 1
                if about.st_nlink > 1:
                    shared += about.st_blocks * 512
                else:
                    freed += about.st_blocks * 512
    return Freed(count, freed, shared)


def _passes(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Passes on their way out, and what is left of those that the manifest does not name."""
    yield from (entry for entry in _entries(path) if layout.is_dropped(entry.name))
    for kind in ("static", "model"):
        yield from _others(layout.inside(path, path / kind), manifest.passes)
    yield from (entry for entry in _others(layout.inside(path, path / "claims"), manifest.passes) if entry.is_dir())


def _features(path: Path, name: str, info: PassInfo, committed: dict[int, Commit]) -> Iterator[Path]:
    """Arrays of a pass that the manifest does not name, and slots of the others that are not committed."""
    arrays = {layout.array_name(spec.feature, array.name) for spec in info.features for array in spec.arrays}
    above = {array.rsplit("/", depth)[0] for array in arrays for depth in range(1, array.count("/") + 1)}
    folder = layout.inside(path, path / layout.safe(name))

    def below(inside: str) -> Iterator[Path]:
        if inside in arrays:
            yield from _slots(folder / inside, committed.__contains__)
        elif inside not in above or (folder / inside).is_symlink():
            yield folder / inside
        else:
            for entry in _others(folder / inside, ()):
                yield from below(f"{inside}/{entry.name}")

    for entry in _entries(folder):
        if _is_feature(entry.name):
            yield from below(entry.name)


def _is_feature(name: str) -> bool:
    """Whether a folder below a pass is named like site and layer."""
    try:
        return FeatureKey.parse(name).name == name
    except ValueError:
        return False


def _slots(folder: Path, kept: Callable[[int], bool]) -> Iterator[Path]:
    """Files of slots that are not ``kept``, and temporary files."""
    for file in _entries(folder):
        slot = _SLOT.fullmatch(file.name)
        if _TEMPORARY.fullmatch(file.name) or (slot and not kept(int(slot[1]))):
            yield file


def _others(folder: Path, known: Collection[str]) -> Iterator[Path]:
    """What lies in ``folder`` beside ``known`` names."""
    return (entry for entry in _entries(folder) if entry.name not in {*known, "zarr.json"})


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _tree(path: Path) -> Iterator[Path]:
    """The files at and below ``path``."""
    if path.is_symlink() or not path.is_dir():
        if path.is_symlink() or path.exists():
            yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)
