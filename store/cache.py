"""Whole files of remote stores on this machine: one folder with a limit, that all processes share.

Below it each store has a folder that is laid out like the store itself. When the limit is reached, files that have not been
used for longest go; whoever has one mapped keeps it until it is closed. Manifests and commit logs do not count, and what
ships of a teacher stays for a day after its last use, because other libraries open it file by file.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from store.errors import StoreError
from store.plain import open_plain

FOLDER = "TEACHERCACHE_CACHE"
"""Environment variable: the folder; by default ~/.cache/teachercache."""
SIZE = "TEACHERCACHE_CACHE_SIZE"
"""Environment variable: how much all files may take, such as 200GB or 1TB."""
_SIZE = "100GB"

DAY = 86400.0
ROOM = 0.9
"""Once files have to go, they go until so much of the limit is taken: looking through all of them takes a while."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_WAIT = 0.05


class _File(NamedTuple):
    """A file that counts."""

    used: float
    size: int
    path: Path
    kept: bool
    """Whether it may not go now."""
    coming: bool
    """Whether it is still being read."""


class Cache:
    """The folder; ``most`` bytes is its limit."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise StoreError(f"cannot write to the cache {folder}: {error.strerror}; name another folder in {FOLDER}") from None

    @classmethod
    def from_environment(cls) -> "Cache":
        """The cache that $TEACHERCACHE_CACHE and $TEACHERCACHE_CACHE_SIZE name.

        Raises:
            StoreError: they make no sense, or the folder cannot be written.
        """
        text = os.environ.get(SIZE, _SIZE)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
        if found is None or not (most := int(float(found[1]) * _UNITS[found[2] if found[2] not in (None, "B") else ""])):
            raise StoreError(f"{SIZE}: expected a size such as 200GB, found {text!r}")
        return cls(Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "teachercache"), most)

    def folder_of(self, url: str) -> Path:
        """Where the store at ``url`` lies; the same address at another endpoint is another store."""
        place = "\n".join([url, *(os.environ.get(name, "") for name in _ENDPOINTS)])
        name = re.sub(r"[^A-Za-z0-9.]+", "-", url).strip("-.")[-60:].strip("-.")
        return self.folder / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"

    def reserve(self, size: int, patience: float = 0.0) -> set[Path]:
        """Make room for temporary files of ``size`` bytes, which have that size already; which files had to go.

        Args:
            patience: Seconds to wait where files of other processes are in the way that cannot go, because they still come.

        Raises:
            StoreError: there can be no such room.
        """
        gone: set[Path] = set()
        end = time.monotonic() + patience
        with self._counted() as count:
            count.total += size
            if count.total <= self.most:
                return gone
        while True:
            with self._counted() as count:
                files = sorted(self._files())
                count.total = sum(file.size for file in files)
                if size + sum(file.size for file in files if file.kept) > self.most:
                    raise StoreError(
                        f"the cache {self.folder} may hold {self.most:,} bytes, and {size:,} more do not fit beside what has to stay; "
                        f"set {SIZE} to more, or remove folders in it that are not needed"
                    )
                for file in files:
                    if count.total <= max(ROOM * self.most, size):
                        break
                    if not file.kept and not file.coming:
                        file.path.unlink(missing_ok=True)
                        gone.add(file.path)
                        count.total -= file.size
                if count.total <= self.most or time.monotonic() >= end:
                    return gone
            time.sleep(_WAIT)

    def give_back(self, size: int) -> None:
        """Say that ``size`` bytes are not, or no more, taken."""
        with self._counted() as count:
            count.total = max(0, count.total - size)

    @property
    def _lock(self) -> Path:
        return self.folder / "total.lock"

    @contextlib.contextmanager
    def _counted(self) -> Iterator["_Count"]:
        """How many bytes there are, for one process at a time."""
        handle = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            text = os.pread(handle, 32, 0).strip()
            count = _Count(int(text) if text.isdigit() else 0)
            try:
                yield count
            finally:
                os.pwrite(handle, b"%-31d\n" % count.total, 0)
        finally:
            os.close(handle)

    def _files(self) -> Iterator[_File]:
        """All files that count. Temporary ones whose process has ended are removed."""
        now = time.time()
        for store in self.folder.iterdir():
            if not store.is_dir():
                continue
            for folder, folders, names in os.walk(store):
                top = Path(folder).relative_to(store).parts[:1]
                if not top:
                    folders[:] = [name for name in folders if name != "commits"]
                    continue  # the manifest
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        about = path.stat()
                        coming = name.startswith(".") and name.endswith(".tmp")
                        if coming and (lock := claim(path)) is not None:
                            path.unlink()
                            os.close(lock)
                            continue
                        kept = top == ("model",) and about.st_mtime > now - DAY
                        yield _File(about.st_mtime, about.st_size, path, kept, coming)


class _Count:
    def __init__(self, total: int) -> None:
        self.total = total


def claim(path: Path) -> int | None:
    """An open temporary file that no other process writes to before it is closed; None where one does."""
    handle = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(handle).st_ino:  # noqa: PTH116 - beside fstat
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # another process has it, or has just given it its name
    os.close(handle)
    return None
