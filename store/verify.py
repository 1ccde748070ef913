"""Is a store whole? Every committed byte read again, and how to mend what is not as it was committed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from store import commits, hierarchy, layout
from store.commits import Commit
from store.errors import CorruptShard
from store.manifest import Manifest, read_manifest
from store.opened import SlotFile
from store.publish import make_folder, replace
from store.shards import Seal, Shard
from store.statics import static_problem
from store.table import RowTable


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


def verify(path: Path) -> list[Problem]:
    """Read every committed file of the store again; what is wrong with it.

    Raises:
        StoreError: there is no store to speak of.
    """
    return list(_problems(path, read_manifest(path)))


def repair(path: Path) -> list[Problem]:
    """Take back the commits of damaged shards, so that the next dump makes them again, and rewrite metadata.

    Returns what is left to a person: damaged rows, and weights, which the next dump writes anew.

    Raises:
        StoreBusy: another process writes to the store.
        StoreError: there is no store to speak of.
    """
    manifest = read_manifest(path)
    with commits.exclusive(path):
        problems = verify(path)
        for writer in commits.writers(path):
            commits.salvage(path, writer)
        committed = commits.replay(path)
        broken = {(problem.pass_name, problem.shard) for problem in problems if problem.repairs}
        for pass_name, shards in committed.items():
            for shard, commit in shards.items():
                if (pass_name, shard) in broken:
                    commits.drop(path, commit)
        for file, data in hierarchy.differing(path, manifest).items():
            make_folder(file.parent)
            replace(file, data)
    return [problem for problem in problems if not problem.repairs]


def _problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    repair = f"run teacher-dump verify --repair {path}"
    anew = "rows cannot be mended: remove the folder and start the dump again"
    for file in hierarchy.differing(path, manifest):
        yield Problem(file, "is not what the manifest asks for", repair, repairs=True)
    rows = RowTable(path, manifest.rows)
    broken = rows.problems()
    yield from (Problem(file, what, anew) for file, what in broken)
    for writer in commits.writers(path):
        if lost := commits.damaged_lines(path, writer):
            yield Problem(layout.log(path, writer), f"{lost} lines fail their checksum", f"{repair}, then the dump again", repairs=True)
    for pass_name, info in manifest.passes.items():
        for static in info.statics:
            if what := static_problem(path, pass_name, static):
                file = layout.static(path, pass_name, static.name)
                yield Problem(file, what, "start the dump again: it writes the weights anew", pass_name=pass_name)
    for array in manifest.rows.token_arrays:
        for slot, crc in enumerate(manifest.rows.slot_crcs[array.name]):
            shard = rows.shard(array, "all", slot)
            file = layout.slot_file(layout.tokens(path, array.name), slot, dimensions=1)
            if what := _problem(file, shard, Seal(shard.size, crc)):
                yield Problem(file, what, anew, shard=slot)
    for shards in commits.replay(path, damaged=True).values():
        for commit in shards.values():
            for file, what in _shard_problems(path, manifest, rows, commit):
                yield Problem(file, what, f"{repair}, then the dump again", True, commit.pass_name, commit.shard)


def _shard_problems(path: Path, manifest: Manifest, rows: RowTable, commit: Commit) -> Iterator[tuple[Path, str]]:
    info = manifest.passes.get(commit.pass_name)
    if info is None or not 0 <= commit.shard < manifest.rows.slots:
        return  # left by a pass that was dropped; nothing reads it
    for feature in info.features:
        key = feature.feature
        for array in feature.arrays:
            name = layout.array_name(key, array.name)
            file = layout.slot_file(layout.array(path, commit.pass_name, name), commit.shard)
            if what := _problem(file, rows.shard(array, key.positions, commit.shard), commit.files.get(name)):
                yield file, what


def _problem(file: Path, shard: Shard, seal: Seal | None) -> str | None:
    """What is wrong with a slot file, every byte of it read; None if nothing."""
    if seal is None:
        return "nothing was committed for it"
    try:
        opened = SlotFile(file, shard, seal, mapped=False)
        for chunk in range(shard.chunks):
            opened.decode(chunk)
    except CorruptShard as error:
        return str(error).removeprefix(f"{file}: ")
    return None
