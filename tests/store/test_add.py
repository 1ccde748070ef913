"""Rows that are added stand behind the others, in slots of their own; until then nothing of them is there."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, SPECS, Made, answers, make_rows, make_store, spec
from step_kills import content, killed_at

from store import FingerprintMismatch, RowWriter, Store, StoreBusy, StoreError, StoreWriter
from store.strays import strays
from store.verify import verify


def test_added_rows_are_answered_like_the_first(made: Made) -> None:
    before = Store.open(made.path)
    slots, kept = before.manifest.rows.slots, content(made.path)
    added = make_rows(made.path, GROUPS[2:6], seed=1, corpus="d", splits=("test", "dev"), adding=True)
    store = Store.open(made.path)
    assert (len(store.rows), store.rows.splits) == (len(made.rows) + len(added.rows), ("train", "dev", "test"))
    assert [(origin.corpus, origin.slots) for origin in store.manifest.rows.origins] == [
        ("c", slots),
        ("d", store.manifest.rows.slots - slots),
    ]
    for number, row in enumerate(made.rows + added.rows):
        np.testing.assert_array_equal(store.tokens("input_ids", np.array([number])), row.input_ids)
        assert store.rows.about(number)["split"] == row.split == store.rows.splits[store.rows.columns.split[number]]
    with StoreWriter.open(made.path) as writer:
        assert writer.pending("bert") == list(range(slots, writer.rows.info.slots))
        together = Made(made.path, made.rows + added.rows, made.values)
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(together, shard, SPECS, writer.rows.columns.slot))
    store = Store.open(made.path)
    for feature in SPECS:
        for row in range(len(store.rows)):
            for array, values in store.read(feature.feature.of("bert"), np.array([row])).items():
                assert values.tobytes() == made.values[feature.key, array][row].tobytes()
    assert verify(made.path) == []
    now = content(made.path)
    assert all(now[name] == data for name, data in kept.items() if not name.endswith("zarr.json"))
    assert len(before.rows) == len(made.rows)  # who had the store open sees what it opened
    before.read(SPECS[0].feature.of("bert"), np.arange(len(before.rows)))


def test_rows_of_another_kind_are_refused_and_leave_the_store_as_it_was(made: Made) -> None:
    kept = Store.open(made.path).manifest
    with pytest.raises(FingerprintMismatch, match="rows of the same texts"):
        make_rows(made.path, GROUPS, adding=True)
    with RowWriter.adding(made.path) as writer, pytest.raises(StoreBusy):
        make_rows(made.path, GROUPS, corpus="d", adding=True)
    with StoreWriter.open(made.path), pytest.raises(StoreBusy):
        make_rows(made.path, GROUPS, corpus="d", adding=True)
    with pytest.raises(StoreError, match="expected a store"):
        RowWriter.adding(made.path / "none")
    with pytest.raises(StoreError, match="only read; write it as 6"):
        RowWriter.adding(Path(__file__).parent / "schemas" / "1")
    del writer
    assert Store.open(made.path).manifest == kept
    assert make_rows(made.path, GROUPS, corpus="d", adding=True)
    assert verify(made.path) == []


def test_an_addition_that_is_killed_anywhere_ends_in_the_same_store(tmp_path: Path) -> None:
    few, groups = (spec("final@first"),), [*GROUPS[:3], GROUPS[5]]
    begun = make_store(tmp_path / "begun", GROUPS[:2], few).path
    whole = shutil.copytree(begun, tmp_path / "whole")
    make_rows(whole, groups, seed=1, corpus="d", adding=True)
    wanted, step, kills = content(whole), 0, 0
    while True:
        path = shutil.copytree(begun, tmp_path / f"store{step}")
        if not killed_at(step, lambda: make_rows(path, groups, seed=1, corpus="d", adding=True)):  # noqa: B023
            break
        store = Store.open(path)
        assert len(store.rows) in (3, 8)
        store.read(few[0].feature.of("bert"), np.arange(3))
        if len(store.rows) == 3:
            kills += killed_at(step // 2, lambda: make_rows(path, GROUPS, seed=2, corpus="e", adding=True))  # noqa: B023
            make_rows(path, groups, seed=1, corpus="d", adding=True)
        assert content(path) == wanted
        assert verify(path) == []
        assert strays(path) == []
        step += 7
    assert kills > 8
