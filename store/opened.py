"""Slot files, open for reading: memory maps where the file system is local, and every chunk checked when first touched.

A file's size, index and list of checksums are checked when it is opened, a chunk's bytes when it is first read: a reader
checks each byte once, and its first batch need not wait until whole shards are read. What was checked is remembered when
a file is closed to make place for another.
"""

import mmap
import os
import resource
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.filesystem import is_network
from store.publish import crc32c
from store.shards import CRC_BYTES, Seal, Shard, numpy_dtype

DECODED_BYTES = 256 << 20
"""Memory for decompressed chunks that may be read again soon."""


Bytes = bytes | NDArray[np.uint8]


class Chunks(Protocol):
    """Values of a slot file: ``chunks[c, first:after]`` are units of chunk c, [after - first, width]."""

    def __getitem__(self, place: tuple[int, slice]) -> NDArray[Any]: ...


class SlotFiles:
    """The slot files of one store that a process has open: as many as its limit of file descriptors allows."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._mapped = not is_network(store)  # where another machine drops a file, touching a map of it would end the process
        self._open: OrderedDict[tuple[Path, int], SlotFile] = OrderedDict()
        self._checked: dict[tuple[Path, int, Seal], NDArray[np.bool_]] = {}
        self._decoded: OrderedDict[tuple[Path, Seal, int], NDArray[Any]] = OrderedDict()
        self._decoded_bytes = 0
        self._folders: set[Path] = set()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, folder: Path, slot: int, find: Callable[[int], tuple[Shard, Seal | None]], mend: str, dimensions: int = 2) -> "SlotFile":
        """The file of ``slot`` in the array at ``folder``; ``find`` says what it must be, ``mend`` what to do if it is not.

        Raises:
            CorruptShard: it is missing, of another size, or not what was committed.
        """
        if file := self._open.get((folder, slot)):
            self._open.move_to_end((folder, slot))
            return file
        shard, seal = find(slot)
        path = layout.slot_file(folder, slot, dimensions)
        if folder not in self._folders:
            layout.inside(self.store, folder)
            self._folders.add(folder)
        if seal is None:
            raise CorruptShard(f"{path}: nothing was committed for it; {mend}")
        checked = self._checked.setdefault((folder, slot, seal), np.zeros(shard.chunks, np.bool_))
        file = self._open[folder, slot] = SlotFile(path, shard, seal, mend, self._mapped, checked, self._decode)
        if len(self._open) > _most_open():
            self._open.popitem(last=False)
        return file

    def _decode(self, file: "SlotFile", chunk: int) -> NDArray[Any]:
        """A decompressed chunk [C, W], kept for a while."""
        place = file.path, file.seal, chunk
        if (values := self._decoded.get(place)) is None:
            values = self._decoded[place] = file.decode(chunk)
            self._decoded_bytes += values.nbytes
            while self._decoded_bytes > DECODED_BYTES and len(self._decoded) > 1:
                self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        else:
            self._decoded.move_to_end(place)
        return values


class SlotFile:
    """One slot file as committed; raises CorruptShard where it is not.

    Args:
        mend: What to do then.
        mapped: Whether to map the file, or else read it piece by piece.
        checked: [chunks] which of them have been compared with their checksum; kept up to date.
        decode: Where decompressed chunks come from; by default they are decompressed anew each time.
    """

    def __init__(
        self,
        path: Path,
        shard: Shard,
        seal: Seal,
        mend: str = "",
        mapped: bool = True,
        checked: NDArray[np.bool_] | None = None,
        decode: "Callable[[SlotFile, int], NDArray[Any]] | None" = None,
    ) -> None:
        self.path, self.shard, self.seal, self._mend = path, shard, seal, mend
        self._checked = np.zeros(shard.chunks, np.bool_) if checked is None else checked
        self._sound = bool(self._checked.all())
        handle = self._descriptor(seal)
        if mapped:
            try:
                data = np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), np.uint8)
            finally:
                os.close(handle)
            self._between: Callable[[int, int], Bytes] = lambda start, stop: data[start:stop]
        else:
            weakref.finalize(self, os.close, handle)
            self._between = lambda start, stop: _pread(handle, start, stop)
        bounds = shard.bounds(bytes(self._between(seal.size - shard.index_bytes, seal.size)))
        if bounds is None or bounds[-1] + shard.index_bytes != seal.size:
            raise self._corrupt("the chunk index is damaged")
        self._bounds = bounds
        sums = b"".join(bytes(self._between(stop - CRC_BYTES, stop)) for stop in bounds[1:].tolist())
        if crc32c(sums) != seal.crc32c:
            raise self._corrupt("the file is not the one that was committed")
        self._checksums = np.frombuffer(sums, "<u4").tolist()
        self.chunks: Chunks = shard.view(data) if mapped and shard.raw else _Fetched(self, decode or SlotFile.decode)

    @property
    def sound(self) -> bool:
        """Whether every chunk has been checked."""
        if not self._sound:
            self._sound = bool(self._checked.all())
        return self._sound

    def checked(self, chunk: int) -> bool:
        """Whether a chunk has been checked."""
        return bool(self._checked[chunk])

    def check(self, chunk: int) -> Bytes:
        """The bytes of a chunk as they stand in the file, compared with their checksum; raises CorruptShard."""
        start, stop = self._bounds[chunk : chunk + 2].tolist()
        data = self._between(start, stop - CRC_BYTES)
        if crc32c(data) != self._checksums[chunk]:
            raise self._corrupt(f"chunk {chunk} fails its checksum")
        self._checked[chunk] = True
        return data

    def raw(self, chunk: int, first: int, after: int) -> NDArray[Any]:
        """Units of an uncompressed chunk that was checked before."""
        start, unit = int(self._bounds[chunk]), self.shard.unit_bytes
        return self._values(self._between(start + first * unit, start + after * unit))

    def decode(self, chunk: int) -> NDArray[Any]:
        """The units of a whole chunk [C, W]."""
        data = self.check(chunk)
        if self.shard.raw:
            return self._values(data)
        values = self.shard.decoded(bytes(data))
        if values is None:
            raise self._corrupt(f"chunk {chunk} cannot be decompressed")
        return values

    def _values(self, data: Bytes) -> NDArray[Any]:
        return np.frombuffer(data, numpy_dtype(self.shard.array)).reshape(-1, self.shard.array.width)

    def _descriptor(self, seal: Seal) -> int:
        """An open file of the right size, that no link led to."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise self._corrupt("the file is missing") from None
        except OSError as error:
            raise self._corrupt(f"it cannot be opened as a plain file ({error.strerror})") from None
        about = os.fstat(handle)
        wanted = self.shard.size if self.shard.raw else seal.size
        if not stat.S_ISREG(about.st_mode) or not about.st_size == seal.size == wanted <= self.shard.size:
            os.close(handle)
            raise self._corrupt(f"expected {wanted} bytes, found {about.st_size}")
        return handle

    def _corrupt(self, what: str) -> CorruptShard:
        return CorruptShard(f"{self.path}: {what}; {self._mend}" if self._mend else f"{self.path}: {what}")


class _Fetched:
    """Chunks of a file that is not mapped, or compressed."""

    def __init__(self, file: SlotFile, decode: Callable[[SlotFile, int], NDArray[Any]]) -> None:
        self._file, self._decode = weakref.ref(file), decode

    def __getitem__(self, place: tuple[int, slice]) -> NDArray[Any]:
        file = self._file()
        assert file is not None
        chunk, units = place
        if file.shard.raw:
            return file.raw(chunk, units.start, units.stop) if file.checked(chunk) else file.decode(chunk)[units]
        return self._decode(file, chunk)[units]


def _pread(handle: int, start: int, stop: int) -> bytes:
    data = b""
    while len(data) < stop - start and (more := os.pread(handle, stop - start - len(data), start + len(data))):
        data += more
    return data


def _most_open() -> int:
    """How many files may be open at a time: others need descriptors too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(4096, soft // 2)
