"""One file for each slot of an array: a Zarr v3 shard (``sharding_indexed``) of inner chunks of 128 tokens.

A file holds the chunks that have tokens, each followed by its crc32c, then the index (offset and length of every chunk
of the slot) with its crc32c. Chunks are never compressed, so their offsets follow from a constant stride.

Shapes: U units (tokens, labelled tokens or rows) that fill a slot from its start, W width, S units a slot has room for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from store.features import ITEM_BYTES, ArraySpec
from store.publish import Bytes, crc32c, publish

CHUNK = 128
"""Units of an inner chunk; slots are a multiple of it."""

BFLOAT16_NAN = 0x7FC0

_CRC_BYTES = 4
_MISSING = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not there; Zarr readers give the fill value for it."""

Json = dict[str, Any]


class Seal(NamedTuple):
    """What a slot's file must be.

    A checksum of the whole file would not do: data followed by its own CRC has the same CRC whatever the data.
    """

    size: int
    """Length in bytes."""
    crc32c: int
    """Of the chunks' checksums, four bytes each, in order."""


def numpy_dtype(array: ArraySpec) -> np.dtype[Any]:
    """Type of the array on disk and in memory; bfloat16, which Zarr and NumPy lack, is held as uint16."""
    return np.dtype("uint16" if array.dtype == "bfloat16" else array.dtype).newbyteorder("<")


def fill_value(array: ArraySpec) -> float | int:
    """What a missing value reads as: NaN, so that it is never taken for a zero, and 0 for ids."""
    if array.dtype == "bfloat16":
        return BFLOAT16_NAN
    return float("nan") if array.dtype in ("float32", "float16") else 0


@dataclass(frozen=True)
class Shard:
    """The bytes of one slot of an array: how many units it holds and where they stand."""

    array: ArraySpec
    slot_tokens: int
    units: int

    @property
    def unit_bytes(self) -> int:
        return self.array.width * ITEM_BYTES[self.array.dtype]

    @property
    def stride(self) -> int:
        """Bytes from one chunk to the next."""
        return CHUNK * self.unit_bytes + _CRC_BYTES

    @property
    def chunks(self) -> int:
        """Chunks with units in them; those after are missing."""
        return -(-self.units // CHUNK)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.chunks * self.stride + self.slot_tokens // CHUNK * 16 + _CRC_BYTES

    def check(self, values_UW: NDArray[Any], where: str) -> None:
        """Raise a ValueError that names ``where`` unless ``values_UW`` are the [U, W] of this type (or [U] for W = 1)."""
        dtype, shape = numpy_dtype(self.array), (self.units, self.array.width)
        if values_UW.dtype != dtype or (values_UW.shape != shape and (self.array.width > 1 or values_UW.shape != shape[:1])):
            raise ValueError(f"{where}: expected {dtype} {list(shape)}, found {values_UW.dtype} {list(values_UW.shape)}")

    def split(self, values_UW: NDArray[Any]) -> list[NDArray[Any]]:
        """``values_UW`` as chunks [128, W]: views, but for a last one that has to be filled up."""
        dtype = numpy_dtype(self.array)
        values_UW = np.ascontiguousarray(values_UW, dtype).reshape(self.units, self.array.width)
        chunks = [values_UW[start : start + CHUNK] for start in range(0, self.units, CHUNK)]
        if self.units % CHUNK:
            last = np.full((CHUNK, self.array.width), fill_value(self.array), dtype)
            last[: len(chunks[-1])] = chunks[-1]
            chunks[-1] = last
        return chunks

    def index(self) -> bytes:
        """Offset and length of every chunk of the slot, [S / 128, 2] uint64."""
        index = np.full((self.slot_tokens // CHUNK, 2), _MISSING, "<u8")
        index[: self.chunks, 0] = np.arange(self.chunks, dtype=np.uint64) * np.uint64(self.stride)
        index[: self.chunks, 1] = self.stride
        return index.tobytes()

    def view(self, file: NDArray[np.uint8]) -> NDArray[Any]:
        """The chunks inside ``file``, the bytes of a whole file, as [chunks, 128, W] without a copy."""
        dtype = numpy_dtype(self.array)
        shape = (self.chunks, CHUNK, self.array.width)
        return np.ndarray(shape, dtype, file.data, 0, (self.stride, self.unit_bytes, dtype.itemsize))

    def seal(self, checksums: list[bytes]) -> Seal:
        """What the file must be when its chunks have these ``checksums``."""
        return Seal(self.size, crc32c(b"".join(checksums)))

    def problem(self, file: NDArray[np.uint8], seal: Seal | None) -> str | None:
        """What is wrong with ``file``, the bytes of a whole file that was committed as ``seal``; None if nothing."""
        if len(file) != self.size:
            return f"expected {self.size} bytes, found {len(file)}"
        index = self.index()
        if file[self.chunks * self.stride :].tobytes() != index + checksum(index):
            return "the chunk index is damaged"
        checksums = []
        for start in range(0, self.chunks * self.stride, self.stride):
            chunk, stored = np.split(file[start : start + self.stride], [self.stride - _CRC_BYTES])
            checksums.append(stored.tobytes())
            if checksum(chunk) != checksums[-1]:
                return f"chunk {start // self.stride} fails its checksum"
        return None if self.seal(checksums) == seal else "the file is not the one that was committed"


def write_slot(path: Path, values_UW: NDArray[Any], array: ArraySpec, slot_tokens: int, writer: int = 0) -> Seal:
    """Publish the file of one slot from its values [U, W] (bfloat16 as uint16); what it must be from now on.

    Raises:
        StoreError: the file exists, or cannot be written.
        ValueError: the values have another type or shape than ``array``.
    """
    shard = Shard(array, slot_tokens, len(values_UW))
    shard.check(values_UW, str(path))
    chunks, index = shard.split(values_UW), shard.index()
    checksums = [checksum(chunk) for chunk in chunks]
    body: Iterator[Bytes] = chain.from_iterable(zip(chunks, checksums, strict=True))
    publish(path, chain(body, (index, checksum(index))), writer)
    return shard.seal(checksums)


def checksum(data: Bytes) -> bytes:
    """The crc32c of ``data`` as Zarr's codec of that name appends it."""
    return crc32c(data).to_bytes(_CRC_BYTES, "little")


def metadata(array: ArraySpec, slots: int, slot_tokens: int, dimensions: int, attributes: Json) -> Json:
    """``zarr.json`` of an array [slots * S, W], or [slots * S] where ``dimensions`` is 1."""

    def shape(tokens: int) -> list[int]:
        return [tokens, array.width][:dimensions]

    checked = [_bytes_codec(numpy_dtype(array).itemsize), {"name": "crc32c"}]
    sharding = {
        "chunk_shape": shape(CHUNK),
        "codecs": checked,
        "index_codecs": [_bytes_codec(8), {"name": "crc32c"}],
        "index_location": "end",
    }
    fill = fill_value(array)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape(slots * slot_tokens),
        "data_type": numpy_dtype(array).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape(slot_tokens)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if np.isnan(fill) else fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"true_dtype": array.dtype, **attributes},
    }


def static_metadata(dtype: str, shape: tuple[int, ...]) -> Json:
    """``zarr.json`` of a weight, one chunk of its whole shape."""
    spec = ArraySpec(name="", dtype=dtype, width=1)
    fill = fill_value(spec)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": numpy_dtype(spec).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if np.isnan(fill) else fill,
        "codecs": [_bytes_codec(numpy_dtype(spec).itemsize), {"name": "crc32c"}],
        "attributes": {"true_dtype": dtype},
    }


def _bytes_codec(itemsize: int) -> Json:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}
