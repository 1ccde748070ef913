"""The Zarr side of a store: every ``zarr.json`` as a function of the manifest, so that plain Zarr readers see all of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from store import layout
from store.blocks import CONFIGURATION
from store.features import ArraySpec, Dtype
from store.manifest import Manifest, RowsInfo, manifest_bytes
from store.plain import read_plain
from store.publish import make_folder, replace
from store.rows import NUMBERS
from store.shards import fill_value, numpy_dtype

Json = dict[str, Any]


def nodes(manifest: Manifest) -> dict[str, Json]:
    """Path inside the store -> metadata of the group or array there; the root ("") repeats all others.

    The root's copy is what Zarr calls consolidated metadata: readers need not list folders to find the arrays.
    """
    rows = manifest.rows
    arrays: dict[str, Json] = {}
    for name, spec in rows.row_arrays.items():
        columns = {"columns": NUMBERS} if name == "numbers" else {}
        arrays[f"rows/{name}"] = _array(rows, spec, "row", columns)
    for spec in rows.token_arrays:
        arrays[f"tokens/{layout.safe(spec.name)}"] = _array(rows, spec, "all", {}, dimensions=1)
    for pass_name, info in manifest.passes.items():
        for feature in info.features:
            key = feature.feature
            for array in feature.arrays:
                attributes = {"key": str(key.of(pass_name)), "array": array.name}
                path = f"{pass_name}/{layout.array_name(key, array.name)}"
                arrays[path] = _array(rows, array, key.positions, attributes)
        for static in info.statics:
            arrays[f"static/{pass_name}/{layout.safe(static.name)}"] = _static(static.dtype, static.shape)
    groups = {path.rsplit("/", depth)[0] for path in arrays for depth in range(1, path.count("/") + 1)}
    below = {path: {"zarr_format": 3, "node_type": "group", "attributes": {}} for path in groups} | arrays
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"schema_version": manifest.schema_version},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(sorted(below.items()))},
    }
    return {"": root, **below}


def differing(store: Path, manifest: Manifest) -> dict[Path, bytes]:
    """Files whose content is not yet what ``manifest`` asks for, the root last."""
    files = ((store / name / "zarr.json", data) for name, data in documents(manifest).items())
    return {path: data for path, data in files if not _holds(path, data)}


def documents(manifest: Manifest) -> dict[str, bytes]:
    """Path inside the store -> content of the ``zarr.json`` there, the root last."""
    return {name: json.dumps(node, indent=1).encode() for name, node in sorted(nodes(manifest).items(), reverse=True)}


def _holds(path: Path, data: bytes) -> bool:
    """Whether ``path`` is a plain file of ``data``; of a longer one nothing is read."""
    try:
        return read_plain(path, len(data)) == data
    except OSError:
        return False


def write(store: Path, manifest: Manifest) -> None:
    """Bring every ``zarr.json`` up to ``manifest`` and then, atomically, the manifest itself."""
    for path, data in differing(store, manifest).items():
        make_folder(layout.inside(store, path.parent))
        replace(path, data)
    replace(layout.manifest(store), manifest_bytes(manifest))


def _array(rows: RowsInfo, array: ArraySpec, positions: str, attributes: Json, dimensions: int = 2) -> Json:
    """An array [slots * S, W], or [slots * S] where ``dimensions`` is 1; one shard for each slot (store.shards)."""

    def shape(tokens: int) -> list[int]:
        return [tokens, array.width][:dimensions]

    itemsize = numpy_dtype(array).itemsize
    rounded = {name: bits for name in ("keep_bits", "bits") if (bits := getattr(array, name)) is not None}
    blosc = {"name": "blosc", "configuration": {**CONFIGURATION, "typesize": itemsize}}
    sharding = {
        "chunk_shape": shape(rows.chunk(array, positions)),
        "codecs": [_bytes_codec(itemsize), *([] if array.compression == "none" else [blosc]), {"name": "crc32c"}],
        "index_codecs": [_bytes_codec(8), {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape(rows.slots * rows.slot_tokens),
        "data_type": numpy_dtype(array).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape(rows.slot_tokens)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(array),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"true_dtype": array.dtype, **rounded, **attributes},
    }


def _static(dtype: Dtype, shape: tuple[int, ...]) -> Json:
    """A weight, one chunk of its whole shape."""
    spec = ArraySpec(name="", dtype=dtype, width=1)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": numpy_dtype(spec).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(spec),
        "codecs": [_bytes_codec(numpy_dtype(spec).itemsize), {"name": "crc32c"}],
        "attributes": {"true_dtype": dtype},
    }


def _fill(array: ArraySpec) -> float | int | str:
    fill = fill_value(array)
    return "NaN" if np.isnan(fill) else fill


def _bytes_codec(itemsize: int) -> Json:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}
