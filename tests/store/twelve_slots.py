"""A store of twelve slots with a pass that writers share, and what they answer."""

from pathlib import Path

import numpy as np
from small_store import SPECS, Made, answers, make_rows, pass_info

from store import Store, StoreWriter, layout
from store.verify import verify

SLOTS = 12
STATICS = {"1.query.bias": np.arange(8, dtype=np.uint16)}
ROW = type("Row", (), {"input_ids": np.zeros(100), "labelled": 9})()


def unanswered(path: Path) -> Made:
    """A store of SLOTS slots with the pass ``bert`` and nothing of it yet."""
    made = make_rows(path, [[(100, 9)]] * SLOTS)
    with StoreWriter.open(made.path) as store:
        store.add_pass("bert", pass_info(), STATICS)
    return made


def answer(store: StoreWriter, shard: int, seed: int = 0) -> None:
    rows = Store.open(store.path).rows
    lengths = rows.columns.length, rows.columns.labelled
    made = Made(store.path, [ROW for _ in lengths[0]])
    store.commit("bert", shard, answers(made, shard, SPECS, rows.columns.slot, seed))


def check(path: Path) -> None:
    """The store is whole, complete, and holds what ``answer`` gives."""
    assert verify(path) == []
    store = Store.open(path)
    assert store.complete("bert")
    wanted = Made(path, [ROW] * SLOTS)
    for shard in range(SLOTS):
        answers(wanted, shard, SPECS, np.arange(SLOTS))
    for feature in SPECS:
        for array, values in store.read(feature.feature.of("bert"), np.arange(SLOTS)).items():
            assert values.tobytes() == np.concatenate(wanted.values[feature.key, array]).tobytes()


def claims(path: Path) -> list[str]:
    return sorted(entry.name for entry in layout.claims(path, "bert").iterdir())
