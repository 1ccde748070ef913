"""Two stores compared: equal whatever their layout, and different in exactly what was changed."""

from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, MADE, Made, answers, make_rows, make_store, pass_info, spec

from store import FeatureKey, Store, StoreWriter, decode, encode
from store.copies import Wanted, copy
from store.diff import diff
from store.recode import Keeping

NUMBERS = (spec("hidden.1@all"), spec("lm_logits@masked:top3", "float16", 50), spec("final@first"))


@pytest.fixture
def one(tmp_path: Path) -> Made:
    return make_store(tmp_path / "one", GROUPS, NUMBERS)


def kept(made: Made, new: Path, keeping: Keeping) -> Path:
    copy(made.path, new, Wanted(features=("hidden.1",), keeping=keeping), MADE, lambda name, info: info, lambda done, of: None)
    return new


def test_the_same_dump_in_other_slots_is_the_same(one: Made, tmp_path: Path) -> None:
    other = make_rows(tmp_path / "other", GROUPS, slot_tokens=512)
    with StoreWriter.open(other.path) as writer:
        writer.add_pass("bert", pass_info(NUMBERS), {})
        for shard in writer.pending("bert"):
            rows = writer.rows.rows_of(shard)
            keys = [feature.feature for feature in NUMBERS]
            read = Store.open(one.path).read_all([key.of("bert") for key in keys], rows)
            writer.commit("bert", shard, {key: read[key.of("bert")] for key in keys})
    found = diff((one.path, other.path))
    assert found.equal
    assert found.compared == len(one.rows)
    assert found.features["bert/hidden.1@all"].shards == 4
    assert found.features["bert/hidden.1@all"].arrays[""].values == sum(len(row.input_ids) for row in one.rows) * 8
    assert diff((other.path, one.path)).equal


def test_errors_are_those_of_the_rounding(one: Made, tmp_path: Path) -> None:
    other = kept(one, tmp_path / "other", Keeping("bfloat16", compression="zstd"))
    found = diff((one.path, other))
    assert not found.equal
    assert found.only == (["bert/lm_logits@masked:top3", "bert/final@first"], [])
    apart = found.features["bert/hidden.1@all"].arrays[""]
    true = np.concatenate(one.values["hidden.1@all", ""]).astype(np.float64)
    rounded = decode(spec("hidden.1@all", "bfloat16"), encode(spec("hidden.1@all", "bfloat16"), true.astype(np.float32)))[""]
    difference = np.abs(rounded - true)
    assert apart.differing == int((difference > 0).sum())
    assert apart.largest == pytest.approx(difference.max(), rel=1e-12)
    assert apart.relative == pytest.approx((difference / np.abs(true)).max(), rel=1e-12)
    assert 0 < apart.relative <= 2**-8
    assert apart.rms == pytest.approx(np.sqrt((difference**2).sum() / (true**2).sum()), rel=1e-12)


def test_another_token_label_or_split_is_another_row(one: Made, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", GROUPS, NUMBERS, seed=1)
    found = diff((one.path, other.path))
    assert not found.equal
    assert found.differing == list(range(len(one.rows)))
    assert not found.features["bert/hidden.1@all"].arrays
    splits = make_rows(tmp_path / "splits", GROUPS, splits=("train", "test"))
    assert diff((one.path, splits.path)).differing == [number for number, row in enumerate(one.rows) if row.split == "dev"]
    regrouped = make_rows(tmp_path / "regrouped", [GROUPS[0], *[[row] for row in GROUPS[1]], *GROUPS[2:]])
    assert 2 in diff((one.path, regrouped.path)).differing


def test_fewer_rows_are_compared_as_far_as_they_go(one: Made, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", GROUPS[:3], NUMBERS)
    found = diff((one.path, other.path))
    assert not found.equal
    assert (found.rows, found.compared, found.differing) == ((9, 4), 4, [])
    assert found.features["bert/final@first"].equal


def test_shards_that_only_one_has_are_counted(one: Made, tmp_path: Path) -> None:
    other = make_rows(tmp_path / "other", GROUPS)
    with StoreWriter.open(other.path) as writer:
        writer.add_pass("bert", pass_info(NUMBERS), {})
        for shard in (0, 2):
            writer.commit("bert", shard, answers(Made(other.path, other.rows), shard, NUMBERS, writer.rows.columns.slot))
    found = diff((one.path, other.path))
    in_both = sum(1 for row in Store.open(one.path).rows.columns.slot if row in (0, 2))
    assert found.shards == {"bert": (9 - in_both, 0)}
    assert diff((other.path, one.path)).shards == {"bert": (0, 9 - in_both)}
    assert found.features["bert/hidden.1@all"].equal
    assert not found.equal


def test_passes_of_other_names_are_compared_where_asked(one: Made) -> None:
    with StoreWriter.open(one.path) as writer:
        writer.add_pass("again", pass_info(NUMBERS), {})
        rng = np.random.default_rng(0)
        for shard in writer.pending("again"):
            arrays = answers(Made(one.path, one.rows), shard, NUMBERS, writer.rows.columns.slot)
            if shard == 3:
                hidden = arrays[FeatureKey.parse("hidden.1@all")][""]
                hidden[rng.integers(len(hidden)), 5] += 0.5
            writer.commit("again", shard, arrays)
    found = diff((one.path, one.path), {"bert": "again"})
    apart = found.features["bert and again/hidden.1@all"].arrays[""]
    assert apart.differing == 1
    assert apart.largest == pytest.approx(0.5, abs=1e-6)
    assert found.features["bert and again/lm_logits@masked:top3"].equal
    assert diff((one.path, one.path), {"again": "again"}).equal
    with pytest.raises(ValueError, match="no pass 'agian'; did you mean 'again'"):
        diff((one.path, one.path), {"bert": "agian"})
