"""Pairs of rows, their plans and draws, and interventions of passes come back through everything that is done to a store."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from object_storage import quiet
from pair_store import PAIRS, SPECS, answer, make_rows, make_store, pass_of
from safetensors.torch import load_file
from small_store import GROUPS as PLAIN
from small_store import MADE, Made
from small_store import make_rows as make_plain

from store import FingerprintMismatch, Row, RowWriter, Store, StoreWriter
from store.copies import Wanted, copy
from store.diff import diff
from store.exports import export
from store.intervention import Intervention
from store.merge import merge
from store.pairs import sound, stand_in_pairs
from store.recode import Keeping
from store.together import check_same_teacher
from store.transfer import download, upload
from store.verify import verify


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_store(tmp_path / "store")


def check(store: Store, rows: list[Row]) -> None:
    """The store holds these rows, and nothing is wrong with it."""
    assert verify(store.path) == []
    assert store.manifest.rows.paired
    order = np.random.default_rng(5).permutation(len(rows))
    assert store.rows.draw_at(order).tolist() == [rows[row].draw for row in order]
    assert store.tokens("interchange", order).tolist() == np.concatenate([rows[row].interchange for row in order]).tolist()
    assert store.tokens("interchange", order).dtype == np.int32


def copied(path: Path, new: Path, **wanted: object) -> Store:
    copy(path, new, Wanted(**wanted), MADE, lambda name, info: info, lambda done, total: None)
    return Store.open(new)


def test_rows_come_back_with_plans_and_draws(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Store.open(made.path), made.rows)
    monkeypatch.setattr("store.table.SMALL", 3)  # a store too large to be held in memory
    check(Store.open(made.path), made.rows)
    assert Store.open(made.path).manifest.passes["bert"].intervention == Intervention(layers=((1,),))


def test_plain_zarr_reads_both(made: Made) -> None:
    root, numbers = zarr.open_group(str(made.path), mode="r"), Store.open(made.path).rows.columns
    for row, slot, index, offset in zip(made.rows, numbers.slot, numbers.index, numbers.offset, strict=True):
        assert root["rows/draw"][slot * 128 + index].tolist() == [row.draw]
        start = slot * 128 + offset
        assert root["tokens/interchange"][start : start + len(row.input_ids)].tolist() == row.interchange.tolist()


def test_a_store_without_pairs_has_neither(tmp_path: Path) -> None:
    rows = Store.open(make_plain(tmp_path / "plain", PLAIN).path).manifest.rows
    assert not rows.paired
    assert not (tmp_path / "plain" / "rows" / "draw").exists()


CHANGES = {
    "draw": ({0: {"draw": None}}, "record 0: draw: expected a number from 0 on in all rows"),
    "negative draw": ({0: {"draw": -1}, 1: {"draw": -1}}, "record 0: draw: .* found -1"),
    "two draws": ({0: {"draw": 1}, 1: {"draw": 2}}, "record 0: interchange: expected rows that name one another's tokens, and one draw"),
    "no plan in one": ({1: {"interchange": None}}, "record 1: interchange must be in all rows or in none"),
    "past the end": ({0: {"interchange": np.array([5, -1, -1], np.int32)}}, "record 0: interchange: expected rows that name"),
    "not returned": ({0: {"interchange": np.array([0, -1, -1], np.int32)}}, "record 0: interchange: expected rows that name"),
    "below -1": ({0: {"interchange": np.array([-2, -1, -1], np.int32)}}, "record 0: interchange: expected rows that name"),
    "another type": ({0: {"interchange": np.array([-1, -1, -1])}}, r"interchange: expected int32 \[3\], found int64"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_pairs_that_contradict_themselves_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = CHANGES[name]
    plan = np.full(3, -1, np.int32)
    plain = [
        Row(np.zeros(3, np.int32), None, None, None, 0, None, 0, 0, "train", "text.jsonl", record, 0, [], interchange=plan, draw=7)
        for record in (0, 1)
    ]
    with RowWriter(tmp_path / "store", 128) as writer:
        writer.append_group(plain)
        with pytest.raises(ValueError, match=message):
            writer.append_group([dataclasses.replace(row, **changes.get(number, {})) for number, row in enumerate(plain)])


@pytest.mark.parametrize("count", [1, 3])
def test_a_group_that_is_no_pair_is_refused(tmp_path: Path, count: int) -> None:
    plan = np.full(3, -1, np.int32)
    row = Row(np.zeros(3, np.int32), None, None, None, 0, None, 0, 0, "train", "t", 0, 0, [], interchange=plan, draw=7)
    with (
        RowWriter(tmp_path / "store", 128) as writer,
        pytest.raises(ValueError, match=f"groups of two, each with a draw, found {count}"),
    ):
        writer.append_group([row] * count)


def test_what_pairs_can_have_is_told_from_what_they_cannot() -> None:
    lengths, draws = np.array([3, 2]), np.array([4, 4])
    assert sound(np.array([-1, 1, 0, 2, 1]), lengths, draws)
    assert sound(np.array([-1, -1, -1, -1, -1]), lengths, draws)
    for plan in ([-1, 1, 0, 1, 2], [-1, 1, -1, 2, 1], [2, -1, -1, -1, 0], [-1, 0, 0, 1, -1], [-1, 1, 0, 3, 1]):
        assert not sound(np.array(plan), lengths, draws), plan
    assert not sound(np.array([-1] * 5), lengths, np.array([4, 5]))
    assert stand_in_pairs(np.array([4, 5, 8, 9]), np.array([2, 2, 4, 4]))
    for rows, groups in (([4], [2]), ([4, 4], [2, 2]), ([4, 5, 8], [2, 2, 4]), ([5, 8, 9, 4], [2, 4, 4, 2])):
        assert not stand_in_pairs(np.array(rows), np.array(groups))


# What is done to a store


def test_a_copy_keeps_both_linked_or_written_anew(made: Made, tmp_path: Path) -> None:
    check(copied(made.path, tmp_path / "whole"), made.rows)
    check(copied(made.path, tmp_path / "dev", split="dev"), [row for row in made.rows if row.split == "dev"])
    some = copied(made.path, tmp_path / "some", rows=(2, 8), keeping=Keeping(positions="first"))
    check(some, made.rows[2:8])
    assert some.manifest.passes["bert"].intervention == Intervention(layers=((1,),))
    with pytest.raises(ValueError, match="are read together"):
        copied(made.path, tmp_path / "half", rows=(1, 6))


def test_added_and_merged_rows_keep_both(made: Made, tmp_path: Path) -> None:
    further = [(11, 12), (40, 41)]
    other = make_store(tmp_path / "other", further, "d", seed=1)
    merge(tmp_path / "merged", [made.path, other.path], MADE, lambda done, total: None)
    check(Store.open(tmp_path / "merged"), made.rows + other.rows)
    added = make_rows(made.path, further, corpus="d", seed=1, adding=True)
    check(Store.open(made.path), made.rows + added.rows)
    answer(Made(made.path, made.rows + added.rows))
    assert diff((made.path, tmp_path / "merged")).differing == []


def test_stores_with_other_interventions_or_without_pairs_are_not_put_together(made: Made, tmp_path: Path) -> None:
    make_plain(tmp_path / "plain", [[(9, 1)]], corpus="d")
    with pytest.raises(FingerprintMismatch, match="another token_arrays than"):
        merge(tmp_path / "merged", [made.path, tmp_path / "plain"], MADE, lambda done, total: None)
    make_rows(tmp_path / "other", [(9, 9)], "d")
    with StoreWriter.open(tmp_path / "other") as writer:
        writer.add_pass("bert", pass_of(None), {})
    with pytest.raises(FingerprintMismatch, match=r"pass bert of .* has another intervention than"):
        merge(tmp_path / "merged", [made.path, tmp_path / "other"], MADE, lambda done, total: None)
    with StoreWriter.open(made.path) as writer, pytest.raises(FingerprintMismatch, match="intervention"):
        writer.add_pass("bert", pass_of(None), {})
    passes = {"one": pass_of(None), "two": pass_of(Intervention(layers=((1,),)))}
    with pytest.raises(FingerprintMismatch, match=r"its intervention is .*; only passes of one teacher are read as one"):
        check_same_teacher(passes)


def test_rows_of_other_plans_or_draws_are_not_the_same(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pair_store.plans", lambda lengths, seed: [np.full(length, -1, np.int32) for length in lengths])
    make_rows(tmp_path / "unplanned")
    empty = [row for row, each in enumerate(made.rows) if (each.interchange < 0).all()]
    assert diff((made.path, tmp_path / "unplanned")).differing == [row for row in range(2 * len(PAIRS)) if row not in empty]
    monkeypatch.undo()
    make_rows(tmp_path / "redrawn", redrawn=2)
    assert diff((made.path, tmp_path / "redrawn")).differing == [4, 5]


def test_exports_hold_both(made: Made, tmp_path: Path) -> None:
    export(made.path, tmp_path / "parquet", "parquet")
    found = sorted(pq.read_table(tmp_path / "parquet").to_pylist(), key=lambda row: row["row"])
    assert [row["draw"] for row in found] == [row.draw for row in made.rows]
    assert [row["interchange"] for row in found] == [row.interchange.tolist() for row in made.rows]
    export(made.path, tmp_path / "tensors", "safetensors")
    for file in (tmp_path / "tensors").glob("*.safetensors"):
        tensors = load_file(file)
        rows = [made.rows[row] for row in tensors["row"].tolist()]
        assert tensors["draw"].tolist() == [row.draw for row in rows]
        assert tensors["tokens/interchange"].tolist() == np.concatenate([row.interchange for row in rows]).tolist()


def test_object_storage_gives_both_back(made: Made, tmp_path: Path, url: str) -> None:
    upload(made.path, url, quiet)
    download(url, tmp_path / "back", quiet)
    check(Store.open(tmp_path / "back"), made.rows)
    there, rows = Store.open(url), np.arange(len(made.rows))
    assert there.rows.draw_at(rows).tolist() == [row.draw for row in made.rows]


def test_specs_of_the_pass_are_read_as_any_other(made: Made) -> None:
    store, rows = Store.open(made.path), np.arange(len(made.rows))
    for feature in SPECS:
        for name, values in store.read(feature.feature.of("bert"), rows).items():
            assert values.tobytes() == b"".join(value.tobytes() for value in made.values[feature.key, name])
