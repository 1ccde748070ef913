"""Stores of random words and of ids in few bits: written, read, checked, copied, packed anew from older layouts, compared and described."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_store import GROUPS, MADE, SHAPE, make_rows, pass_info

from store import FeatureKey, FeatureSpec, Store, StoreWriter, decode, encode, feature_spec
from store.copies import Wanted, copy
from store.diff import diff
from store.features import ArraySpec
from store.filters import Sureness, sureness
from store.recode import Keeping
from store.seeds import token_seeds
from store.verify import verify

WORDS = 70_000
FORMS = ("top5", "top9p9min2", "draw7", "draw7tau80x2", "top2draw3", "top2draw3x2")


def spec(form: str, words: int = WORDS) -> FeatureSpec:
    compression = "zstd" if form.startswith("draw") else "none"
    return feature_spec(FeatureKey.parse(f"lm_logits@labels:{form}"), "float16", words, compression=compression)


def older(of: FeatureSpec) -> FeatureSpec:
    """As schema 5 kept it: ids of many words as int32."""
    ids = ArraySpec(name="ids", dtype="int32", width=of.arrays[0].numbers)
    return of.model_copy(update={"arrays": (ids, *of.arrays[1:])})


def store_of(path: Path, specs: Sequence[FeatureSpec]) -> dict[str, dict[str, NDArray[np.generic]]]:
    """A store of real predictions over random rows; what each feature was to be."""
    made = make_rows(path, GROUPS)
    expected: dict[str, list[dict[str, NDArray[np.generic]]]] = {each.key: [] for each in specs}
    info = pass_info(tuple(specs)).model_copy(update={"shape": SHAPE.model_copy(update={"vocab": WORDS})})
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", info, {})
        for shard in writer.pending("bert"):
            rows = np.flatnonzero(writer.rows.columns.slot == shard)
            units = sum(made.rows[row].labelled for row in rows)
            logits = np.random.default_rng(shard).normal(0, 3, (units, WORDS)).astype(np.float32)
            arrays = {}
            for each in specs:
                packed = encode(spec(each.feature.form), logits, seeds=token_seeds(np.arange(units) + shard))
                expected[each.key].append(decode(spec(each.feature.form), packed))
                held = packed if each.arrays[0].bits else {**packed, "ids": decode(spec(each.feature.form), packed)["ids"].astype(np.int32)}
                arrays[each.feature] = held
            writer.commit("bert", shard, arrays)
    return {key: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for key, parts in expected.items()}


def read(path: Path, key: str) -> dict[str, NDArray[np.generic]]:
    store = Store.open(path)
    named = FeatureKey.parse(f"bert/{key}")
    return decode(store.spec(named), store.read(named, np.arange(len(store.rows))))


def copied(folder: Path, wanted: Wanted) -> None:
    copy(folder / "store", folder / "copy", wanted, MADE, lambda name, info: info, lambda done, total: None)


def same(found: dict[str, NDArray[np.generic]], expected: dict[str, NDArray[np.generic]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, name)


def test_words_come_back_from_a_store_and_a_changed_byte_of_packed_ids_is_found(tmp_path: Path) -> None:
    expected = store_of(tmp_path / "store", [spec(form) for form in FORMS])
    for key, values in expected.items():
        same(read(tmp_path / "store", key), values)
    assert verify(tmp_path / "store") == []
    file = tmp_path / "store" / "bert" / "lm_logits" / "labels.top2draw3" / "ids" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    (problem,) = verify(tmp_path / "store")
    assert problem.file == file
    assert problem.repairs


def test_a_copy_compresses_and_keeps_what_was_drawn(tmp_path: Path) -> None:
    expected = store_of(tmp_path / "store", [spec(form) for form in FORMS])
    copied(tmp_path, Wanted(keeping=Keeping(compression="zstd")))
    for key, values in expected.items():
        same(read(tmp_path / "copy", key), values)
        assert Store.open(tmp_path / "copy").spec(FeatureKey.parse(f"bert/{key}")).compressed
    assert verify(tmp_path / "copy") == []
    found = diff((tmp_path / "store", tmp_path / "copy"))
    assert len(found.features) == len(FORMS)
    assert all(apart.differing == 0 < apart.values for compared in found.features.values() for apart in compared.arrays.values())


def test_a_copy_packs_ids_that_lie_as_in_schema_5_and_loses_nothing(tmp_path: Path) -> None:
    old = older(spec("top5"))
    expected = store_of(tmp_path / "store", [old])
    same(read(tmp_path / "store", old.key), expected[old.key])
    copied(tmp_path, Wanted())
    same(read(tmp_path / "copy", old.key), expected[old.key])
    assert Store.open(tmp_path / "copy").manifest.passes["bert"].features == (spec("top5"),)
    assert spec("top5").unit_bytes == old.unit_bytes - 20 + 11
    assert verify(tmp_path / "copy") == []


def test_how_sure_a_teacher_was_follows_from_likeliest_words_and_not_from_random_ones() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    for form in ("top9p9min2", "top2draw3"):
        kept = feature_spec(FeatureKey.parse(f"lm_logits@labels:{form}"), "float32", 300)
        arrays = encode(kept, logits, seeds=token_seeds(np.arange(4)))
        np.testing.assert_allclose(sureness("confidence", kept, arrays), p.max(1), rtol=1e-6)
        bound = -(p * np.log(p)).sum(1)
        found = sureness("entropy", kept, arrays)
        assert (found <= bound + 1e-6).all()
        assert (found > 0.05 * bound).all()


def test_random_words_are_refused_as_a_measure_of_sureness(tmp_path: Path) -> None:
    from store.filters import Where, conditions

    store_of(tmp_path / "store", [spec("draw7")])
    where = Where(confidence=Sureness(min=0.5))
    with pytest.raises(ValueError, match="holds random words, not how sure the teacher was"):
        conditions(where, Store.open(tmp_path / "store"), "bert")
