"""The commit logs: the only record of which (shard, pass) is stored.

``commits/<writer>.log`` is only ever appended to. A line is eight hexadecimal digits, the crc32c of the rest, a space,
and a JSON object: ``{"pass", "shard", "files": {array: [bytes, crc32c]}}`` commits a shard, ``{"pass", "shard",
"drop": true}`` takes it back. A shard is committed where a log's last word on it is a commit.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from store import layout
from store.errors import CorruptShard, StoreBusy, StoreError
from store.publish import crc32c, replace, sync_folder
from store.shards import Seal


@dataclass(frozen=True)
class Commit:
    """One shard of one pass, and what each of its files must be."""

    pass_name: str
    shard: int
    files: dict[str, Seal]
    """Array (store.layout.array_name) -> length and checksum of the shard's file."""
    writer: int = 0
    """Whose log says so."""


@contextlib.contextmanager
def locked(store: Path, writer: int = 0) -> Iterator[None]:
    """Hold the place of ``writer``; the lock goes with the process, however it ends.

    Raises:
        StoreBusy: another process holds it.
    """
    path = layout.lock(store, writer)
    try:
        path.parent.mkdir(exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise StoreError(f"cannot write to {store}: {error.strerror}; check its rights") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusy(f"another process is writing to {store}; wait for it to end, or stop it, and start again") from None
        yield


def exclusive(store: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the whole store, to change what others only add to (manifest, drops, repairs); raises StoreBusy while anyone writes."""
    return locked(store)


def replay(store: Path, damaged: bool = False) -> dict[str, dict[int, Commit]]:
    """Pass -> shard -> commit, as all logs of ``store`` say now.

    Raises:
        CorruptShard: a line other than a torn last one is damaged, and ``damaged`` does not say to pass over it.
    """
    committed: dict[str, dict[int, Commit]] = {}
    for writer in writers(store):
        own: dict[tuple[str, int], Commit] = {}
        lines = _lines(layout.log(store, writer), writer)
        for number, (_, commit) in enumerate(lines):
            if commit is None:
                if number < len(lines) - 1 and not damaged:
                    command = f"teacher-dump verify --repair {store}"
                    raise CorruptShard(f"{layout.log(store, writer)}: line {number + 1} fails its checksum; mend it with: {command}")
            elif commit.files:
                own[commit.pass_name, commit.shard] = commit
            else:
                own.pop((commit.pass_name, commit.shard), None)
        for (pass_name, shard), commit in own.items():
            committed.setdefault(pass_name, {}).setdefault(shard, commit)
    return committed


def writers(store: Path) -> Iterator[int]:
    """Numbers of the writers that have a log."""
    return takewhile(lambda writer: layout.log(store, writer).exists(), count())


def append(store: Path, pass_name: str, shard: int, files: dict[str, Seal], writer: int = 0) -> None:
    """Commit a shard, durably. The caller holds the writer's lock and has trimmed its log."""
    _append(store, {"pass": pass_name, "shard": shard, "files": {name: list(seal) for name, seal in files.items()}}, writer)


def drop(store: Path, commit: Commit) -> None:
    """Take ``commit`` back, durably, in the log that holds it. The caller holds that writer's lock and has trimmed its log."""
    _append(store, {"pass": commit.pass_name, "shard": commit.shard, "drop": True}, commit.writer)


def _append(store: Path, record: dict[str, object], writer: int) -> None:
    text = json.dumps(record).encode()
    line = b"%08x %s\n" % (crc32c(text), text)
    path = layout.log(store, writer)
    fresh = not path.exists()
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        if fresh:
            sync_folder(path.parent)
    except OSError as error:
        trim(store, writer)
        raise StoreError(
            f"cannot write {path}: {error.strerror}; make room or rights and start again, what is committed is kept"
        ) from error


def trim(store: Path, writer: int = 0) -> None:
    """Cut off a last line that a kill has torn. The caller holds the writer's lock and appends next."""
    path = layout.log(store, writer)
    lines = _lines(path, writer)
    if lines and lines[-1][1] is None:
        with path.open("rb+") as file:
            file.truncate(sum(len(line) for line, _ in lines[:-1]))
            os.fsync(file.fileno())


def damaged_lines(store: Path, writer: int = 0) -> int:
    """How many lines of a log fail their checksum, a torn last one left out."""
    return sum(commit is None for _, commit in _lines(layout.log(store, writer), writer)[:-1])


def salvage(store: Path, writer: int = 0) -> None:
    """Keep only the whole lines of a log; what the others committed will be made again. The caller holds the writer's lock."""
    path = layout.log(store, writer)
    replace(path, b"".join(line for line, commit in _lines(path, writer) if commit), writer)


def _lines(path: Path, writer: int) -> list[tuple[bytes, Commit | None]]:
    """Each line of a log as it stands, and the commit it holds (without files where it takes one back), None where damaged."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+", path.read_bytes()) if path.exists() else []
    return [(line, _commit(line, writer)) for line in lines]


def _commit(line: bytes, writer: int) -> Commit | None:
    digits, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or digits != b"%08x" % crc32c(text):
        return None
    try:
        record = json.loads(text)
        files = {} if record.get("drop") else {str(name): Seal(int(size), int(crc)) for name, (size, crc) in record["files"].items()}
        return Commit(str(record["pass"]), int(record["shard"]), files, writer)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
