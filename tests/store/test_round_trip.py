"""What is committed is what is read, bit for bit, for any rows."""

import pickle
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import GROUPS, SPECS, Made, answers, make_rows, make_store, pass_info, spec, units

from store import FeatureKey, MissingFeature, Row, RowWriter, Store, StoreError, StoreWriter
from store.verify import verify

ROW = st.integers(1, 60).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length)))
KEYS = [
    "hidden.1@all",
    "final@first",
    "hidden.0@last",
    "final@mean",
    "head_input@masked",
    "lm_logits@labels:top3",
    "lm_logits@labels:select",
]


def as_read(made: Made, key: str, array: str, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([made.values[key, array][row] for row in rows])


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.lists(ROW, min_size=1, max_size=2), min_size=1, max_size=12),
    slot_tokens=st.sampled_from([128, 256, 640]),
    keys=st.sets(st.sampled_from(KEYS), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 9),
)
def test_any_rows_read_back_bit_for_bit_in_any_order(groups, slot_tokens, keys, dtype, seed) -> None:
    specs = tuple(spec(key, dtype, 50 if "logits" in key else 3, (4,) if "select" in key else ()) for key in sorted(keys))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)  # power stays on, and examples are many
        made = make_store(Path(folder) / "store", groups, specs, slot_tokens, seed)
        store = Store.open(made.path)
        chosen = np.random.default_rng(seed).integers(0, len(made.rows), 9)
        assert store.complete("bert")
        for feature in specs:
            read = store.read(feature.feature.of("bert"), chosen)
            assert set(read) == {array.name for array in feature.arrays}
            for array, values in read.items():
                expected = as_read(made, feature.key, array, chosen)
                assert values.dtype == expected.dtype
                assert values.tobytes() == expected.tobytes()
        for name in ("input_ids", "segments", "token_labels"):
            expected = np.concatenate([getattr(made.rows[row], name) for row in chosen])
            np.testing.assert_array_equal(store.tokens(name, chosen), expected)


EDGE = st.sampled_from([1, 127, 128, 129, 1023, 1024, 1025])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(EDGE, st.sampled_from([0, 1, 127, 128, 129])), min_size=1, max_size=7),
    slot_tokens=st.sampled_from([1152, 2048]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8", "float8"]),
    compression=st.sampled_from(["none", "zstd"]),
    writers=st.integers(1, 3),
    mapped=st.booleans(),
)
def test_rows_at_the_edges_of_chunks_read_back_in_every_form_from_any_number_of_writers(
    rows, slot_tokens, dtype, compression, writers, mapped
) -> None:
    specs = tuple(spec(key, dtype, 5, (), compression) for key in ("hidden.1@all", "final@first", "head_input@labels"))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, ExitStack() as open_writers:
        patch.setattr("os.fsync", lambda file: None)
        made = make_rows(Path(folder) / "store", [[(length, min(length, labelled))] for length, labelled in rows], slot_tokens)
        world = [open_writers.enter_context(StoreWriter.open(made.path)) for _ in range(writers)]
        for writer in world:
            writer.add_pass("bert", pass_info(specs), {})
        for shard in range(made_slots := world[0].manifest.rows.slots):
            world[shard % writers].commit("bert", shard, answers(made, shard, specs, world[0].rows.columns.slot))
        store = Store.open(made.path, mapped)
        assert len(store.committed("bert")) == made_slots
        chosen = np.random.default_rng(0).permutation(len(made.rows)).repeat(2)
        for feature in specs:
            for array, values in store.read(feature.feature.of("bert"), chosen).items():
                expected = as_read(made, feature.key, array, chosen)
                assert values.dtype == expected.dtype
                assert values.tobytes() == expected.tobytes()
        assert verify(made.path) == []


def test_the_row_table_tells_where_rows_are_and_where_they_came_from(made: Made) -> None:
    rows = Store.open(made.path).rows
    columns = rows.columns
    slot_of_group = {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 3, 7: 3}
    assert columns.slot.tolist() == [slot_of_group[row.group] for row in made.rows]
    for number, row in enumerate(made.rows):
        earlier = [other for other in range(number) if columns.slot[other] == columns.slot[number]]
        assert columns.index[number] == len(earlier)
        assert columns.offset[number] == sum(len(made.rows[other].input_ids) for other in earlier)
        assert columns.labelled_offset[number] == sum(made.rows[other].labelled for other in earlier)
        assert columns.length[number] == len(row.input_ids)
        assert (columns.labelled[number], columns.copy[number]) == (row.labelled, row.copy)
        assert [columns.group[other] == columns.group[number] for other in range(len(rows))] == [
            other.group == row.group for other in made.rows
        ]
        assert rows.splits[columns.split[number]] == row.split
        assert np.isnan(rows.label[number]) if row.label is None else rows.label[number] == row.label
        record = rows.table.slice(number, 1).to_pylist()[0]
        assert (record["source"], record["record"], record["part"]) == (row.source, row.record, row.part)
        assert [(span["start"], span["end"]) for span in record["spans"]] == row.spans
    assert rows.select("dev").tolist() == [row for row in range(len(rows)) if made.rows[row].split == "dev"]
    assert len(rows.select(None, copy=0)) == len(rows) == len(made.rows)
    with pytest.raises(ValueError, match="did you mean 'train'"):
        rows.select("trian")


