"""Export to safetensors: one file for each slot, with the stored bits under their true types.

The values of all rows stand one after the other; ``token_offsets`` and ``label_offsets`` say where each row begins.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.exports.folder import ExportFolder
from store.exports.selection import Selection, pieces
from store.features import ArraySpec, FeatureKey
from store.reader import Store
from store.table import Ints
from store.tensors import NAMES, Tensor, write_tensors


def file_name(slot: int) -> str:
    return f"slot-{slot:06}.safetensors"


def write_slot(store: Store, selection: Selection, slot: int, rows: Ints, folder: ExportFolder) -> None:
    """The rows of one slot, one array after the other."""
    name = file_name(slot)
    if folder.has(name):
        return
    tensors = _of_rows(store, rows)
    for array in store.manifest.rows.token_arrays:
        tokens = int(store.rows.at(rows).length.sum())
        tensors[f"tokens/{array.name}"] = Tensor(NAMES[array.dtype], (tokens,), _tokens(store, array.name, rows))
    for key in selection.keys:
        units = int(store.rows.at(rows).units(key.positions)[1].sum())
        for array in store.spec(key).arrays:
            tensors[tensor_name(key, array.name)] = Tensor(NAMES[array.dtype], (units, array.width), _values(store, key, array, rows))
    with folder.file(name) as path:
        write_tensors(path, tensors, _metadata(store, selection))


def tensor_name(key: FeatureKey, array: str) -> str:
    """Name of the tensor that holds an array of ``key``."""
    return f"{key}/{array}" if array else str(key)


def _of_rows(store: Store, rows: Ints) -> dict[str, Tensor]:
    numbers = store.rows.at(rows)
    ends = {"token_offsets": numbers.length, "label_offsets": numbers.labelled}
    found = {name: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) for name, counts in ends.items()}
    found |= {"row": rows.astype(np.int64), "group": numbers.group, "copy": numbers.copy, "split": numbers.split}
    if store.manifest.rows.domains:
        found["domain"] = store.rows.domain_at(rows)
    if store.manifest.rows.paired:
        found["draw"] = store.rows.draw_at(rows)
    return {"label": Tensor.of("F64", store.rows.label_at(rows))} | {name: Tensor.of("I64", values) for name, values in found.items()}


def _tokens(store: Store, name: str, rows: Ints) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter([store.tokens(name, rows)])


def _values(store: Store, key: FeatureKey, array: ArraySpec, rows: Ints) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: (store.read(key, some)[array.name] for some in pieces(store, rows))


def _metadata(store: Store, selection: Selection) -> dict[str, str]:
    return {
        "format": "teachercache slot",
        "splits": json.dumps(store.rows.splits),
        **{name: json.dumps(about) for name, about in selection.record(store).items()},
        "features": json.dumps({str(key): store.spec(key).model_dump(mode="json") for key in selection.keys}),
    }
