"""Stores of different rows become one, without copies, at any moment or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, MADE, SPECS, Made, answers, make_rows, make_store, pass_info, spec
from step_kills import content, killed_at

from store import FingerprintMismatch, Store, StoreError, StoreWriter
from store.copies import Wanted, copy
from store.merge import merge
from store.verify import verify

OTHER = [GROUPS[3], *GROUPS]


def tick(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def pair(made: Made, tmp_path: Path) -> tuple[Made, Made]:
    return made, make_store(tmp_path / "other", OTHER, seed=1, corpus="d")


def check(store: Store, parts: list[Made]) -> None:
    """Row for row what went into the parts."""
    assert len(store.rows) == sum(len(part.rows) for part in parts)
    row = 0
    for part in parts:
        for number, wanted in enumerate(part.rows):
            one = np.array([row])
            for array in ("input_ids", "segments", "token_labels"):
                np.testing.assert_array_equal(store.tokens(array, one), getattr(wanted, array))
            for feature in SPECS:
                for array, values in store.read(feature.feature.of("bert"), one).items():
                    assert values.tobytes() == part.values[feature.key, array][number].tobytes()
            about = store.rows.about(row)
            assert (about["record"], about["split"]) == (wanted.record, wanted.split)
            assert store.rows.splits[store.rows.at(one).split[0]] == wanted.split
            np.testing.assert_equal(store.rows.label_at(one)[0], np.nan if wanted.label is None else wanted.label)
            row += 1


def test_rows_and_features_of_both_stand_one_behind_the_other(pair: tuple[Made, Made], tmp_path: Path) -> None:
    links = merge(tmp_path / "new", [part.path for part in pair], MADE, tick)
    store = Store.open(tmp_path / "new")
    check(store, list(pair))
    assert verify(store.path) == []
    assert store.complete("bert")
    assert [origin.corpus for origin in store.manifest.rows.origins] == ["c", "d"]
    assert len(store.manifest.history) == 2
    np.testing.assert_array_equal(store.statics("bert")["1.query.bias"], np.arange(8))
    assert links is not None
    assert not links.copied
    names = ["bert/hidden.1/all/c.0.0", "tokens/input_ids/c.0", "rows/part-00000.parquet", "rows/numbers/c.0.0"]
    assert all((store.path / name).samefile(pair[0].path / name) for name in names)
    groups = store.rows.columns.group
    first = len(pair[0].rows)
    assert not set(groups[:first].tolist()) & set(groups[first:].tolist())


def test_splits_are_named_anew_where_their_order_differs(tmp_path: Path) -> None:
    first = make_store(tmp_path / "first", GROUPS)
    second = make_rows(tmp_path / "second", GROUPS, corpus="d", splits=("dev", "train"))
    assert Store.open(first.path).rows.splits == ("train", "dev")
    assert Store.open(second.path).rows.splits == ("dev", "train")
    merge(tmp_path / "new", [first.path, second.path], MADE, tick)
    store = Store.open(tmp_path / "new")
    splits = [store.rows.splits[code] for code in store.rows.columns.split]
    assert splits == [row.split for part in (first, second) for row in part.rows]
    assert store.rows.table["split"].to_pylist() == splits
    assert verify(store.path) == []
    assert (store.path / "tokens/input_ids/c.4").samefile(second.path / "tokens/input_ids/c.0")


def test_a_pass_of_some_stores_is_pending_for_the_rows_of_the_others(pair: tuple[Made, Made], tmp_path: Path) -> None:
    third = make_rows(tmp_path / "third", GROUPS[:3], corpus="e")
    merge(tmp_path / "new", [pair[0].path, third.path, pair[1].path], MADE, tick)
    store = Store.open(tmp_path / "new")
    before, between = Store.open(pair[0].path).manifest.rows.slots, Store.open(third.path).manifest.rows.slots
    with StoreWriter.open(store.path) as writer:
        assert writer.pending("bert") == list(range(before, before + between))
        rows = Made(store.path, pair[0].rows + third.rows + pair[1].rows)
        for shard in writer.pending("bert"):
            arrays = answers(rows, shard, SPECS, writer.rows.columns.slot)
            writer.commit("bert", shard, arrays)
    assert Store.open(store.path).complete("bert")
    assert verify(store.path) == []


def test_merged_stores_can_be_merged_and_removed(pair: tuple[Made, Made], tmp_path: Path) -> None:
    third = make_store(tmp_path / "third", GROUPS[:4], seed=2, corpus="e")
    merge(tmp_path / "two", [part.path for part in pair], MADE, tick)
    merge(tmp_path / "three", [tmp_path / "two", third.path], MADE, tick)
    for path in (pair[0].path, pair[1].path, third.path, tmp_path / "two"):
        path.rename(path.with_name(f"{path.name}-gone"))
    check(Store.open(tmp_path / "three"), [*pair, third])
    assert verify(tmp_path / "three") == []


def test_files_are_copied_where_links_cannot_be_had(pair: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def refused(source: Path, target: Path, **options: bool) -> None:
        if ".tmp" not in str(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(source, target, **options)

    monkeypatch.setattr("os.link", refused)
    links = merge(tmp_path / "new", [part.path for part in pair], MADE, tick)
    assert links is not None
    assert not links.linked
    assert links.copied_bytes > 0
    check(Store.open(tmp_path / "new"), list(pair))
    assert verify(tmp_path / "new") == []


def test_what_does_not_go_together_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    def refused(other: Path, message: str, error: type[Exception] = FingerprintMismatch) -> None:
        with pytest.raises(error, match=message):
            merge(tmp_path / "new", [made.path, other], MADE, tick)
        assert not (tmp_path / "new").exists()

    refused(made.path, "two or more different stores", ValueError)
    refused(tmp_path / "none", "expected a store", StoreError)
    refused(make_store(tmp_path / "same", OTHER).path, "rows of the same texts")
    refused(make_store(tmp_path / "slots", GROUPS, slot_tokens=256, corpus="d").path, "another slot_tokens .*expected 128, found 256")
    other = make_rows(tmp_path / "features", GROUPS, corpus="d")
    with StoreWriter.open(other.path) as writer:
        writer.add_pass("bert", pass_info((spec("hidden.1@all", "float16"),)), {})
    refused(other.path, r"pass bert of .*features has another features .*bfloat16.*float16")
    with StoreWriter.open(other.path) as writer:
        writer.add_pass("bert", pass_info().model_copy(update={"teacher": "xyz"}), {})
    refused(other.path, "another teacher .*expected abc, found xyz")
    refused(Path(__file__).parent / "schemas" / "1", "schema version 1", StoreError)


@pytest.mark.parametrize("name", ["bert/hidden.1/all/c.0.0", "tokens/input_ids", "model/bert", "rows/part-00000.parquet"])
def test_links_in_a_store_lead_nothing_of_others_into_the_new_one(pair: tuple[Made, Made], name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "c.0").write_text("somebody's")
    path = pair[0].path / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(tmp_path / "aside")
    path.symlink_to(secret if path.suffix not in (".0", ".parquet") else secret / "c.0")
    with pytest.raises(StoreError, match=r"a link leads to|a link"):
        merge(tmp_path / "new", [part.path for part in pair], MADE, tick)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_folder_that_holds_something_is_left_alone(pair: tuple[Made, Made], tmp_path: Path) -> None:
    paths = [part.path for part in pair]
    with pytest.raises(StoreError, match="already holds another store"):
        merge(pair[0].path, paths, MADE, tick)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="something else; nothing was touched"):
        merge(tmp_path / "mine", paths, MADE, tick)
    merge(tmp_path / "new", paths, MADE, tick)
    assert merge(tmp_path / "new", paths, MADE, tick) is None  # it is there already
    assert verify(tmp_path / "new") == []


def test_a_merge_that_is_killed_anywhere_ends_in_the_same_store(tmp_path: Path) -> None:
    few = (spec("hidden.1@all"),)
    paths = [make_store(tmp_path / corpus, GROUPS[:3], few, corpus=corpus).path for corpus in "ab"]
    merge(tmp_path / "whole", paths, MADE, tick)
    wanted, step, kills = content(tmp_path / "whole"), 0, 0
    while killed_at(step, lambda: merge(tmp_path / f"new{step}", paths, MADE, tick)):  # noqa: B023
        new = tmp_path / f"new{step}"
        if not (new / "manifest.json").exists():
            with pytest.raises(StoreError):
                Store.open(new)
        kills += killed_at(step // 2, lambda: merge(new, paths, MADE, tick))  # noqa: B023
        merge(new, paths, MADE, tick)
        assert content(new) == wanted
        assert Store.open(new).committed("bert") == Store.open(tmp_path / "whole").committed("bert")
        step += 9
    assert kills > 5
    assert [verify(path) for path in paths] == [[], []]


def test_only_the_command_that_began_goes_on(pair: tuple[Made, Made], tmp_path: Path) -> None:
    paths, new = [part.path for part in pair], tmp_path / "new"
    made = MADE.model_copy(update={"command": ("teacher-dump", "merge", "new", "a b")})
    assert killed_at(40, lambda: merge(new, paths, made, tick))
    with pytest.raises(StoreError, match=r"unfinished|being made by"):
        Store.open(new)
    with pytest.raises(StoreError, match="being made by `teacher-dump merge new 'a b'`, which was cut short; run that again"):
        make_rows(new, GROUPS)
    merge(new, paths, made, tick)
    assert verify(new) == []


def test_parts_of_one_store_are_put_together_again_unless_they_share_a_row(made: Made, tmp_path: Path) -> None:
    def part(name: str, first: int, after: int) -> Path:
        copy(made.path, tmp_path / name, Wanted(rows=(first, after)), MADE, lambda _, info: info, tick)
        return tmp_path / name

    head, tail, more = part("head", 0, 4), part("tail", 4, len(made.rows)), part("more", 3, len(made.rows))
    merge(tmp_path / "whole", [tail, head], MADE, tick)
    order = [*range(4, len(made.rows)), *range(4)]
    check(Store.open(tmp_path / "whole"), [Made(made.path, [made.rows[row] for row in order],
          {name: [values[row] for row in order] for name, values in made.values.items()})])  # fmt: skip
    with pytest.raises(FingerprintMismatch, match=r"more holds rows of the same texts as .*head"):
        merge(tmp_path / "twice", [head, more], MADE, tick)
    with pytest.raises(FingerprintMismatch, match="rows of the same texts"):
        merge(tmp_path / "twice", [made.path, head], MADE, tick)
