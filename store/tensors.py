"""Files of named tensors in the safetensors format: eight bytes with the header's length, the header as JSON, the raw values.

Written here rather than with the library because slots are larger than memory and because NumPy, which all of the store
is made of, has neither bfloat16 nor float8: such tensors are unsigned integers of their size.
Source: the format as huggingface/safetensors documents it.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import StoreError
from store.features import Dtype
from store.publish import sync_file

DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}
"""Type names of the format, and what they are held as."""

NAMES: dict[Dtype, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "int8": "I8",
    "uint16": "U16",
    "uint8": "U8",
}
"""What the store's types are called in the format."""

METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit that the library itself sets."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; ``pieces`` gives its values in order, held as DTYPES says, and is called once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]

    @classmethod
    def of(cls, dtype: str, values: NDArray[Any]) -> "Tensor":
        """A tensor that is in memory."""
        return cls(dtype, values.shape, lambda: iter([values]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``path``, durably, one piece of one tensor after the other."""
    order = sorted(tensors, key=lambda name: -np.dtype(DTYPES[tensors[name].dtype]).itemsize)  # so that all are aligned
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        stop = start + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            written = 0
            for piece in tensors[name].pieces():
                written += piece.nbytes
                file.write(np.ascontiguousarray(piece, DTYPES[tensors[name].dtype]).data)
            assert written == tensors[name].nbytes, name
    sync_file(path)


@dataclass(frozen=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """A file to read; its header is checked when it is opened, its values are read when they are asked for.

    Raises:
        StoreError: it cannot be read, or is no such file, whole and without gaps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                    raise self._damaged(f"its header should have {length} bytes, the file has {size}")
                header = json.loads(file.read(length))
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header holds no names")
        metadata = header.pop(METADATA, {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self._places = {name: self._place(name, about, 8 + length) for name, about in header.items()}
        self._check_cover(8 + length, size)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> Sequence[str]:
        return sorted(self._places)

    def dtype(self, name: str) -> str:
        return self._found(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found(name).shape

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor, held as DTYPES says."""
        place = self._found(name)
        count = math.prod(place.shape)
        values: NDArray[Any] = np.fromfile(self.path, DTYPES[place.dtype], count, offset=place.start)
        if len(values) != count:
            raise self._damaged(f"it became shorter while {name} was read")
        return values.reshape(place.shape)

    def _found(self, name: str) -> _Place:
        if name not in self._places:
            raise StoreError(f"{self.path} holds no tensor {name!r}; it holds {', '.join(self.names) or 'none'}")
        return self._places[name]

    def _place(self, name: str, about: object, base: int) -> _Place:
        match about:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if dtype in DTYPES:
                sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
                if sizes and math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize == stop - start and start >= 0:
                    return _Place(dtype, tuple(shape), base + start)
            case {"dtype": dtype} if dtype not in DTYPES:
                raise StoreError(f"{self.path}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}")
        raise self._damaged(f"what it says of {name} contradicts itself: {str(about)[:200]}")

    def _check_cover(self, base: int, size: int) -> None:
        """Tensors must fill the file without gaps or overlaps."""
        expected = base
        for place in sorted(self._places.values(), key=lambda place: (place.start, math.prod(place.shape) > 0)):
            if place.start != expected:
                raise self._damaged(f"a tensor begins at byte {place.start}, expected {expected}")
            expected += math.prod(place.shape) * np.dtype(DTYPES[place.dtype]).itemsize
        if expected != size:
            raise self._damaged(f"its tensors end at byte {expected}, the file has {size}")

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self.path} is no whole safetensors file: {what}; make or copy it again, or leave it out")
