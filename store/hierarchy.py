"""The Zarr side of a store: every ``zarr.json`` as a function of the manifest, so that plain Zarr readers see all of it."""

import json
from pathlib import Path
from typing import Any

from store import layout
from store.manifest import Manifest, manifest_bytes
from store.publish import make_folder, replace
from store.shards import metadata, static_metadata

Json = dict[str, Any]


def nodes(manifest: Manifest) -> dict[str, Json]:
    """Path inside the store -> metadata of the group or array there; the root ("") repeats all others.

    The root's copy is what Zarr calls consolidated metadata: readers need not list folders to find the arrays.
    """
    rows = manifest.rows
    arrays: dict[str, Json] = {}
    for spec in rows.token_arrays:
        arrays[f"tokens/{layout.safe(spec.name)}"] = metadata(spec, rows.slots, rows.slot_tokens, 1, {})
    for pass_name, info in manifest.passes.items():
        for feature in info.features:
            key = feature.feature
            for array in feature.arrays:
                attributes = {"key": str(key.of(pass_name)), "array": array.name}
                path = f"{pass_name}/{layout.array_name(key, array.name)}"
                arrays[path] = metadata(array, rows.slots, rows.slot_tokens, 2, attributes)
        for static in info.statics:
            arrays[f"static/{pass_name}/{layout.safe(static.name)}"] = static_metadata(static.dtype, static.shape)
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
    found = {}
    for name, node in sorted(nodes(manifest).items(), reverse=True):
        path, data = store / name / "zarr.json", json.dumps(node, indent=1).encode()
        if not path.is_file() or path.read_bytes() != data:
            found[path] = data
    return found


def write(store: Path, manifest: Manifest) -> None:
    """Bring every ``zarr.json`` up to ``manifest`` and then, atomically, the manifest itself."""
    for path, data in differing(store, manifest).items():
        make_folder(layout.inside(store, path.parent))
        replace(path, data)
    replace(layout.manifest(store), manifest_bytes(manifest))
