"""Slot files, open for reading: memory maps where the file system is local, and every chunk checked when first touched.

A file's size, index and list of checksums are checked when it is opened, a chunk's bytes when it is first read: a reader
checks each byte once, and its first batch need not wait until whole shards are read. What was checked is remembered when
a file is closed to make place for another.
"""

import errno
import mmap
import os
import resource
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.filesystem import is_network
from store.plain import open_plain, why
from store.publish import crc32c
from store.shards import CRC_BYTES, Seal, Shard, numpy_dtype

DECODED_BYTES = 256 << 20
"""Memory for decompressed chunks that may be read again soon."""


Bytes = bytes | NDArray[np.uint8]

MOST_OPEN = 1 << 14
"""Files that are open at a time; each takes a few KB of memory."""

Run = tuple[int, tuple[int, slice]]
"""Units that lie side by side: their slot, and chunk and place inside it."""


class Chunks(Protocol):
    """Values of a slot file: ``chunks[c, first:after]`` are units of chunk c, [after - first, width]."""

    def __getitem__(self, place: tuple[int, slice]) -> NDArray[Any]: ...


class Wanted(NamedTuple):
    """A slot file as it was committed."""

    path: Path
    shard: Shard
    seal: Seal


class Supply(Protocol):
    """Where slot files come from that are not on this machine (store.mirror)."""

    def fetch(self, wanted: Sequence[Wanted]) -> Collection[Path]:
        """Have files here; which others had to go for them."""

    def used(self, paths: Iterable[Path]) -> Collection[Path]:
        """Note that files are in use; which of them have gone meanwhile."""


class SlotFiles:
    """The slot files of one store that a process has open: as many as its limit of file descriptors allows.

    Args:
        mapped: Whether to map them; by default where the file system is local. Where another machine takes a file away,
            touching a map of it would end the process.
        supply: Where files come from that are not there; they may go again.
    """

    def __init__(self, store: Path, mapped: bool | None = None, supply: Supply | None = None) -> None:
        self.store = store
        self._supply = supply
        self._mapped = not is_network(store) if mapped is None else mapped
        self._arrays: dict[Path, ArrayFiles] = {}
        self._oldest: deque[tuple[ArrayFiles, int]] = deque()
        self._checked: dict[tuple[Path, Seal], NDArray[np.bool_]] = {}
        self._decoded: OrderedDict[tuple[Path, Seal, int], NDArray[Any]] = OrderedDict()
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self._oldest)

    def of(self, folder: Path, find: Callable[[int], tuple[Shard, Seal | None]], mend: str, dimensions: int = 2) -> "ArrayFiles":
        """The files of the array at ``folder``; ``find`` says what that of a slot must be, ``mend`` what to do if it is not."""
        if (files := self._arrays.get(folder)) is None:

            def wanted(slot: int) -> Wanted:
                path, (shard, seal) = layout.slot_file(folder, slot, dimensions), find(slot)
                if seal is None:
                    raise CorruptShard(f"{path}: nothing was committed for it; {mend}")
                return Wanted(path, shard, seal)

            def opened(slot: int) -> SlotFile:
                return self._opened(wanted(slot), mend)

            layout.inside(self.store, folder)
            files = self._arrays[folder] = ArrayFiles(opened, wanted, self._oldest)
        return files

    def bring(self, arrays: "Iterable[tuple[ArrayFiles, Collection[int]]]") -> None:
        """Have the files of these arrays and slots here, all at once, before they are read one by one."""
        if self._supply is not None:
            wanted = [(files, slot) for files, slots in arrays for slot in slots]
            self._close(self._supply.used(files[slot].path for files, slot in wanted if slot in files))
            self._close(self._supply.fetch([files.wanted(slot) for files, slot in wanted if slot not in files]))

    def _opened(self, wanted: Wanted, mend: str) -> "SlotFile":
        path, shard, seal = wanted
        checked = self._checked.setdefault((path, seal), np.zeros(shard.chunks, np.bool_))
        for last in (False, True):
            if self._supply is not None:
                self._close(self._supply.fetch([wanted]))
            try:
                return SlotFile(path, shard, seal, mend, self._mapped, checked, self._decode)
            except CorruptShard:
                if last or self._supply is None or path.exists():
                    raise
        raise AssertionError("unreachable")

    def _close(self, gone: Collection[Path]) -> None:
        """Let go of files that have no name any more: as long as they are open they take up disk."""
        if gone:
            for files, slot in [(files, slot) for files, slot in self._oldest if files[slot].path in gone]:
                del files[slot]
                files.sound.discard(slot)
                self._oldest.remove((files, slot))

    def forget(self) -> None:
        """Close all files and look at what stands in their places when it is asked for."""
        for files in self._arrays.values():
            files.clear()
            files.sound.clear()
        self._oldest.clear()
        self._checked.clear()
        self._decoded.clear()
        self._decoded_bytes = 0

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


class ArrayFiles(dict[int, "SlotFile"]):
    """Slot -> open file of one array.

    A file that is not open is opened when it is asked for, and then the one that was opened first may be closed: readers go
    through all files in random order, so that no other would be a better choice.
    """

    def __init__(
        self, opened: Callable[[int], "SlotFile"], wanted: Callable[[int], Wanted], oldest: "deque[tuple[ArrayFiles, int]]"
    ) -> None:
        super().__init__()
        self._opened, self._oldest = opened, oldest
        self.wanted = wanted
        """What the file of a slot must be."""
        self.sound: set[int] = set()
        """Slots all of whose chunks have been checked."""

    def __missing__(self, slot: int) -> "SlotFile":
        """Open the file of ``slot``.

        Raises:
            CorruptShard: it is missing, of another size, or not what was committed.
        """
        self.sound.discard(slot)
        file = self[slot] = self._opened(slot)
        self._oldest.append((self, slot))
        if len(self._oldest) > _most_open():
            files, other = self._oldest.popleft()
            del files[other]
        return file

    def check(self, slots: set[int], chunks: set[tuple[int, int]]) -> None:
        """Open the files of ``slots`` and compare ``chunks`` (slot, number) in them with their checksums, unless that was done before.

        Raises:
            CorruptShard: a file is not what was committed.
        """
        for slot, chunk in chunks:
            if not self[slot].checked(chunk):
                self[slot].check(chunk)
        self.sound |= {slot for slot in slots if self[slot].sound}

    def gather(self, slots: set[int], runs: Sequence[Run], out: NDArray[Any]) -> None:
        """Copy the units of all ``runs``, which lie in ``slots``, into ``out`` [U, W] one after another; raises CorruptShard."""
        if not slots <= self.sound:
            self.check(slots, {(slot, chunk) for slot, (chunk, _) in runs})
        if runs:
            np.concatenate([self[slot].chunks[units] for slot, units in runs], out=out)


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


def _most_open() -> int:
    """How many files may be open at a time; a map holds a descriptor too.

    The usual soft limit of 1024 is there for programs that use select(). It is raised, as other runtimes do, since opening a
    file takes longer than to copy a row out of it, and a large store has thousands.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_OPEN  # others need descriptors too
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, soft // 2)
