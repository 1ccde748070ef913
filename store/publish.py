"""Files that appear whole or not at all, also when the machine stops in the middle."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
from numpy.typing import NDArray

from store import layout
from store.errors import StoreError
from store.plain import open_plain

Bytes = bytes | NDArray[Any]
"""Bytes to write: an array must be contiguous."""

_BUFFER = 1 << 20

SYNCS = 4
"""Files that are made durable at once. A dozen of 4 MB took 60 to 120 ms one after the other, and 40 ms this way."""


def crc32c(data: Bytes, before: int = 0) -> int:
    """Checksum of ``data``, a contiguous array or bytes; ``before`` is that of the bytes in front of it."""
    return int(google_crc32c.extend(before, data))


def publish(path: Path, pieces: Iterable[Bytes], writer: int = 0) -> None:
    """Write ``pieces`` to a new file ``path``, durably: temporary file, fsync, link, fsync of the folder.

    Linking fails where ``path`` exists, so that a writer that lost its place cannot replace what another committed.

    Raises:
        StoreError: ``path`` exists, or cannot be written (disk full, no rights).
    """
    temporary = layout.temporary(path, writer)
    try:
        with writing(path):
            _write(temporary, pieces)
            sync_file(temporary)
            _name(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class Batch:
    """New files that get their names together, so that the disk works on all of them at once.

    A file is on its way to the disk while the next is written. Leaving without :meth:`settle` takes back what there is.
    """

    def __init__(self, pool: ThreadPoolExecutor, writer: int = 0) -> None:
        """Args: pool: Its threads (SYNCS) wait for the disk."""
        self._pool = pool
        self._writer = writer
        self._paths: list[Path] = []
        self._named: list[Path] = []
        self._syncing: list[Future[None]] = []

    def add(self, path: Path, pieces: Iterable[Bytes]) -> None:
        """Write the temporary file of ``path``; StoreError where that fails."""
        temporary = layout.temporary(path, self._writer)
        self._paths.append(path)
        with writing(path):
            _write(temporary, pieces)
            self._syncing.append(self._pool.submit(sync_file, temporary))

    def prepare(self) -> None:
        """Wait until the content of every file is durable; StoreError where that fails."""
        for path, syncing in zip(self._paths, self._syncing, strict=True):
            with writing(path):
                syncing.result()

    def settle(self) -> None:
        """Give every file its name, durably.

        Raises:
            StoreError: a name is taken, or a file cannot be written.
        """
        self.prepare()
        for path in self._paths:
            with writing(path):
                _name(layout.temporary(path, self._writer), path)
                self._named.append(path)
        folders = list(dict.fromkeys(path.parent for path in self._paths))
        for folder, syncing in [(folder, self._pool.submit(sync_folder, folder)) for folder in folders]:
            with writing(folder):
                syncing.result()
        self._paths, self._named, self._syncing = [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wait(self._syncing)
        for path in (*self._named, *(layout.temporary(path, self._writer) for path in self._paths)):
            path.unlink(missing_ok=True)


def replace(path: Path, data: bytes, writer: int = 0) -> None:
    """Put ``data`` at ``path``, durably, whether or not there is a file."""
    temporary = layout.temporary(path, writer)
    try:
        with writing(path):
            _write(temporary, [data])
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    except StoreError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make names that were added to ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and what is missing above it, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Make the content of ``path`` durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_crc32c(path: Path) -> int:
    """Checksum of the file ``path``, read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(_BUFFER):
            crc = crc32c(data, crc)
    return crc


def _write(temporary: Path, pieces: Iterable[Bytes]) -> None:
    with os.fdopen(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb", buffering=_BUFFER) as file:
        for piece in pieces:
            file.write(piece if isinstance(piece, bytes) else piece.data)


def _name(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise StoreError(f"{path} exists already: another process wrote it; check with teacher-dump verify") from None
    temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk while ``path`` is written, as a StoreError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; make room or rights and start again, what is committed is kept"
        ) from error
