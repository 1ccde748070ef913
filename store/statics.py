"""Weights that ship once with a pass, each a Zarr array of one chunk with its crc32c."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import layout
from store.errors import CorruptShard
from store.features import ITEM_BYTES, ArraySpec
from store.manifest import Static
from store.publish import crc32c, make_folder, replace
from store.shards import numpy_dtype

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
            replace(_file(folder, static), data + static.crc32c.to_bytes(4, "little"))


def read_static(store: Path, pass_name: str, static: Static) -> NDArray[Any]:
    """The weight, bfloat16 as uint16, writable."""
    if found := static_problem(store, pass_name, static):
        raise CorruptShard(
            f"{_file(layout.static(store, pass_name, static.name), static)}: {found}; start the dump again, it writes the weights anew"
        )
    data = np.fromfile(_file(layout.static(store, pass_name, static.name), static), np.uint8)[:-4]
    return data.view(numpy_dtype(ArraySpec(name="", dtype=static.dtype, width=1))).reshape(static.shape)


def static_problem(store: Path, pass_name: str, static: Static) -> str | None:
    """What is wrong with the file of ``static``; None if nothing."""
    path = _file(layout.static(store, pass_name, static.name), static)
    size = int(np.prod(static.shape, dtype=np.int64)) * ITEM_BYTES[static.dtype] + 4
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != size:
        return f"expected {size} bytes, found {path.stat().st_size}"
    data = np.fromfile(path, np.uint8)
    if crc32c(data[:-4]) != static.crc32c or data[-4:].tobytes() != static.crc32c.to_bytes(4, "little"):
        return "the file fails its checksum"
    return None


def _file(folder: Path, static: Static) -> Path:
    return folder / ".".join(["c", *["0"] * len(static.shape)])
