"""Weights that ship once with a pass, each a Zarr array of one chunk with its crc32c."""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.features import ITEM_BYTES, ArraySpec
from store.manifest import Static
from store.plain import open_plain, pieces, why
from store.publish import crc32c, make_folder, replace
from store.shards import CRC_BYTES, numpy_dtype

_DTYPES = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}


def describe_statics(statics: Mapping[str, NDArray[Any]]) -> tuple[Static, ...]:
    """What the manifest says of ``statics`` (bfloat16 as uint16), by name."""
    found = []
    for name, values in sorted(statics.items()):
        if values.dtype.name not in _DTYPES or not values.ndim:
            raise ValueError(f"static {name}: expected an array of float32, float16 or bfloat16 (as uint16), found {values.dtype}")
        crc = crc32c(np.ascontiguousarray(values))
        found.append(Static(name=name, dtype=_DTYPES[values.dtype.name], shape=values.shape, crc32c=crc))
    return tuple(found)


def write_statics(store: Path, pass_name: str, statics: Mapping[str, NDArray[Any]]) -> None:
    """Put ``statics`` in the store, in place of any that differ."""
    for static in describe_statics(statics):
        if static_problem(store, pass_name, static):
            data = np.ascontiguousarray(statics[static.name]).tobytes()
            folder = layout.inside(store, layout.static(store, pass_name, static.name))
            make_folder(folder)
            replace(_file(folder, static), data + static.crc32c.to_bytes(CRC_BYTES, "little"))


def read_static(store: Path, pass_name: str, static: Static) -> NDArray[Any]:
    """The weight, bfloat16 as uint16, writable.

    Raises:
        CorruptShard: its file is not what the manifest says.
    """
    path = _file(layout.inside(store, layout.static(store, pass_name, static.name)), static)
    try:
        with os.fdopen(_open(path, static), "rb") as file:
            data = np.fromfile(file, np.uint8)
        if len(data) != _size(static) or not _sealed(crc32c(data[:-CRC_BYTES]), data[-CRC_BYTES:].tobytes(), static):
            raise OSError(errno.EIO, "the file fails its checksum")
    except OSError as error:
        raise CorruptShard(f"{path}: {why(error)}; start the dump again, it writes the weights anew") from None
    return data[:-CRC_BYTES].view(numpy_dtype(_spec(static))).reshape(static.shape)


def static_problem(store: Path, pass_name: str, static: Static, full: bool = True) -> str | None:
    """What is wrong with the file of ``static``, None if nothing; unless ``full``, its size and last bytes alone are looked at."""
    path = _file(layout.inside(store, layout.static(store, pass_name, static.name)), static)
    values = _size(static) - CRC_BYTES
    try:
        with os.fdopen(_open(path, static), "rb") as file:
            crc = 0 if full else static.crc32c
            for piece in pieces(file.fileno(), values if full else 0):
                crc = crc32c(piece, crc)
            sealed = _sealed(crc, os.pread(file.fileno(), CRC_BYTES, values), static)
    except OSError as error:
        return why(error)
    return None if sealed else "the file fails its checksum"


def _open(path: Path, static: Static) -> int:
    """A descriptor of the file, whose size is what a weight of that shape needs: nobody has to believe the manifest."""
    handle = open_plain(path)
    if (found := os.fstat(handle).st_size) != _size(static):
        os.close(handle)
        raise OSError(errno.EIO, f"expected {_size(static)} bytes, found {found}")
    return handle


def _sealed(crc: int, last: bytes, static: Static) -> bool:
    return crc == static.crc32c and last == static.crc32c.to_bytes(CRC_BYTES, "little")


def _size(static: Static) -> int:
    return math.prod(static.shape) * ITEM_BYTES[static.dtype] + CRC_BYTES


def _spec(static: Static) -> ArraySpec:
    return ArraySpec(name="", dtype=static.dtype, width=1)


def _file(folder: Path, static: Static) -> Path:
    return folder / ".".join(["c", *["0"] * len(static.shape)])
