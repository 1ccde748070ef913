"""Who may change a store: one process as a whole, or several writers, each in a numbered place of its own.

These are advisory locks of whole files (flock), which go with their process however it ends. The file system must show
them to all machines that write at once, as local ones, NFS and Lustre (mounted with ``flock``) do. Readers need none.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from store import layout
from store.errors import StoreBusy, StoreError
from store.plain import open_plain, why

PATIENCE = 0.25
"""Seconds to wait for a lock before it counts as taken."""

LONG_PATIENCE = 600.0
"""Seconds to wait for what others do in a while: folding the commit logs, announcing a pass and shipping its weights."""

_POLL = 0.01
_SIGNED = 256
"""Bytes of a signature: of one length, so that one takes the place of another without the file being cut, which ext4 is slow at."""
_FREE = "wait for it to end, or stop it, and start again"


class Place(NamedTuple):
    """Where a writer writes: its number, and the open file whose lock says that it lives."""

    number: int
    lock: int


class Holder(NamedTuple):
    """What a lock's file says of the process that locked it last."""

    text: str
    """As in "another process (4711 on node7)"."""
    brief: bool
    """Whether it said that it would not be long."""
    place: int | None
    """The number of its place, where it is the lock of one."""


@contextlib.contextmanager
def exclusive(store: Path, brief: bool = False) -> Iterator[None]:
    """Hold the whole store, to change what writers only add to: manifest, rows, drops, repairs, the table of commits.

    Args:
        brief: Others may wait for the end of it.

    Raises:
        StoreBusy: another process writes to the store; the message says which.
    """
    with _opened(store, layout.store_lock(store)) as lock:
        if not _taken(lock, fcntl.LOCK_EX):
            raise StoreBusy(f"{_whom(store, lock)} is writing to {store}; {_FREE}")
        _sign(lock, brief)
        yield


@contextlib.contextmanager
def place(store: Path) -> Iterator[Place]:
    """Write beside other writers: hold the lowest free place.

    Raises:
        StoreBusy: another process holds the whole store.
    """
    with _opened(store, layout.store_lock(store)) as shared:
        if not _taken(shared, fcntl.LOCK_SH):
            raise StoreBusy(f"{_whom(store, shared)} is writing to {store}; {_FREE}")
        for number in count():
            with _opened(store, layout.lock(store, number)) as lock:
                if _locked(lock, fcntl.LOCK_EX):
                    _sign(lock, number=number)
                    yield Place(number, lock)
                    return


@contextlib.contextmanager
def turn(store: Path, file: Path, patience: float = LONG_PATIENCE) -> Iterator[None]:
    """Hold the lock of ``file`` for a moment.

    Raises:
        StoreBusy: another process does not let go of it.
    """
    with _opened(store, file) as lock:
        if not _taken(lock, fcntl.LOCK_EX, patience):
            raise StoreBusy(f"{holder(lock).text} has held {file} for more than {patience:g} s; look whether it hangs, then start again")
        _sign(lock)
        yield


def is_held(handle: int) -> bool:
    """Whether another process holds the lock of an open file. Where it does not, nobody can take it until the file is closed."""
    return not _locked(handle, fcntl.LOCK_SH)


def places(store: Path) -> Iterator[int]:
    """Numbers of the places that writers have, or once had."""
    return takewhile(lambda number: layout.lock(store, number).exists(), count())


def at_work(store: Path, aside: int | None = None) -> dict[int, str]:
    """Place -> process that holds it, without the place that is set ``aside``."""
    found = {}
    for number in places(store):
        lock = open_plain(layout.lock(store, number))
        try:
            if number != aside and is_held(lock):
                found[number] = holder(lock).text
        finally:
            os.close(lock)
    return found


def holder(lock: int) -> Holder:
    """Who signed the open file of a lock last."""
    try:
        signed = json.loads(os.pread(lock, _SIGNED, 0))
        text = f"another process ({int(signed['pid'])} on {signed['host']})"
        return Holder(text, bool(signed["brief"]), None if signed["place"] is None else int(signed["place"]))
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return Holder("another process", False, None)


def _whom(store: Path, lock: int) -> str:
    """Who keeps this process from locking the store's lock: writers, which share it, or one that holds it alone."""
    return holder(lock).text if is_held(lock) else next(iter(at_work(store).values()), "another process")


@contextlib.contextmanager
def _opened(store: Path, path: Path) -> Iterator[int]:
    try:
        layout.inside(store, path.parent).mkdir(exist_ok=True)
        lock = open_plain(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StoreError(f"cannot write to {store}: {path.name}: {why(error)}; check its rights") from error
    try:
        yield lock
    finally:
        os.close(lock)


def _taken(lock: int, kind: int, patience: float = PATIENCE) -> bool:
    """Lock an open file, waiting up to ``patience`` seconds, or longer for a holder that will be brief."""
    start = time.monotonic()
    while not _locked(lock, kind):
        if time.monotonic() - start > (LONG_PATIENCE if _is_brief(lock) else patience):
            return False
        time.sleep(_POLL)
    return True


def _locked(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"cannot lock {_name(lock)}: {error.strerror}; look whether its file system is mounted with locks (flock)"
        ) from error
    return True


def _name(handle: int) -> str:
    """The path of an open file, where Linux tells it."""
    try:
        return str(Path(f"/proc/self/fd/{handle}").readlink())
    except OSError:
        return "a file of the store"


def _is_brief(lock: int) -> bool:
    """Whether one process alone holds the lock and said that it would not be long."""
    if is_held(lock):
        return holder(lock).brief
    fcntl.flock(lock, fcntl.LOCK_UN)  # two that wait for a lock must not share it meanwhile
    return False


def _sign(lock: int, brief: bool = False, number: int | None = None) -> None:
    """Say in the file who holds its lock, as far as the disk has room."""
    signed = {"pid": os.getpid(), "host": socket.gethostname()[:100], "brief": brief, "place": number}
    with contextlib.suppress(OSError):
        os.pwrite(lock, json.dumps(signed).encode().ljust(_SIGNED), 0)
