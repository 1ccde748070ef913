"""One file for each slot of an array: a Zarr v3 shard (``sharding_indexed``) of inner chunks.

A file holds the chunks that have units, each followed by its crc32c, then the index (offset and length of every chunk
of the slot) with its crc32c. Chunks that are not compressed have a constant stride, so that any value is found without
the index.

Shapes: U units (tokens, labelled tokens or rows) that fill a slot from its start, W width, S units a slot has room for,
C units of a chunk.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from store.blocks import compress, decompress
from store.codecs.ids import unpack
from store.features import ITEM_BYTES, ArraySpec
from store.publish import Bytes, crc32c, publish

CHUNK = 128
"""Units of an inner chunk where nothing is said; slots are a multiple of it."""

MOST_SLOT_TOKENS = 1 << 24
"""A slot's index then has up to 2 MiB."""

TOKEN_CHUNK = 1024
"""Tokens of an inner chunk where every token has a raw value: rows then seldom span two. Slots of another size have the largest
common divisor. Measured with benchmarks/store_read.py --chunks: longer chunks gain nothing, 128 cost a sixth more CPU."""

BFLOAT16_NAN = 0x7FC0

CRC_BYTES = 4
_MISSING = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not there; Zarr readers give the fill value for it."""


class Seal(NamedTuple):
    """What a slot's file must be.

    A checksum of the whole file would not do: data followed by its own CRC has the same CRC whatever the data.
    """

    size: int
    """Length in bytes."""
    crc32c: int
    """Of the chunks' checksums, four bytes each, in order."""


def token_chunk(slot_tokens: int) -> int:
    """Tokens of an inner chunk of a raw array that has a value for every token."""
    return math.gcd(slot_tokens, TOKEN_CHUNK)


def numpy_dtype(array: ArraySpec) -> np.dtype[Any]:
    """Type of the array on disk and in memory; what Zarr and NumPy lack is held as unsigned integers of its size."""
    held = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
    return np.dtype(held.get(array.dtype, array.dtype)).newbyteorder("<")


def fill_value(array: ArraySpec) -> float | int:
    """What a missing value reads as: NaN, so that it is never taken for a zero, and 0 for whole numbers.

    Arrays of whole numbers that stand for real ones have a scale beside them, and that reads as NaN.
    """
    bits = {"bfloat16": BFLOAT16_NAN, "float8_e4m3fn": 0x7F}
    if array.dtype in bits:
        return bits[array.dtype]
    return float("nan") if numpy_dtype(array).kind == "f" else 0


