"""One slot file, open for reading: a memory map where the file system is local, and every chunk checked when first touched.

A file's size, index and list of checksums are checked when it is opened, a chunk's bytes when it is first read: a reader
checks each byte once, and its first batch need not wait until whole shards are read.
"""

import errno
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from store.errors import CorruptShard
from store.plain import open_plain, why
from store.publish import crc32c
from store.shards import CRC_BYTES, Seal, Shard, numpy_dtype

Bytes = bytes | NDArray[np.uint8]


class Chunks(Protocol):
    """Values of a slot file: ``chunks[c, first:after]`` are units of chunk c, [after - first, width]."""

    def __getitem__(self, place: tuple[int, slice]) -> NDArray[Any]: ...


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
        handle = self._descriptor()
        if mapped:
            try:
                data = np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), np.uint8)
            finally:
                os.close(handle)
            self._fetch: Callable[[int, int], Bytes] = lambda start, stop: data[start:stop]
        else:
            weakref.finalize(self, os.close, handle)
            self._fetch = lambda start, stop: _pread(handle, start, stop)
        bounds = shard.bounds(bytes(self._between(seal.size - shard.index_bytes, seal.size)))
        if bounds is None or bounds[-1] + shard.index_bytes != seal.size:
            raise self._corrupt("the chunk index is damaged")
        self._bounds = bounds
        if mapped and shard.raw and shard.chunks:
            sums = np.ndarray(shard.chunks, "<u4", data.data, shard.stride - CRC_BYTES, (shard.stride,)).tobytes()
        else:
            sums = b"".join(bytes(self._between(stop - CRC_BYTES, stop)) for stop in bounds[1:].tolist())
        if crc32c(sums) != seal.crc32c:
            raise self._corrupt("the file is not the one that was committed")
        self._checksums = np.frombuffer(sums, "<u4")
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
        """The bytes of a chunk as they stand in the file; raises CorruptShard where they fail their checksum, or hold words that do
        not exist: readers look words up by them."""
        start, stop = self._bounds[chunk : chunk + 2].tolist()
        data = self._between(start, stop - CRC_BYTES)
        if crc32c(data) != self._checksums[chunk]:
            raise self._corrupt(f"chunk {chunk} fails its checksum")
        if self.shard.words is not None and (word := self.shard.word_beyond(self._decoded(chunk, data))) is not None:
            raise self._corrupt(f"chunk {chunk} holds the word {word}, expected ids below {self.shard.words}, the teacher's vocabulary")
        self._checked[chunk] = True
        return data

    def raw(self, chunk: int, first: int, after: int) -> NDArray[Any]:
        """Units of an uncompressed chunk that was checked before."""
        start, unit = int(self._bounds[chunk]), self.shard.unit_bytes
        return self._values(self._between(start + first * unit, start + after * unit))

    def decode(self, chunk: int) -> NDArray[Any]:
        """The units of a whole chunk [C, W]."""
        start, stop = self._bounds[chunk : chunk + 2].tolist()
        return self._decoded(chunk, self._between(start, stop - CRC_BYTES) if self.checked(chunk) else self.check(chunk))

    def _decoded(self, chunk: int, data: Bytes) -> NDArray[Any]:
        if self.shard.raw:
            return self._values(data)
        values = self.shard.decoded(bytes(data))
        if values is None:
            raise self._corrupt(f"chunk {chunk} cannot be decompressed")
        return values

    def _values(self, data: Bytes) -> NDArray[Any]:
        return np.frombuffer(data, numpy_dtype(self.shard.array)).reshape(-1, self.shard.array.width)

    def _descriptor(self) -> int:
        """An open plain file of the right size."""
        shard, seal = self.shard, self.seal
        if not (seal.size == shard.size if shard.raw else shard.index_bytes <= seal.size <= shard.size):
            wanted = f"{shard.size}" if shard.raw else f"{shard.index_bytes} to {shard.size}"
            raise self._corrupt(f"expected {wanted} bytes, found {seal.size} in the commit log")
        try:
            handle = open_plain(self.path)
        except OSError as error:
            raise self._corrupt(why(error)) from None
        if (found := os.fstat(handle).st_size) != seal.size:
            os.close(handle)
            raise self._corrupt(f"expected {seal.size} bytes, found {found}")
        return handle

    def _between(self, start: int, stop: int) -> Bytes:
        try:
            return self._fetch(start, stop)
        except OSError as error:
            raise self._corrupt(why(error)) from None

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
    while len(data) < stop - start:
        more = os.pread(handle, stop - start - len(data), start + len(data))
        if not more:
            raise OSError(errno.EIO, "the file was cut short while it was read")
        data += more
    return data
