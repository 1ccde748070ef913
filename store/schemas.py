"""Older layouts, read as if they were today's. What is written is always today's.

Schema 1 kept what readers need of a row in its Parquet files only, cut every array into chunks of 128 units, and knew
one origin of rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store import layout
from store.rows import COLUMNS

READABLE = (1, 2)
"""Schema versions that this release opens."""

ADDRESSES_1 = ("slot", "offset", "length", "index", "labelled", "labelled_offset")
COLUMNS_1 = pa.schema(
    [*((name, pa.int32()) for name in ADDRESSES_1), ("group", pa.int64()), ("copy", pa.int32())]
    + [COLUMNS.field(name) for name in ("split", "label", "source", "record", "part", "spans")]
)
"""The Parquet files of schema 1."""


def upgrade(store: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The manifest ``tree`` of a readable schema as one of today's.

    Raises:
        ValueError: the row table that it names cannot be read.
    """
    if tree["schema_version"] != 1:
        return tree
    rows = dict(tree["rows"])
    corpus, options, slots = rows.pop("corpus"), rows.pop("options"), int(rows["slots"])
    paths = [layout.rows_part(store, number) for number in range(len(rows["parts"]))]
    try:
        table = pa.concat_tables([pq.read_table(path, columns=["slot", "length", "labelled"]) for path in paths])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"the row table of {store} cannot be read ({error}); remove the folder and dump again") from None
    slot = table["slot"].to_numpy()
    if len(slot) and not 0 <= slot.min() <= slot.max() < slots:
        raise ValueError(f"the row table of {store} names slots that are not there; remove the folder and dump again")
    filled = {name: np.bincount(slot, table[column].to_numpy(), slots) for name, column in (("tokens", "length"), ("labelled", "labelled"))}
    filled["rows"] = np.bincount(slot, minlength=slots)
    rows["filled"] = {name: values.astype(np.int64).tolist() for name, values in filled.items()}
    rows["chunk_tokens"] = 128
    rows["origins"] = [{"corpus": corpus, "options": options, "slots": slots}]
    return {**tree, "rows": rows}


def numbers_1(tables: Sequence[pa.Table], splits: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """[R, NUMBERS] and labels [R] (store.rows.ROW_ARRAYS) out of the Parquet files of schema 1."""
    table = pa.concat_tables(tables)
    slot, group = table["slot"].to_numpy(), table["group"].to_numpy()
    starts = np.concatenate([[True], slot[1:] != slot[:-1]])
    number = np.cumsum(starts | np.concatenate([[True], group[1:] != group[:-1]]))
    within = number - np.repeat(number[starts], np.diff(np.flatnonzero(starts), append=len(slot)))
    codes = {name: code for code, name in enumerate(splits)}
    split = [codes.get(name, -1) for name in table["split"].to_pylist()]
    addresses = [table[name].to_numpy() for name in ("offset", "length", "labelled", "labelled_offset")]
    numbers = np.stack([*addresses, within, table["copy"].to_numpy(), split], axis=1).astype(np.int32)
    return numbers, table["label"].to_numpy().astype(np.float64)
