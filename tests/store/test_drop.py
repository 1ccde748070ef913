"""What is dropped is gone from manifest, logs and disk; what is not stays, also for readers that have it open."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, MADE, SPECS, Made, answers, make_store, pass_info, spec
from step_kills import content, killed_at

from store import FeatureKey, MissingFeature, PassInfo, Store, StoreBusy, StoreError, StoreWriter, commits
from store.drop import drop
from store.strays import strays
from store.verify import verify

DROP = MADE.model_copy(update={"command": ("teacher-dump", "drop", "...")})
STATICS = {"1.query.bias": np.arange(8, dtype=np.uint16)}


def settle(name: str, info: PassInfo) -> PassInfo:
    """Requests are what is stored, and nothing is derived from it."""
    return info.model_copy(update={"requested": tuple(spec.key for spec in info.features), "statics": ()})


def disk(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


@pytest.fixture
def two(made: Made) -> Made:
    """A store with a second pass."""
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("second", pass_info((spec("final@first"),)), STATICS)
        for shard in writer.pending("second"):
            writer.commit("second", shard, answers(Made(made.path, made.rows), shard, (spec("final@first"),), writer.rows.columns.slot))
    (made.path / "model" / "second").mkdir(parents=True)
    (made.path / "model" / "second" / "config.json").write_text("{}")
    return made


def same_features(made: Made, keys: list[str]) -> None:
    store = Store.open(made.path)
    for feature in SPECS:
        if feature.key in keys:
            for row in range(len(made.rows)):
                for array, values in store.read(feature.feature.of("bert"), np.array([row])).items():
                    assert values.tobytes() == made.values[feature.key, array][row].tobytes()


def test_a_feature_goes_and_the_others_stay(made: Made) -> None:
    before = disk(made.path)
    freed = drop(made.path, ["bert/hidden.1@all", "bert/lm_logits@labels:select"], MADE, settle)
    assert not (made.path / "bert" / "hidden.1").exists()
    assert not (made.path / "bert" / "lm_logits" / "labels.select").exists()
    assert not (made.path / "static" / "bert" / "1.query.weight").exists()
    assert freed.shared == 0
    assert freed.freed > 0
    assert abs(before - disk(made.path) - freed.freed) < 32768  # metadata and the commits are written anew
    store = Store.open(made.path)
    assert store.manifest.passes["bert"].requested == ("final@first", "lm_logits@masked:top3")
    assert store.manifest.history == (MADE,)
    assert all(not name.startswith("hidden") for commit in store.committed("bert").values() for name in commit.files)
    same_features(made, ["final@first", "lm_logits@masked:top3"])
    assert verify(made.path) == []
    assert strays(made.path) == []


def test_a_pass_goes_and_another_of_its_name_finds_nothing_of_it(two: Made) -> None:
    drop(two.path, ["bert"], MADE, settle)
    for left in ("bert", ".bert.dropped", "static/bert", "model/bert"):
        assert not (two.path / left).exists()
    assert list(Store.open(two.path).manifest.passes) == ["second"]
    assert "bert" not in commits.replay(two.path)
    assert verify(two.path) == []
    with StoreWriter.open(two.path) as writer:
        writer.add_pass("bert", pass_info((spec("hidden.0@all"),)), STATICS)
        assert writer.pending("bert") == list(range(writer.rows.info.slots))
    drop(two.path, ["second", "bert"], MADE, settle)
    assert not Store.open(two.path).manifest.passes


def test_all_features_of_a_pass_are_the_pass(two: Made) -> None:
    drop(two.path, ["second/*", "bert/lm_logits*", "bert/final", "bert/final@first"], MADE, settle)
    assert {name: [spec.key for spec in info.features] for name, info in Store.open(two.path).manifest.passes.items()} == {
        "bert": ["hidden.1@all"]
    }
    assert not (two.path / "model" / "second").exists()


def test_what_is_not_there_is_refused_and_nothing_is_touched(two: Made, tmp_path: Path) -> None:
    before = content(two.path)
    for target, message in (
        ("brt", "no pass 'brt'; did you mean 'bert'"),
        ("bert/hidden.2", r"no stored feature of this name: pass bert holds hidden.1@all, "),
        ("second/hidden.1", "hidden.1 is not stored but derived when read"),
    ):
        with pytest.raises(ValueError, match=message):
            drop(two.path, ["second", target], DROP, settle)

    def refuse(name: str, info: PassInfo) -> PassInfo:
        raise ValueError("needed")

    with pytest.raises(ValueError, match="needed"):
        drop(two.path, ["bert/final"], MADE, refuse)
    with StoreWriter.open(two.path), pytest.raises(StoreBusy):
        drop(two.path, ["second"], MADE, settle)
    assert content(two.path) == before
    shutil.copytree(Path(__file__).parent / "schemas" / "1", tmp_path / "old")
    with pytest.raises(StoreError, match=r"only read; .*teacher-dump copy"):
        drop(tmp_path / "old", ["bert"], MADE, settle)


def test_readers_keep_what_they_have_open(made: Made) -> None:
    reader = Store.open(made.path)
    key, rows = FeatureKey.parse("bert/hidden.1@all"), np.arange(len(made.rows))
    before = reader.read(key, rows)[""].copy()
    drop(made.path, ["bert/hidden.1@all"], MADE, settle)
    np.testing.assert_array_equal(reader.read(key, rows)[""], before)
    with pytest.raises(MissingFeature, match=r"has no bert/hidden.1@all"):
        Store.open(made.path).read(key, rows)


def test_files_that_another_store_has_too_free_nothing(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.path, tmp_path / "linked", copy_function=os.link)
    freed = drop(made.path, ["bert/hidden.1"], MADE, settle)
    assert freed.shared > 0
    assert verify(tmp_path / "linked") == []
    assert drop(tmp_path / "linked", ["bert/hidden.1"], MADE, settle).freed >= freed.shared


def test_only_what_a_store_names_is_ever_a_stray(made: Made) -> None:
    mine = [
        made.path / "notes.txt",
        made.path / "mine" / "zarr.json",
        made.path / "bert" / "notes.txt",
        made.path / "rows" / "mine.parquet",
    ]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    left = ["rows/part-00007.parquet", "rows/numbers/c.9.0", "tokens/input_ids/c.9", "tokens/input_ids/.c.1.0.tmp", "static/other/x",
            "bert/hidden.1/all/c.9.0", "bert/hidden.1/all/.c.2.0.0.tmp", "bert/hidden.0/all/c.0.0", "bert/hidden.1/first/c.0.0",
            "model/.bert.0.tmp/config.json", ".old.dropped/hidden.1/all/c.0.0"]  # fmt: skip
    for name in left:
        (made.path / name).parent.mkdir(parents=True, exist_ok=True)
        (made.path / name).write_text("left")
    found = strays(made.path)
    assert all(any((made.path / name).is_relative_to(stray) for stray in found) for name in left)
    drop(made.path, ["bert/final"], MADE, settle)
    assert strays(made.path) == []
    assert not any((made.path / name).exists() for name in left)
    assert all(file.read_text() == "mine" for file in mine)
    assert verify(made.path) == []


@pytest.mark.parametrize("targets", [["second"], ["bert/hidden.1", "bert/final"]])
def test_a_drop_that_is_killed_anywhere_is_finished_by_the_next(targets: list[str], tmp_path: Path) -> None:
    few = (spec("hidden.1@all"), spec("final@first"), spec("final@last"))
    made = make_store(tmp_path / "template", GROUPS[:3], few)
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("second", pass_info(few[:1]), STATICS)
        writer.commit("second", 0, answers(Made(made.path, made.rows), 0, few[:1], writer.rows.columns.slot))
    shutil.copytree(made.path, tmp_path / "whole")
    drop(tmp_path / "whole", targets, MADE, settle)
    wanted, step = content(tmp_path / "whole"), 0
    while True:
        path = tmp_path / f"store{step}"
        shutil.copytree(made.path, path)
        if not killed_at(step, lambda: drop(path, targets, DROP, settle)):  # noqa: B023
            break
        store = Store.open(path)  # whatever is said to be there can be read
        for name, info in store.manifest.passes.items():
            for feature in info.features:
                if store.committed(name):
                    store.read(feature.feature.of(name), np.arange(3))
        drop(path, targets, DROP, settle)
        assert content(path) == wanted
        assert verify(path) == []
        assert strays(path) == []
        step += 3
    assert step > 30
