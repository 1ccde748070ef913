"""The folder of the cache that stands for a remote store: manifest and logs as they are now, and whole files once they are asked for.

What comes is compared with what was committed before it gets its name. A file that was damaged on this machine's disk is
read again; after the first, no file here is trusted before it was read whole.
"""

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

from store import inventory, layout, lines, manifest
from store.cache import Cache, claim
from store.errors import CorruptShard
from store.inventory import Item
from store.manifest import PassInfo, RowsInfo
from store.opened import Wanted
from store.publish import make_folder
from store.remote import Connection, Get, key_of, no_store, seconds

NOTE_SECONDS = 10.0
"""How exactly the cache knows when a file was last used."""

_TOGETHER = 64
"""Files that are brought at a time."""
_SHARE = 4
"""They take no more than this fraction of the cache."""
_POLL = 0.02
_LOGS = 4
"""Commit logs that are asked for at a time."""


class Mirror:
    """What this machine has of the store at ``url``. Safe to fork, not for several threads at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._cache = Cache.from_environment()
        self._cache.reserve(0)  # the limit may be lower than last time
        self.folder = self._cache.folder_of(url)
        self._connection = Connection(url)
        self._tags: dict[Path, str] = {}
        self._sound: set[tuple[Path, str]] = set()
        self._doubting = False
        self._noted: dict[Path, float] = {}

    def refresh(self) -> None:
        """Read manifest and commit logs again.

        Raises:
            StoreError: there are none, or the storage does not answer.
        """
        make_folder(self.folder)
        with self._alone():
            if not read_metadata(self._connection, self.folder, self._tags):
                raise no_store(self.url)

    def fetch(self, wanted: Sequence[Wanted]) -> Collection[Path]:
        """Have slot files here; which others had to go for them.

        Raises:
            CorruptShard: what lies there is not what was committed.
            StoreError: the storage does not answer, or the cache is too small.
        """
        return self._bring(inventory.slot_item(*each) for each in wanted if inventory.believable(each.shard, each.seal))

    def used(self, paths: Iterable[Path]) -> Collection[Path]:
        """Note that files are in use; which of them other processes have taken away meanwhile."""
        now, gone = time.monotonic(), []
        for path in paths:
            if self._noted.get(path, -math.inf) < now - NOTE_SECONDS:
                try:
                    os.utime(path)
                    self._noted[path] = now
                except FileNotFoundError:
                    gone.append(path)
        return gone

    def doubt(self) -> None:
        """Trust no file of the cache any more that was not read whole from here on."""
        self._doubting = True
        self._sound.clear()

    def part(self, rows: RowsInfo, number: int) -> None:
        """Have a Parquet file of the row table here."""
        self._bring([inventory.part_item(self.folder, rows, number)])

    def statics(self, pass_name: str, info: PassInfo) -> None:
        """Have the weights of a pass here."""
        self._bring(inventory.static_items(self.folder, pass_name, info))

    def shipped(self, pass_name: str) -> None:
        """Have the teacher's folder here, if one ships with the pass."""
        path = inventory.listing(self.folder, pass_name)
        make_folder(path.parent)
        with self._alone():
            if not _renew(self._connection, self.folder, [path], inventory.MOST_LIST_BYTES, self._tags):
                return
            items = inventory.listed_items(self.folder, pass_name, path)
        self._bring(items)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this process replaces what has no checksum to be known by, no other does, so that nothing older comes last."""
        with (self.folder / "refresh.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _bring(self, items: Iterable[Item]) -> set[Path]:
        """Have files here; which others had to go."""
        gone: set[Path] = set()
        left = [item for item in items if not self._here(item)]
        while left:
            now = _first(left, self._cache.most // _SHARE)
            late, left = self._bring_some(now, gone), left[len(now) :]
            if late and not left:
                time.sleep(_POLL)
            left += late
        return gone

    def _bring_some(self, items: Sequence[Item], gone: set[Path]) -> list[Item]:
        """Bring what no other process is bringing now; the rest."""
        busy, mine, claims = [], {}, []
        try:
            for item in items:
                make_folder(item.path.parent)
                if (handle := claim(layout.temporary(item.path))) is None:
                    busy.append(item)
                    continue
                claims.append((layout.temporary(item.path), handle))
                if not self._here(item):
                    mine[key_of(self.folder, item.path)] = item
                    os.ftruncate(handle, item.size or 0)
            if mine:
                self._download(mine, gone)
        finally:
            for temporary, handle in claims:
                temporary.unlink(missing_ok=True)
                os.close(handle)
        return busy

    def _download(self, items: dict[str, Item], gone: set[Path]) -> None:
        size = sum(item.size or 0 for item in items.values())
        gone |= self._cache.reserve(size, seconds())
        done = 0
        try:
            left = items
            for last in (False, True):  # what comes damaged is asked for once more
                bad = {}
                for answer in self._connection.run(
                    Get(key, str(layout.temporary(item.path)), item.size, item.most) for key, item in left.items()
                ):
                    item = items[answer.request.key]
                    if answer.error == "missing":
                        raise CorruptShard(f"{self.url}/{answer.request.key} is missing; upload the store again")
                    if answer.error:
                        raise self._connection.problem(answer)
                    if what := item.problem(layout.temporary(item.path)):
                        bad[answer.request.key] = item
                        if last:
                            where = f"{self.url}/{answer.request.key}"
                            raise CorruptShard(
                                f"{where} is not what was committed ({what}); verify the store that it comes from and upload it again"
                            )
                        continue
                    if item.size is None:
                        gone |= self._cache.reserve(answer.found["size"])
                    with contextlib.suppress(FileNotFoundError):
                        self._cache.give_back(item.path.stat().st_size)
                    layout.temporary(item.path).replace(item.path)
                    done += item.size or 0
                    self._noted[item.path] = time.monotonic()
                    self._sound.add((item.path, item.seal))
                if not (left := bad):
                    return
        finally:
            if done < size:
                self._cache.give_back(size - done)

    def _here(self, item: Item) -> bool:
        """Whether a file is in the cache and can be read."""
        try:
            size = item.path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return False
        if item.size not in (None, size):
            return False
        known = item.path, item.seal
        if (item.small or self._doubting) and known not in self._sound:
            if item.problem(item.path):
                return False
            self._sound.add(known)
        return item.path not in self.used([item.path])


def _first(items: Sequence[Item], most: int) -> Sequence[Item]:
    """As many of ``items`` as may come at a time, at least one."""
    size = 0
    for number, item in enumerate(items[:_TOGETHER]):
        size += item.size or 0
        if number and size > most:
            return items[:number]
    return items[:_TOGETHER]


def read_metadata(connection: Connection, folder: Path, tags: dict[Path, str] | None = None) -> bool:
    """Read the manifest and the commit logs of a store into ``folder``, as they are now; whether there is a manifest.

    Args:
        tags: What is known of the files in ``folder``: those that are the same are not read again.

    Raises:
        StoreError: there is no bucket, or the storage does not answer.
    """
    tags = {} if tags is None else tags
    make_folder(folder / "commits")
    there = bool(_renew(connection, folder, [layout.manifest(folder)], manifest.MOST_BYTES, tags))
    _renew(connection, folder, [layout.commit_table(folder)], lines.MOST_BYTES, tags)
    generation = lines.generation(folder)
    for first in count(0, _LOGS):  # writers are numbered without gaps
        logs = [layout.log(folder, writer, generation) for writer in range(first, first + _LOGS)]
        if len(_renew(connection, folder, logs, lines.MOST_BYTES, tags)) < len(logs):
            break
    return there


def _renew(connection: Connection, folder: Path, paths: Sequence[Path], most: int, tags: dict[Path, str]) -> list[Path]:
    """Read files again whose content changes; those that there are. What is in ``folder`` of the others is removed."""
    of_key, requests, found = {key_of(folder, path): path for path in paths}, [], []
    for key, path in of_key.items():
        layout.temporary(path).write_bytes(b"")
        requests.append(Get(key, str(layout.temporary(path)), None, most, tags.get(path) if path.exists() else None))
    for answer in connection.run(requests):
        path = of_key[answer.request.key]
        if answer.error and (answer.error != "missing" or "NoSuchBucket" in answer.text):
            raise connection.problem(answer)
        if answer.error:
            path.unlink(missing_ok=True)
        else:
            found.append(path)
            if not answer.found["same"]:
                layout.temporary(path).replace(path)
                tags[path] = answer.found["e_tag"]
        layout.temporary(path).unlink(missing_ok=True)
    return found
