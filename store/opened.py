"""The slot files that a reader has open: which, how many, and what of them has been checked.

What was checked is remembered when a file is closed to make place for another.
"""

import resource
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.filesystem import is_network
from store.shards import Seal, Shard
from store.slot_file import SlotFile

DECODED_BYTES = 256 << 20
"""Memory for decompressed chunks that may be read again soon."""

MOST_OPEN = 1 << 14
"""Files that are open at a time; each takes a few KB of memory."""

Run = tuple[int, tuple[int, slice]]
"""Units that lie side by side: their slot, and chunk and place inside it."""


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

    def _opened(self, wanted: Wanted, mend: str) -> SlotFile:
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

    def _decode(self, file: SlotFile, chunk: int) -> NDArray[Any]:
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


class ArrayFiles(dict[int, SlotFile]):
    """Slot -> open file of one array.

    A file that is not open is opened when it is asked for, and then the one that was opened first may be closed: readers go
    through all files in random order, so that no other would be a better choice.
    """

    def __init__(self, opened: Callable[[int], SlotFile], wanted: Callable[[int], Wanted], oldest: "deque[tuple[ArrayFiles, int]]") -> None:
        super().__init__()
        self._opened, self._oldest = opened, oldest
        self.wanted = wanted
        """What the file of a slot must be."""
        self.sound: set[int] = set()
        """Slots all of whose chunks have been checked."""

    def __missing__(self, slot: int) -> SlotFile:
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
