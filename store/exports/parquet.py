"""Export to Parquet: one file for each slot, one Parquet row for each row, features as list columns.

Numbers are float32 whatever they are stored as: Parquet has no bfloat16 and few readers know its float16, and every
stored type is exact in float32. What they were is in the metadata of each column.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store.codecs import decode
from store.exports.folder import ExportFolder
from store.exports.selection import Selection, pieces
from store.features import FeatureKey
from store.publish import sync_file
from store.reader import Store
from store.rows import COLUMNS
from store.table import Ints


def file_name(slot: int) -> str:
    return f"slot-{slot:06}.parquet"


def write_slot(store: Store, selection: Selection, slot: int, rows: Ints, folder: ExportFolder) -> None:
    """The rows of one slot, as a row group for each few thousand tokens."""
    name = file_name(slot)
    if folder.has(name):
        return
    with folder.file(name) as path:
        _write(store, selection, rows, path)
        sync_file(path)


def _write(store: Store, selection: Selection, rows: Ints, path: Path) -> None:
    about = _about(store, rows)
    writer: pq.ParquetWriter | None = None
    try:
        start = 0
        for some in pieces(store, rows):
            table = _table(store, selection, some, about.slice(start, len(some)))
            start += len(some)
            if writer is None:
                writer = pq.ParquetWriter(
                    path, table.schema, compression="zstd", use_dictionary=["split", "domain", "source"], write_page_checksum=True
                )
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _table(store: Store, selection: Selection, rows: Ints, about: pa.Table) -> pa.Table:
    numbers = store.rows.at(rows)
    fields = [pa.field("row", pa.int64()), pa.field("group", pa.int64())]
    arrays: list[pa.Array] = [pa.array(rows), pa.array(numbers.group)]
    for name in about.column_names:
        fields.append(pa.field(name, about.schema.field(name).type))
        arrays.append(about[name].combine_chunks())
    if names := store.manifest.rows.domains:
        arrays.append(pa.array([names[number] for number in store.rows.domain_at(rows)], pa.string()))
        fields.append(pa.field("domain", pa.string()))
    if store.manifest.rows.paired:
        arrays.append(pa.array(store.rows.draw_at(rows)))
        fields.append(pa.field("draw", pa.int64()))
    for token_array in store.manifest.rows.token_arrays:
        values = store.tokens(token_array.name, rows)
        arrays.append(_lists(values[:, None], numbers.length))
        fields.append(pa.field(token_array.name, arrays[-1].type))
    found = store.read_all(selection.keys, rows)
    for key in selection.keys:
        spec = store.spec(key)
        counts = None if key.per_row else numbers.units(key.positions)[1]
        for name, values in decode(spec, found[key]).items():
            arrays.append(_lists(values.astype(np.int32) if values.dtype.kind == "i" else values, counts))
            stored = {array.name: array.dtype for array in spec.arrays}
            metadata = {"key": str(key), "array": name, "codec": spec.codec, "stored": json.dumps(stored), "error": repr(spec.error)}
            fields.append(pa.field(column_name(key, name), arrays[-1].type, metadata=metadata))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, {"teachercache": json.dumps(selection.record(store))}))


def column_name(key: FeatureKey, array: str) -> str:
    """Name of the column that holds an array of ``key``."""
    return f"{key}/{array}" if array else str(key)


def _lists(values_UW: NDArray[Any], counts: Ints | None) -> pa.Array:
    """A value for each row, or a list of ``counts`` values; values are single numbers or lists of W of them."""
    width = values_UW.shape[1]
    flat = pa.array(np.ascontiguousarray(values_UW).reshape(-1))
    units = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    if counts is None:
        return units
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), units)


def _about(store: Store, rows: Ints) -> pa.Table:
    """The Parquet columns of the store's own row table for ``rows``, which are of one slot."""
    starts = np.cumsum([0, *(part.rows for part in store.manifest.rows.parts)])
    number = int(np.searchsorted(starts, rows[0], "right")) - 1  # a part ends with a slot
    part = store.rows.part(number, COLUMNS.names)
    return part.take(pa.array(rows - starts[number]))