@dataclass(frozen=True)
class Shard:
    """The bytes of one slot of an array: how many units it holds and where they stand. RowTable.shard makes them."""

    array: ArraySpec
    slot_tokens: int
    units: int
    chunk: int = CHUNK
    """Units of an inner chunk."""
    words: int | None = None
    """Of an array of word ids the size of their vocabulary: every id is smaller."""

    @property
    def raw(self) -> bool:
        """Whether chunks hold the values as they are."""
        return self.array.compression == "none"

    @property
    def unit_bytes(self) -> int:
        return self.array.width * ITEM_BYTES[self.array.dtype]

    @property
    def stride(self) -> int:
        """Bytes from one raw chunk to the next."""
        return self.chunk * self.unit_bytes + CRC_BYTES

    @property
    def chunks(self) -> int:
        """Chunks with units in them; those after are missing."""
        return -(-self.units // self.chunk)

    @property
    def index_bytes(self) -> int:
        """Bytes at the end of the file: the index and its checksum."""
        return self.slot_tokens // self.chunk * 16 + CRC_BYTES

    @property
    def size(self) -> int:
        """Bytes of the file; for compressed arrays the most it can be."""
        slack = 0 if self.raw else 64  # a blosc frame of data that does not compress is 16 bytes longer, its blocks a little
        return self.chunks * (self.stride + slack) + self.index_bytes

    def check(self, values_UW: NDArray[Any], where: str) -> None:
        """Raise a ValueError that names ``where`` unless ``values_UW`` are the [U, W] of this type (or [U] for W = 1)."""
        dtype, shape = numpy_dtype(self.array), (self.units, self.array.width)
        if values_UW.dtype != dtype or (values_UW.shape != shape and (self.array.width > 1 or values_UW.shape != shape[:1])):
            raise ValueError(f"{where}: expected {dtype} {list(shape)}, found {values_UW.dtype} {list(values_UW.shape)}")

    def split(self, values_UW: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """``values_UW`` as chunks [C, W]: views, but for a last one that has to be filled up."""
        dtype = numpy_dtype(self.array)
        values_UW = np.ascontiguousarray(values_UW, dtype).reshape(self.units, self.array.width)
        for start in range(0, self.units, self.chunk):
            values_CW = values_UW[start : start + self.chunk]
            if len(values_CW) < self.chunk:
                last = np.full((self.chunk, self.array.width), fill_value(self.array), dtype)
                last[: len(values_CW)] = values_CW
                values_CW = last
            yield values_CW

    def index(self, lengths: list[int] | None = None) -> bytes:
        """Offset and length of every chunk of the slot, [S / C, 2] uint64; raw chunks all have the same length."""
        index = np.full((self.slot_tokens // self.chunk, 2), _MISSING, "<u8")
        sizes = np.array([self.stride] * self.chunks if lengths is None else lengths, np.uint64)
        index[: self.chunks, 0] = np.cumsum(sizes) - sizes
        index[: self.chunks, 1] = sizes
        return index.tobytes()

    def bounds(self, index: bytes) -> NDArray[np.int64] | None:
        """[chunks + 1] where each chunk with its checksum begins in the file, from the index bytes; None where they make no sense."""
        if index[-CRC_BYTES:] != checksum(index[:-CRC_BYTES]):
            return None
        pairs = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(-1, 2)
        lengths = pairs[: self.chunks, 1]
        if self.chunks and (int(lengths.max()) > self.stride + 64 or int(lengths.min()) < CRC_BYTES):
            return None
        if self.index(lengths.tolist()) != index[:-CRC_BYTES] or (self.raw and (lengths != self.stride).any()):
            return None
        return np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])

    def view(self, file: NDArray[np.uint8]) -> NDArray[Any]:
        """The raw chunks inside ``file``, the bytes of a whole file, as [chunks, C, W] without a copy."""
        dtype = numpy_dtype(self.array)
        shape = (self.chunks, self.chunk, self.array.width)
        return np.ndarray(shape, dtype, file.data, 0, (self.stride, self.unit_bytes, dtype.itemsize))

    def word_beyond(self, values_CW: NDArray[Any]) -> int | None:
        """The first word id of a chunk that its vocabulary lacks; None where there is none, or it holds no word ids."""
        if self.words is None:
            return None
        if self.array.bits is not None:
            values_CW = unpack(values_CW, self.array.bits)
        if int(values_CW.min()) >= 0 and int(values_CW.max()) < self.words:
            return None
        return int(values_CW[(values_CW < 0) | (values_CW >= self.words)][0])

    def decoded(self, chunk: bytes) -> NDArray[Any] | None:
        """The [C, W] of a compressed chunk (without its checksum); None where it does not hold that."""
        data = decompress(chunk, self.chunk * self.unit_bytes)
        return None if data is None else data.view(numpy_dtype(self.array)).reshape(self.chunk, self.array.width)


def write_slot(path: Path, values_UW: NDArray[Any], shard: Shard, put: Callable[[Path, Iterator[Bytes]], None] = publish) -> Seal:
    """Publish the file of one slot from its values [U, W] (bfloat16 as uint16); what it must be from now on.

    Args:
        put: Takes the pieces of the file; store.publish.Batch.add where several files get their names together.

    Raises:
        StoreError: the file exists, or cannot be written.
        ValueError: the values have another type or shape than ``shard``.
    """
    shard.check(values_UW, str(path))
    lengths: list[int] = []
    checksums: list[bytes] = []

    def pieces() -> Iterator[Bytes]:
        for values_CW in shard.split(values_UW):
            chunk = values_CW if shard.raw else compress(values_CW)
            checksums.append(checksum(chunk))
            lengths.append((chunk.nbytes if isinstance(chunk, np.ndarray) else len(chunk)) + CRC_BYTES)
            yield chunk
            yield checksums[-1]
        index = shard.index(lengths)
        yield index
        yield checksum(index)

    put(path, pieces())
    return Seal(sum(lengths) + shard.index_bytes, crc32c(b"".join(checksums)))


def checksum(data: Bytes) -> bytes:
    """The crc32c of ``data`` as Zarr's codec of that name appends it."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")
