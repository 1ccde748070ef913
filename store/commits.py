"""The commit logs: the only record of which (shard, pass) is stored.

``commits/<writer>.log`` is only ever appended to (store.lines says what a line is). In each log the last word on a shard
counts, and a shard is committed where any log's is a commit. Many lines make opening slow, so that now and then what they
say goes into ``commits/table.log``: putting the table in its place begins a generation with logs of its own,
``commits/<writer>.<generation>.log``, and those of the last one no longer count. A drop in a log takes back what the table says.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from store import layout, lines
from store.errors import CorruptShard, StoreError
from store.lines import Commit as Commit
from store.locks import exclusive as exclusive
from store.plain import open_plain
from store.publish import replace, sync_folder


class Logs:
    """What all logs of a store say, read on where it stopped.

    Raises CorruptShard where a line other than a torn last one is damaged, unless ``damaged`` says to pass over such lines.
    """

    def __init__(self, store: Path, damaged: bool = False) -> None:
        self.store = store
        self.committed: dict[str, dict[int, Commit]] = {}
        """Pass -> shard -> commit."""
        self.generation = 0
        self._damaged = damaged
        self._table: _State | None = None
        self._words: list[dict[tuple[str, int], Commit]] = []
        self._read: list[_State] = []
        self._begin()
        self.refresh()

    @property
    def spoken(self) -> int:
        """Of how many shards the logs speak; those that are in the table alone are left out."""
        return sum(len(words) for words in self._words)

    def refresh(self) -> None:
        """Hear what was committed since."""
        while not self._read_on():
            self._begin()

    def _begin(self) -> None:
        """Start over with the table as it stands."""
        path = layout.commit_table(self.store)
        layout.inside(self.store, path.parent)
        self._table = _state(path)
        self.generation, commits, whole = lines.read_table(self.store)
        if not (whole or self._damaged):
            raise _damage(self.store, path, "lines are missing or fail their checksum")
        self._words, self._read, self.committed = [], [], {}
        for commit in commits:
            self.committed.setdefault(commit.pass_name, {})[commit.shard] = commit

    def _read_on(self) -> bool:
        """Read what logs have grown by; whether table and logs are still the files that they were."""
        for writer in count():
            path = layout.log(self.store, writer, self.generation)
            state = _state(path)
            if state is None:
                break
            if writer == len(self._read):
                self._read.append(state._replace(size=0))
                self._words.append({})
            known = self._read[writer]
            if state.inode != known.inode or state.size < known.size:
                return False
            if state.size > known.size:
                self._read[writer] = known._replace(size=known.size + self._hear(path, writer, known.size))
        return _state(layout.commit_table(self.store)) == self._table

    def _hear(self, path: Path, writer: int, start: int) -> int:
        """Take in the lines of a log from byte ``start`` on; how many bytes need not be looked at again."""
        heard = 0
        found = lines.read_lines(path, start)
        for number, line in enumerate(found):
            said = lines.commits_of(line, writer)
            if said is None:
                if number == len(found) - 1:
                    break  # torn, or still being written
                if not self._damaged:
                    before = len(lines.read_lines(path)) - len(found)
                    raise _damage(self.store, path, f"line {before + number + 1} fails its checksum")
            for commit in said or ():
                self._words[writer][commit.pass_name, commit.shard] = commit
                self._resolve(commit.pass_name, commit.shard)
            heard += len(line)
        return heard

    def _resolve(self, pass_name: str, shard: int) -> None:
        """Decide on a shard of which a log speaks."""
        said = (words.get((pass_name, shard)) for words in self._words)
        standing = next((commit for commit in said if commit and commit.files), None)
        shards = self.committed.setdefault(pass_name, {})
        if standing:
            shards[shard] = standing
        else:
            shards.pop(shard, None)


class _State(NamedTuple):
    """Which file lies in a place, and how far it is known."""

    inode: tuple[int, int]
    size: int


def replay(store: Path, damaged: bool = False) -> dict[str, dict[int, Commit]]:
    """Pass -> shard -> commit, as all logs of ``store`` say now.

    Raises:
        CorruptShard: a line other than a torn last one is damaged, and ``damaged`` does not say to pass over it.
    """
    return Logs(store, damaged).committed


def append(store: Path, commit: Commit, generation: int | None = None) -> None:
    """Commit a shard, durably. The caller holds the writer's place, or the whole store.

    Args:
        generation: That of the store, where the caller knows it.
    """
    _append(store, commit, lines.generation(store) if generation is None else generation)


def drop(store: Path, commit: Commit) -> None:
    """Take ``commit`` back, durably, in the log that holds it. The caller holds the whole store."""
    _append(store, Commit(commit.pass_name, commit.shard, {}, commit.writer), lines.generation(store))


def write(store: Path, committed: Iterable[Commit]) -> None:
    """Make ``committed`` all that is committed, in one durable step: a new generation. The caller holds the whole store."""
    generation = lines.generation(store)
    _sweep(store, generation)
    layout.commit_table(store).parent.mkdir(exist_ok=True)
    replace(layout.commit_table(store), lines.table_bytes(generation + 1, committed))
    _sweep(store, generation + 1)


def compact(store: Path, least: int = 1) -> bool:
    """Put what the logs say into the table, unless they speak of fewer than ``least`` shards; whether it was done.

    Raises:
        StoreBusy: another process writes to the store.
    """
    with exclusive(store, brief=True):
        logs = Logs(store)
        if logs.spoken < least:
            _sweep(store, logs.generation)
            return False
        write(store, [commit for shards in logs.committed.values() for commit in shards.values()])
        return True


def trim(store: Path, writer: int = 0) -> None:
    """Cut off a last line that a kill has torn. The caller holds the writer's place, or the whole store, and appends next."""
    _trim(layout.log(store, writer, lines.generation(store)))


