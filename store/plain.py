"""Plain files and nothing else: a store may come from anyone, with links, pipes or devices where files should be.

Nothing here blocks, follows a link, or reads more than was agreed to. What is wrong comes as an OSError, for callers to
say whose file it is and what mends it; :func:`why` gives its words.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 20

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the plain file ``path``; to create it, ``flags`` hold O_CREAT."""
    try:
        _require_plain(path.lstat().st_mode, path)  # before opening: that alone makes some devices act
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _require_plain(os.fstat(handle).st_mode, path)
    except OSError:
        os.close(handle)
        raise
    return handle


def read_plain(path: Path, most: int) -> bytes:
    """The content of a plain file of at most so many bytes."""
    with os.fdopen(open_plain(path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, found {size:,}", str(path))
        return file.read(size)  # Python takes as much memory as it is told to read


def pieces(handle: int, size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of an open file, piece by piece, wherever it stands; an OSError where it is shorter."""
    done = 0
    while done < size:
        piece = os.pread(handle, min(_PIECE, size - done), done)
        if not piece:
            raise OSError(errno.EIO, f"expected {size} bytes, found {done}")
        yield piece
        done += len(piece)


def why(error: OSError) -> str:
    """What is wrong with the file that ``error`` is about."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "the file is missing"
    if error.errno == errno.ESTALE:
        return "the file was taken away while it was read"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    return error.strerror or str(error)


def _require_plain(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"expected a plain file, found {kind}", str(path))
