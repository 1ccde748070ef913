"""Older layouts, read as if they were today's. What is written is always today's.

Schema 1 kept what readers need of a row in its Parquet files only, cut every array into chunks of 128 units, and knew
one origin of rows. Schema 2 did not say how many tokens a teacher batch had. Schema 3 had neither domains nor phrases,
schema 4 neither pairs of rows nor interventions; schema 5 kept ids of more than 65,536 words as int32 and no random words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store import layout
from store.parts import PART_ROWS, read_part
from store.plain import why
from store.rows import COLUMNS
from store.shards import MOST_SLOT_TOKENS

READABLE = (1, 2, 3, 4, 5, 6)
"""Schema versions that this release opens."""
LINKABLE = (2, 3, 4, 5, 6)
"""Those whose rows lie as today's do: a copy links their files."""

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
    try:
        rows = dict(tree["rows"])
        corpus, options, slots = rows.pop("corpus"), rows.pop("options"), int(rows["slots"])
        counts = [(int(part["rows"]), int(part["crc32c"])) for part in rows["parts"]]
        most = PART_ROWS + min(int(rows["slot_tokens"]), MOST_SLOT_TOKENS)
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"the manifest of {store} is not one of schema 1; remove the folder and dump again") from None
    if not counts or not all(0 < count <= most for count, _ in counts) or not 0 < slots <= sum(count for count, _ in counts):
        raise ValueError("manifest: the numbers of rows, tokens and slots contradict each other")
    rows["filled"] = _filled(store, counts, slots)
    rows["chunk_tokens"] = 128
    rows["origins"] = [{"corpus": corpus, "options": options, "slots": slots}]
    return {**tree, "rows": rows}


def _filled(store: Path, counts: Sequence[tuple[int, int]], slots: int) -> dict[str, list[int]]:
    """What each slot holds, from the parts with those rows and crc32c."""
    columns = ["slot", "length", "labelled"]
    layout.inside(store, layout.rows_part(store, 0).parent)
    paths = [layout.rows_part(store, number) for number in range(len(counts))]
    try:
        tables = [read_part(path, *count, COLUMNS_1, columns) for path, count in zip(paths, counts, strict=True)]
    except (OSError, ValueError) as error:
        what = why(error) if isinstance(error, OSError) else error
        raise ValueError(f"the row table of {store} cannot be read ({what}); remove the folder and dump again") from None
    slot, length, labelled = (pa.concat_tables(tables)[name].to_numpy() for name in columns)
    if len(slot) and not 0 <= slot.min() <= slot.max() < slots:
        raise ValueError(f"the row table of {store} names slots that are not there; remove the folder and dump again")
    filled = {"rows": np.bincount(slot, minlength=slots)}
    filled |= {"tokens": np.bincount(slot, length, slots), "labelled": np.bincount(slot, labelled, slots)}
    return {name: values.astype(np.int64).tolist() for name, values in filled.items()}


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