def test_statics_read_back_bit_for_bit(made: Made) -> None:
    statics = Store.open(made.path).statics("bert")
    assert statics["1.query.weight"].tobytes() == np.arange(64, dtype=np.float32).tobytes()
    assert statics["1.query.weight"].shape == (8, 8)
    assert statics["1.query.bias"].dtype == np.uint16


def test_a_store_can_be_pickled_for_loader_processes(made: Made) -> None:
    key = SPECS[0].feature.of("bert")
    store = pickle.loads(pickle.dumps(Store.open(made.path)))
    assert store.read(key, np.array([2]))[""].tobytes() == as_read(made, SPECS[0].key, "", np.array([2])).tobytes()


def test_no_rows_read_as_nothing(made: Made) -> None:
    store = Store.open(made.path)
    assert store.read(SPECS[0].feature.of("bert"), np.array([], np.int64))[""].shape == (0, 8)
    assert store.tokens("input_ids", np.array([], np.int64)).shape == (0,)


def test_what_is_not_stored_is_named_with_what_is(made: Made) -> None:
    store = Store.open(made.path)
    with pytest.raises(MissingFeature, match=r"has no bert/hidden.0@all; it holds .*bert/hidden.1@all"):
        store.read(FeatureKey.parse("bert/hidden.0@all"), np.array([0]))
    with pytest.raises(MissingFeature, match="has no other/hidden"):
        store.read(FeatureKey.parse("other/hidden.1@all"), np.array([0]))
    with pytest.raises(MissingFeature, match="documents"):
        store.tokens("documents", np.array([0]))
    with pytest.raises(MissingFeature, match="no pass 'other'"):
        store.statics("other")


def test_more_files_than_may_be_open_are_read_in_turn(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.opened._most_open", lambda: 2)
    store, everything = Store.open(made.path), np.arange(len(made.rows))
    for _ in range(2):
        for feature in SPECS:
            for array, values in store.read(feature.feature.of("bert"), everything).items():
                assert values.tobytes() == as_read(made, feature.key, array, everything).tobytes()
        assert len(store.rows.files) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros(0, np.int32), "segments": np.zeros(0, np.uint8)}, "no tokens"),
        ({"input_ids": np.zeros(3, np.int64)}, "input_ids: expected int32"),
        ({"segments": None}, "segments must be in all rows or in none"),
        ({"segments": np.zeros(4, np.uint8)}, r"segments: expected uint8 \[3\]"),
        ({"labelled": 4}, "labelled: expected 0 to 3"),
        ({"spans": [(1, 4)]}, r"span \(1, 4\)"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_by_its_record(tmp_path: Path, change: dict, message: str) -> None:
    good = {
        "input_ids": np.zeros(3, np.int32),
        "segments": np.zeros(3, np.uint8),
        "documents": None,
        "token_labels": None,
        "labelled": 0,
        "label": None,
    }
    rest = {"group": 0, "copy": 0, "split": "train", "source": "x.csv", "record": 12, "part": 0, "spans": []}
    with RowWriter(tmp_path / "store", 128) as writer:
        writer.append_group([Row(**good, **rest)])
        with pytest.raises(ValueError, match=f"x.csv, record 12: .*{message}"):
            writer.append_group([Row(**{**good, **rest, **change})])


def test_a_group_larger_than_a_slot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a group of 129 tokens in 2 rows does not fit in a slot of 128"):
        make_rows(tmp_path / "store", [[(100, 0), (29, 0)]])
    with pytest.raises(ValueError, match="multiple of 128"):
        RowWriter(tmp_path / "other", 100)


def test_a_corpus_without_rows_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the corpus empty"):
        make_rows(tmp_path / "store", [])
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "store")
    assert make_rows(tmp_path / "store", GROUPS).rows


def test_units_of_a_row_follow_from_the_positions(made: Made) -> None:
    rows = Store.open(made.path).rows
    columns = rows.columns
    for positions in ("all", "first", "last", "mean", "row", "masked", "labels"):
        (_, length), per_slot = columns.units(positions), rows.slot_units(positions)
        assert length.tolist() == [units(row, positions) for row in made.rows]
        assert per_slot.tolist() == [length[columns.slot == slot].sum() for slot in range(rows.info.slots)]
