"""Leases: which writer works on which shard, so that several at once share a dump and none waits for one that is gone.

A claim is ``claims/<pass>/<shard>.<epoch>``, a hard link to the lock file of its writer's place (store.locks). So whoever opens
it can ask whether the writer lives (the lock is held), whether it works (its time of change moves; a thread sees to that)
and who it is. A claim whose writer has ended, or has not renewed it for EXPIRES seconds of the asker's own clock, is taken over
under the next epoch. A shard is committed under the turn of its writer, and nobody takes a claim over from a writer that has the
turn: once a claim is gone, its old writer cannot publish any more, however late it wakes up.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from store import layout, locks
from store.errors import StoreBusy, StoreError
from store.locks import Place
from store.plain import open_plain, why

EXPIRES = 120.0
"""Seconds without renewal after which a claim may be taken over; longer than network file systems keep times of change for."""

RENEW = 10.0
"""Seconds from one renewal to the next."""

_CLAIM = re.compile(r"(\d{1,18})\.(\d{1,18})")


class Leases:
    """The claims of one writer."""

    def __init__(self, store: Path, place: Place) -> None:
        self._store = store
        self._place = place
        self._lock = layout.lock(store, place.number)
        self._epochs: dict[tuple[str, int], int] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        """Inode of another writer's lock -> its time of change, and when it was first seen."""
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def __contains__(self, claim: tuple[str, int]) -> bool:
        return claim in self._epochs

    def claim(self, pass_name: str, shards: Iterable[int], done: Callable[[], Container[int]], at_most: int) -> list[int]:
        """Up to so many of ``shards``, in order, that are not done and that no other writer works on; this one does from now on.

        ``done`` tells which are committed now. It is asked while nobody else can claim, and after what is claimed was looked at,
        because a shard that is done is given up afterwards.
        """
        folder = layout.inside(self._store, layout.claims(self._store, pass_name))
        mine: list[int] = []
        with locks.turn(self._store, layout.claims_lock(self._store)):
            try:
                folder.mkdir(exist_ok=True)
                held = _claims(folder)
                committed = done()
                for shard in (shard for shard in shards if shard not in committed):
                    if len(mine) == at_most:
                        break
                    if (pass_name, shard) not in self._epochs and self._take(folder, shard, held.get(shard, [])):
                        self._epochs[pass_name, shard] = max(held.get(shard, [0])) + 1
                        mine.append(shard)
                for shard in (shard for shard in held if shard in committed):  # a killed writer may have left some
                    _remove(folder, shard, held[shard])
            except OSError as error:
                raise StoreError(f"cannot write to {folder}: {why(error)}; make room or rights and start again") from error
        if mine and self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="renew leases", daemon=True)
            self._renewing.start()
        return mine

    def check(self, pass_name: str, shard: int) -> None:
        """Raise StoreBusy if a shard that this writer had claimed has been taken over."""
        if (epoch := self._epochs.get((pass_name, shard))) is None:
            return
        claim = self._path(pass_name, shard)
        if claim.with_name(f"{shard}.{epoch + 1}").exists() or not _same(claim, self._place.lock):
            del self._epochs[pass_name, shard]
            raise StoreBusy(
                f"shard {shard} of pass {pass_name} was taken over by another process, because this one had not renewed its "
                f"claim for {EXPIRES:g} s (was it stopped?); start the same command again"
            )

    @contextlib.contextmanager
    def publishing(self, pass_name: str, shard: int) -> Iterator[None]:
        """Have the turn: nobody takes the claim on a shard over meanwhile; StoreBusy if somebody has already."""
        with locks.turn(self._store, layout.turn_lock(self._store, self._place.number)):
            self.check(pass_name, shard)
            yield

    def release(self, pass_name: str, shard: int) -> None:
        """Give a shard up that is committed, or will not be."""
        if _same(claim := self._path(pass_name, shard), self._place.lock):
            claim.unlink(missing_ok=True)
        del self._epochs[pass_name, shard]

    def close(self) -> None:
        """Give up what is left."""
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join()
        for claim in list(self._epochs):
            with contextlib.suppress(OSError):
                self.release(*claim)

    def clear(self) -> None:
        """Remove claims of the process that had this writer's place before, and left without giving them up."""
        for folder in (layout.claims_lock(self._store).parent).glob("*/"):
            for shard, epochs in _claims(folder).items():
                for claim in (folder / f"{shard}.{epoch}" for epoch in epochs):
                    if _same(claim, self._place.lock):
                        claim.unlink(missing_ok=True)

    def _path(self, pass_name: str, shard: int) -> Path:
        return layout.claims(self._store, pass_name) / f"{shard}.{self._epochs[pass_name, shard]}"

    def _take(self, folder: Path, shard: int, epochs: list[int]) -> bool:
        """Claim a shard that has claims of ``epochs`` (ascending); whether it could be had."""
        if not epochs:
            return self._link(folder / f"{shard}.1")
        newest, free = folder / f"{shard}.{epochs[-1]}", folder / f"{shard}.{epochs[-1] + 1}"
        try:
            handle = open_plain(newest)
        except FileNotFoundError:
            return False  # given up just now
        try:
            if not locks.is_held(handle):  # nor can anyone hold it before the handle is closed
                taken = self._link(free)
            elif self._expired(handle) and (writer := locks.holder(handle).place) is not None:
                with locks.turn(self._store, layout.turn_lock(self._store, writer), patience=0):
                    taken = newest.exists() and self._link(free)
            else:
                return False
        except StoreBusy:  # it hangs while it commits
            return False
        finally:
            os.close(handle)
        if taken:
            _remove(folder, shard, epochs)
        return taken

    def _link(self, claim: Path) -> bool:
        try:
            os.link(self._lock, claim)
        except FileExistsError:  # or the file system made it and its answer was lost
            return _same(claim, self._place.lock)
        return True

    def _expired(self, lock: int) -> bool:
        """Whether the writer that holds an open lock has not renewed it for so long, as far as this process has seen."""
        about, now = os.fstat(lock), time.monotonic()
        changed, since = self._seen.get(about.st_ino, (-1, now))
        if changed != about.st_mtime_ns:
            self._seen[about.st_ino] = about.st_mtime_ns, now
            return False
        return now - since > EXPIRES

    def _renew(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(OSError):
                os.utime(self._place.lock)


def _claims(folder: Path) -> dict[int, list[int]]:
    """Shard -> epochs of its claims, ascending; the last one counts."""
    found: dict[int, list[int]] = {}
    for entry in os.scandir(folder):
        if match := _CLAIM.fullmatch(entry.name):
            found.setdefault(int(match[1]), []).append(int(match[2]))
    return {shard: sorted(epochs) for shard, epochs in found.items()}


def _remove(folder: Path, shard: int, epochs: list[int]) -> None:
    for epoch in epochs:
        (folder / f"{shard}.{epoch}").unlink(missing_ok=True)


def _same(claim: Path, lock: int) -> bool:
    """Whether a claim is that of the writer with this open lock."""
    try:
        return os.path.samestat(claim.lstat(), os.fstat(lock))
    except FileNotFoundError:
        return False
