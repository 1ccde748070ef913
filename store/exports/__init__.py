"""What other programs read: a store's rows and features as Parquet, as safetensors, or as speculators' hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from store.exports import hidden_states, parquet, tensors
from store.exports.folder import open_folder
from store.exports.selection import select
from store.reader import Store

Format = Literal["parquet", "safetensors", "hidden-states"]
FORMATS: tuple[Format, ...] = ("parquet", "safetensors", "hidden-states")


class Exported(NamedTuple):
    """What there is now."""

    features: tuple[str, ...]
    rows: int
    new_files: int
    """Files that this run wrote; the others were there."""


def export(
    path: Path,
    out: Path,
    kind: Format,
    *,
    passes: Sequence[str] = (),
    features: Sequence[str] = (),
    split: str | None = None,
    first: int = 0,
    after: int | None = None,
    tick: Callable[[int, int], object] = lambda done, total: None,
) -> Exported:
    """Write features of the store at ``path`` to the folder ``out``; an export that was cut short goes on.

    Args:
        passes: Whose features; all of them by default.
        features: Keys; all stored ones by default.
        first: Number of the first row, and ``after`` that of the first one beyond.
        tick: Called after each slot with how many rows are done, of how many.

    Raises:
        ValueError: the store has no such thing, or the format cannot hold it.
        StoreError: no store; a damaged or missing shard; ``out`` holds something else or cannot be written.
    """
    store = Store.open(path)
    selection = select(store, passes, features, split, first, after)
    if kind == "hidden-states":
        selection = replace(selection, keys=hidden_states.layers(store, selection.keys, bool(features)))
    total = sum(len(rows) for _, rows in selection.slots(store))
    with open_folder(out, selection.plan(store, kind)) as folder:
        done = 0
        for slot, rows in selection.slots(store):
            if kind == "parquet":
                parquet.write_slot(store, selection, slot, rows, folder)
            elif kind == "safetensors":
                tensors.write_slot(store, selection, slot, rows, folder)
            else:
                hidden_states.write_rows(store, selection.keys, rows, done, folder)
            done += len(rows)
            tick(done, total)
        folder.finish()
    return Exported(tuple(str(key) for key in selection.keys), done, folder.files)