def damage(store: Path) -> dict[Path, str]:
    """Table and logs that have lines, other than a torn last one, that cannot be believed -> what is wrong."""
    table = lines.read_table(store)
    found = {} if table.whole else {layout.commit_table(store): "lines are missing or fail their checksum"}
    paths = (layout.log(store, writer, table.generation) for writer in count())
    for path in takewhile(Path.exists, paths):
        if lost := sum(lines.commits_of(line) is None for line in lines.read_lines(path)[:-1]):
            found[path] = f"{lost} lines fail their checksum"
    return found


def salvage(store: Path) -> None:
    """Keep only what whole lines say, if any are damaged; the rest will be made again. The caller holds the whole store."""
    if damage(store):
        write(store, [commit for shards in replay(store, damaged=True).values() for commit in shards.values()])


def _append(store: Path, commit: Commit, generation: int) -> None:
    path, line = layout.log(store, commit.writer, generation), lines.commit_line(commit)
    try:
        if not path.exists():
            for writer in range(commit.writer + 1):  # readers look for logs until a number is absent
                os.close(open_plain(layout.log(store, writer, generation), os.O_WRONLY | os.O_CREAT))
            sync_folder(path.parent)
        handle = open_plain(path, os.O_RDWR | os.O_APPEND)
        try:
            if (size := os.fstat(handle).st_size) and os.pread(handle, 1, size - 1) != b"\n":
                _trim(path)
            if os.write(handle, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        with contextlib.suppress(OSError):
            _trim(path)
        raise StoreError(
            f"cannot write {path}: {error.strerror}; make room or rights and start again, what is committed is kept"
        ) from error


def _sweep(store: Path, generation: int) -> None:
    """Remove logs of other generations: of the last one, or of a table that was lost."""
    for path, number in lines.logs(store):
        if number != generation:
            path.unlink()


def _trim(path: Path) -> None:
    found = lines.read_lines(path)
    if found and lines.commits_of(found[-1]) is None:
        with path.open("rb+") as file:
            file.truncate(sum(map(len, found[:-1])))
            os.fsync(file.fileno())


def _state(path: Path) -> _State | None:
    try:
        about = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(about.st_mode):
        lines.read_lines(path)  # raises: it is no log
    return _State((about.st_dev, about.st_ino), about.st_size)


def _damage(store: Path, path: Path, what: str) -> CorruptShard:
    return CorruptShard(f"{path}: {what}; mend it with: teacher-dump verify --repair {store}")
