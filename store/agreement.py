"""Do the two forms of the row table, arrays for readers and Parquet for people, say the same?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from store import layout
from store.errors import CorruptShard
from store.rows import COLUMNS
from store.table import Ints, RowTable


def row_problems(rows: RowTable, full: bool, compare: bool) -> Iterator[tuple[Path, str]]:
    """Files of the row table that contradict the manifest or one another, and what is wrong with them.

    Args:
        full: Read the Parquet files, and not their ends alone.
        compare: Look at what the arrays say too, which have been read and are as they were written.
    """
    sound = compare
    for slot in range(rows.info.slots if compare and "numbers" in rows.info.slot_crcs else 0):
        try:
            rows.in_slot(slot)
        except CorruptShard as error:
            sound = False
            yield layout.slot_file(layout.rows_array(rows.store, "numbers"), slot), str(error)
        for name, look in (("domain", rows.domain_at), ("draw", rows.draw_at)):
            try:
                if name in rows.info.row_arrays:
                    look(rows.rows_of(slot))
            except CorruptShard as error:
                yield layout.slot_file(layout.rows_array(rows.store, name), slot), str(error)
    first = 0
    for number, part in enumerate(rows.info.parts):
        members = np.arange(first, first + part.rows)
        first += part.rows
        try:
            if not full:
                rows.check_part(number)
            elif what := _contradiction(rows, number, members if sound else members[:0]):
                yield layout.rows_part(rows.store, number), what
        except CorruptShard as error:
            yield layout.rows_part(rows.store, number), str(error)


def _contradiction(rows: RowTable, number: int, members: Ints) -> str | None:
    """What Parquet file ``number``, which is about the rows ``members``, says otherwise than the arrays."""
    table = rows.part(number, COLUMNS.names)
    if not len(members):
        return None
    numbers = rows.at(members)
    said = {
        "split": (pc.index_in(table["split"], pa.array(rows.splits)).to_numpy(), numbers.split),
        "copy": (table["copy"].to_numpy(), numbers.copy),
        "length": (table["length"].to_numpy(), numbers.length),
        "label": (table["label"].to_numpy(), rows.label_at(members)),
    }
    for name, (here, there) in said.items():
        differs = (here != there) & ~(np.isnan(here) & np.isnan(there))
        if differs.any():
            row = int(np.argmax(differs))
            return f"{name} of row {members[row]} is {here[row]}, but {there[row]} in the array that readers use"
    return None
