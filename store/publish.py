"""Files that appear whole or not at all, also when the machine stops in the middle."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
from numpy.typing import NDArray

from store import layout
from store.errors import StoreError

Bytes = bytes | NDArray[Any]
"""Bytes to write: an array must be contiguous."""

_BUFFER = 1 << 20


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
        _write(temporary, pieces)
        os.link(temporary, path)
        temporary.unlink()
        sync_folder(path.parent)
    except FileExistsError:
        temporary.unlink()
        raise StoreError(f"{path} exists already: another process wrote it; check with teacher-dump verify") from None
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {path}: {error.strerror}; make room or rights and start again, what is committed is kept"
        ) from error


def replace(path: Path, data: bytes, writer: int = 0) -> None:
    """Put ``data`` at ``path``, durably, whether or not there is a file."""
    temporary = layout.temporary(path, writer)
    try:
        _write(temporary, [data])
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {path}: {error.strerror}; make room or rights and start again, what is committed is kept"
        ) from error


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


def _write(path: Path, pieces: Iterable[Bytes]) -> None:
    with path.open("wb", buffering=_BUFFER) as file:
        for piece in pieces:
            file.write(piece if isinstance(piece, bytes) else piece.data)
        file.flush()
        os.fsync(file.fileno())
