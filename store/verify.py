"""Is a store whole? Every committed byte read again, and how to mend what is not as it was committed."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from store import commits, hierarchy, layout
from store.agreement import row_problems
from store.commits import Commit
from store.errors import CorruptShard, StoreError
from store.manifest import SCHEMA, Manifest, Static, read_manifest
from store.publish import make_folder, replace
from store.shards import Seal, Shard
from store.slot_file import SlotFile
from store.statics import static_problem
from store.strays import Freed, remove, strays
from store.table import RowTable

THREADS = min(8, 2 * (os.cpu_count() or 1))
"""Files looked at at a time: while some wait for the disk, others are checked."""

_AHEAD = 64
"""Files that wait for their turn."""

_ANEW = "rows cannot be mended: remove the folder and start the dump again"

Committed = dict[str, dict[int, Commit]]
"""Pass -> shard -> commit."""

Progress = Callable[[int, int], None]
"""Told how many bytes were just looked at, and how many there are in all."""


@dataclass(frozen=True)
class Problem:
    """One damaged file."""

    file: Path
    what: str
    mend: str
    """What a person can do about it."""
    repairs: bool = False
    """Whether :func:`repair` is what mends it."""
    pass_name: str | None = None
    """Pass whose answers it holds."""
    shard: int | None = None
    """Slot whose answers or tokens it holds."""

    def __str__(self) -> str:
        where = f"pass {self.pass_name}, " if self.pass_name else ""
        where += f"shard {self.shard}, " if self.shard is not None else ""
        return f"{where}{self.file}: {self.what}; {self.mend}"


class Repaired(NamedTuple):
    """What a repair did."""

    mended: list[Problem]
    left: list[Problem]
    """Damaged rows, and weights, which the next dump writes anew."""
    dropped: int
    """Shards that the next dump makes again."""
    freed: Freed


def verify(path: Path, full: bool = True, progress: Progress | None = None) -> list[Problem]:
    """Look at every committed file of the store again; what is wrong with it.

    Args:
        full: Read every byte, and compare the two forms that the row table has. Otherwise only what says what a file is:
            sizes, chunk indexes and the list of checksums.

    Raises:
        StoreError: there is no store to speak of.
    """
    manifest = read_manifest(path)
    rows = RowTable(path, manifest.rows)
    found = [*_metadata(path, manifest), *_arrays(path, manifest, rows, full, progress or (lambda done, total: None))]
    compare = full and not any(path / "rows" in problem.file.parents for problem in found)
    return [*found, *(Problem(file, what, _ANEW) for file, what in row_problems(rows, full, compare))]


def repair(path: Path, full: bool = True, progress: Progress | None = None) -> Repaired:
    """Take back the commits of damaged shards, so that the next dump makes them again, rewrite metadata, and remove what
    nothing refers to.

    A repair that is killed is finished by the next one: a shard counts as committed until its files are about to go.

    Args:
        full: As for :func:`verify`.

    Raises:
        StoreBusy: another process writes to the store.
        StoreError: there is no store to speak of, or it is of a schema that is only read.
    """
    manifest = read_manifest(path)
    if manifest.schema_version != SCHEMA:
        raise StoreError(
            f"{path} has schema version {manifest.schema_version}, which is only read; write it as {SCHEMA} with teacher-dump copy"
        )
    with commits.exclusive(path):
        manifest = read_manifest(path)  # it may have been another command's turn in between
        problems = verify(path, full, progress)
        commits.salvage(path)
        broken = {(problem.pass_name, problem.shard) for problem in problems if problem.repairs}
        damaged = [
            commit for shards in commits.replay(path).values() for commit in shards.values() if (commit.pass_name, commit.shard) in broken
        ]
        for commit in damaged:
            commits.drop(path, commit)
        for file, data in hierarchy.differing(path, manifest).items():
            make_folder(layout.inside(path, file.parent))
            replace(file, data)
        freed = remove(strays(path))
    by_hand = [problem for problem in problems if not problem.repairs]
    return Repaired([problem for problem in problems if problem.repairs], by_hand, len(damaged), freed)


class _Look(NamedTuple):
    """One file to look at."""

    size: int
    problem: Callable[[], Problem | None]


def _metadata(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """What is wrong with the files beside the arrays."""
    repair = f"run teacher-dump verify --repair {path}"
    for file in hierarchy.differing(path, manifest):
        yield Problem(file, "is not what the manifest asks for", repair, repairs=True)
    for file, what in commits.damage(path).items():
        yield Problem(file, what, f"{repair}, then the dump again", repairs=True)


def _arrays(path: Path, manifest: Manifest, rows: RowTable, full: bool, progress: Progress) -> Iterator[Problem]:
    """What is wrong with arrays, several looked at a time."""
    committed = commits.replay(path, damaged=True)
    looks = chain(
        _row_looks(path, manifest, rows, full), _static_looks(path, manifest, full), _shard_looks(path, manifest, rows, committed, full)
    )
    total = sum(seal.size for shards in committed.values() for commit in shards.values() for seal in commit.files.values())
    running: deque[tuple[int, Future[Problem | None]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for look in chain(looks, [None] * _AHEAD):
            if look is not None:
                running.append((look.size, pool.submit(look.problem)))
            if running and (look is None or len(running) == _AHEAD):
                size, future = running.popleft()
                if problem := future.result():
                    yield problem
                progress(size, total)


def _row_looks(path: Path, manifest: Manifest, rows: RowTable, full: bool) -> Iterator[_Look]:
    """Tokens, and the arrays of the row table."""
    info = manifest.rows
    arrays = [(array, "all", layout.tokens(path, array.name), 1) for array in info.token_arrays]
    arrays += [(array, "row", layout.rows_array(path, name), 2) for name, array in info.row_arrays.items()]
    for array, positions, folder, dimensions in arrays:
        for slot, crc in enumerate(info.slot_crcs[array.name]):
            shard = rows.shard(array, positions, slot)
            file = layout.slot_file(folder, slot, dimensions)
            problem = partial(Problem, file, mend=_ANEW, shard=slot)
            yield _Look(0, partial(_look, path, file, shard, Seal(shard.size, crc), full, problem))


def _static_looks(path: Path, manifest: Manifest, full: bool) -> Iterator[_Look]:
    def look(name: str, static: Static) -> Problem | None:
        what = static_problem(path, name, static, full)
        file, mend = layout.static(path, name, static.name), "start the dump again: it writes the weights anew"
        return Problem(file, what, mend, pass_name=name) if what else None

    for name, info in manifest.passes.items():
        for static in info.statics:
            yield _Look(0, partial(look, name, static))


def _shard_looks(path: Path, manifest: Manifest, rows: RowTable, committed: Committed, full: bool) -> Iterator[_Look]:
    """The answers. What logs say of passes and slots that are not there is left by a drop; nothing reads it."""
    for name, info in manifest.passes.items():
        arrays = [(spec.feature, array, layout.array_name(spec.feature, array.name)) for spec in info.features for array in spec.arrays]
        for shard, commit in sorted(committed.get(name, {}).items()):
            if not 0 <= shard < manifest.rows.slots:
                continue
            for key, array, place in arrays:
                file, seal = layout.slot_file(layout.array(path, name, place), shard), commit.files.get(place)
                mend = f"run teacher-dump verify --repair {path}, then the dump again"
                problem = partial(Problem, file, mend=mend, repairs=True, pass_name=name, shard=shard)
                look = partial(_look, path, file, rows.shard(array, key.positions, shard, info.shape.vocab), seal, full, problem)
                yield _Look(seal.size if seal else 0, look)


def _look(path: Path, file: Path, shard: Shard, seal: Seal | None, full: bool, problem: Callable[[str], Problem]) -> Problem | None:
    """A slot file, every byte of it read if ``full``."""
    if seal is None:
        return problem("nothing was committed for it")
    layout.inside(path, file.parent)
    try:
        opened = SlotFile(file, shard, seal, mapped=False)
        for chunk in range(shard.chunks if full else 0):
            opened.decode(chunk)
    except CorruptShard as error:
        return problem(str(error).removeprefix(f"{file}: "))
    return None
