"""A copy holds what was asked for, bit for bit where nothing is rounded, and says what it is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import GROUPS, MADE, Made, answers, make_rows, make_store, pass_info, spec
from step_kills import content, killed_at

from store import FeatureKey, FeatureSpec, PassInfo, Row, RowWriter, Store, StoreBusy, StoreError, StoreWriter, Task, decode
from store.copies import Copied, Wanted, copy
from store.diff import diff
from store.manifest import SCHEMA
from store.recode import Keeping
from store.schemas import LINKABLE
from store.verify import verify

NUMBERS = (
    spec("hidden.1@all"),
    spec("hidden.1@last"),
    spec("lm_logits@masked:top3", "float16", 50),
    spec("lm_logits@labels:select", "float32", 50, (1, 7)),
)
COPY = MADE.model_copy(update={"command": ("teacher-dump", "copy", "a", "b")})


def settle(name: str, info: PassInfo) -> PassInfo:
    return info.model_copy(update={"requested": tuple(spec.key for spec in info.features), "statics": ()})


def made_copy(path: Path, new: Path, wanted: Wanted | None = None) -> Copied:
    return copy(path, new, wanted or Wanted(), COPY, settle, lambda done, of: None)


@pytest.fixture
def numbers(tmp_path: Path) -> Made:
    return make_store(tmp_path / "numbers", GROUPS, NUMBERS)


def check_rows(store: Store, source: Made, rows: list[int]) -> None:
    """Row i of the store is row ``rows[i]`` of the source, with all that is stored of it unrounded."""
    assert len(store.rows) == len(rows)
    for number, row in enumerate(rows):
        one, wanted = np.array([number]), source.rows[row]
        for array in ("input_ids", "segments", "token_labels"):
            np.testing.assert_array_equal(store.tokens(array, one), getattr(wanted, array))
        about = store.rows.about(number)
        assert (about["record"], about["part"], about["split"]) == (wanted.record, wanted.part, wanted.split)
        assert [(span["start"], span["end"]) for span in about["spans"]] == wanted.spans
        np.testing.assert_equal(store.rows.label_at(one)[0], np.nan if wanted.label is None else wanted.label)
        for feature in store.manifest.passes["bert"].features:
            for array, values in store.read(feature.feature.of("bert"), one).items():
                assert values.tobytes() == source.values[feature.key, array][row].tobytes()


def test_a_whole_copy_is_links_and_says_that_it_is_one(numbers: Made, tmp_path: Path) -> None:
    did = made_copy(numbers.path, tmp_path / "new")
    store = Store.open(tmp_path / "new")
    assert (did.written, did.links.copied, did.pending) == (0, 0, 0)
    check_rows(store, numbers, list(range(len(numbers.rows))))
    assert verify(store.path) == []
    assert diff((numbers.path, store.path)).equal
    source = Store.open(numbers.path).manifest
    assert store.manifest.passes == source.passes
    assert store.manifest.rows == source.rows
    assert (store.manifest.made, store.manifest.history) == (COPY, (MADE,))
    assert (store.path / "bert/hidden.1/all/c.1.0").samefile(numbers.path / "bert/hidden.1/all/c.1.0")
    for path in sorted(numbers.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert verify(store.path) == []


def test_rows_of_a_split_move_together(numbers: Made, tmp_path: Path) -> None:
    made_copy(numbers.path, tmp_path / "new", Wanted(split="dev"))
    store = Store.open(tmp_path / "new")
    check_rows(store, numbers, [number for number, row in enumerate(numbers.rows) if row.split == "dev"])
    assert store.rows.splits == ("dev",)
    (origin,) = store.manifest.rows.origins
    assert (origin.corpus, origin.taken) == ("c", "split dev")
    assert verify(store.path) == []


def test_rows_between_two_numbers(numbers: Made, tmp_path: Path) -> None:
    made_copy(numbers.path, tmp_path / "new", Wanted(rows=(3, 8)))
    check_rows(Store.open(tmp_path / "new"), numbers, [3, 4, 5, 6, 7])
    assert Store.open(tmp_path / "new").manifest.rows.origins[0].taken == "rows 3 to 7"
    made_copy(tmp_path / "new", tmp_path / "newer", Wanted(rows=(2, None), split="train"))
    wanted = [number for number in (5, 6, 7) if numbers.rows[number].split == "train"]
    check_rows(Store.open(tmp_path / "newer"), numbers, wanted)
    assert Store.open(tmp_path / "newer").manifest.rows.origins[0].taken == "split train, rows 2 to 4 of rows 3 to 7"
    assert verify(tmp_path / "newer") == []


def test_groups_are_not_cut(numbers: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows 1 to 2 of .* are read together; take all of them or none"):
        made_copy(numbers.path, tmp_path / "new", Wanted(rows=(2, 8)))
    assert not (tmp_path / "new").exists()


def test_origins_are_kept_apart(numbers: Made, tmp_path: Path) -> None:
    added = make_rows(numbers.path, GROUPS, seed=1, corpus="d", adding=True)
    together = Made(numbers.path, numbers.rows + added.rows)
    with StoreWriter.open(numbers.path) as writer:
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(together, shard, NUMBERS, writer.rows.columns.slot, 7))
    made_copy(numbers.path, tmp_path / "new", Wanted(split="dev", features=("hidden.1@last",)))
    store = Store.open(tmp_path / "new")
    assert [(origin.corpus, origin.slots) for origin in store.manifest.rows.origins] == [("c", 1), ("d", 1)]
    per_origin = [number for number, row in enumerate(numbers.rows) if row.split == "dev"]
    assert len(store.rows) == 2 * len(per_origin)
    assert verify(store.path) == []


@pytest.mark.parametrize(
    "keeping",
    [
        Keeping("bfloat16"),
        Keeping("float16", compression="zstd"),
        Keeping(keep_bits=6, compression="zstd"),
        Keeping("int8"),
        Keeping("float8", compression="zstd"),
    ],
    ids=str,
)
def test_numbers_are_rounded_within_the_declared_bound(keeping: Keeping, numbers: Made, tmp_path: Path) -> None:
    did = made_copy(numbers.path, tmp_path / "new", Wanted(keeping=keeping))
    assert did.written > 0
    store = Store.open(tmp_path / "new")
    assert verify(store.path) == []
    key, rows = FeatureKey.parse("bert/hidden.1@all"), np.arange(len(numbers.rows))
    kept = store.spec(key)
    true_UW = np.concatenate(numbers.values["hidden.1@all", ""]).astype(np.float64)
    found_UW = decode(kept, store.read(key, rows))[""].astype(np.float64)
    largest_U1 = np.abs(true_UW).max(1, keepdims=True)
    assert not kept.exact
    assert (np.abs(found_UW - true_UW) <= kept.error * np.abs(true_UW) + kept.error_of_largest * largest_U1).all()
    assert np.abs(found_UW - true_UW).max() > 0
    ids = store.read(FeatureKey.parse("bert/lm_logits@masked:top3"), rows)["ids"]
    np.testing.assert_array_equal(ids, np.concatenate(numbers.values["lm_logits@masked:top3", "ids"]))


def test_a_copy_is_what_a_dump_in_that_type_would_be(numbers: Made, tmp_path: Path) -> None:
    made_copy(numbers.path, tmp_path / "new", Wanted(features=("hidden.1@all",), keeping=Keeping("bfloat16", compression="zstd")))
    (kept,) = Store.open(tmp_path / "new").manifest.passes["bert"].features
    assert kept == spec("hidden.1@all", "bfloat16", compression="zstd")
    made_copy(tmp_path / "new", tmp_path / "raw", Wanted(keeping=Keeping(compression="none")))
    assert diff((tmp_path / "new", tmp_path / "raw")).equal
    assert Store.open(tmp_path / "raw").manifest.passes["bert"].features == (spec("hidden.1@all", "bfloat16"),)
    made_copy(tmp_path / "raw", tmp_path / "twice", Wanted(keeping=Keeping("float16")))
    twice = Store.open(tmp_path / "twice").manifest.passes["bert"].features[0]
    assert twice.error == pytest.approx(2**-8 + 2**-11, rel=1e-2)  # both roundings count
    assert twice.error >= 2**-8 + 2**-11


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "large", GROUPS[:1])
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info((spec("final@first"),)), {})
        writer.commit("bert", 0, {FeatureKey.parse("final@first"): {"": np.full((1, 8), 70_000, np.float32)}})
    with pytest.raises(ValueError, match="final@first: 70000 cannot be kept in float16: it is too large"):
        made_copy(made.path, tmp_path / "new", Wanted(keeping=Keeping("float16")))


def labelled_store(path: Path, objective: str) -> tuple[Store, list[Row]]:
    """Rows whose labels are really there: masked words, or the next token inside each of their documents."""
    rng, rows = np.random.default_rng(4), []
    with RowWriter(path, 128) as writer:
        for number, length in enumerate([30, 1, 60, 50, 17, 100]):
            labels = np.where(rng.random(length) < 0.3, rng.integers(0, 50, length), -100).astype(np.int32)
            documents = np.sort(rng.integers(0, 3, length)).astype(np.uint16)
            documents = np.unique(documents, return_inverse=True)[1].astype(np.uint16)
            causal = objective == "causal"
            labelled = length - int(documents[-1]) - 1 if causal else int((labels >= 0).sum())
            ids = rng.integers(0, 50, length, np.int32)
            packed, of_tokens = (documents, None) if causal else (None, labels)
            rows.append(Row(ids, None, packed, of_tokens, labelled, None, number, 0, "train", "text", number, 0, []))
            writer.append_group(rows[-1:])
        writer.finish(
            copies=1, bucket=16, objective=objective, task=Task(kind="none"), pad_id=0, tokenizer="t", corpus="c", building="b",
            options={}, made=MADE,
        )  # fmt: skip
    kept = (spec("hidden.1@all"), spec("lm_logits@all:top3", "float16", 50))
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", pass_info(kept), {})
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(Made(path, rows), shard, kept, writer.rows.columns.slot))
    return Store.open(path), rows


def places(row: Row, positions: str) -> list[int]:
    """Tokens of a row, straight from what the words mean."""
    tokens = range(len(row.input_ids))
    if positions in ("first", "last"):
        return [0 if positions == "first" else len(row.input_ids) - 1]
    if row.token_labels is not None:
        return [token for token in tokens if row.token_labels[token] >= 0]
    assert row.documents is not None
    return [token for token in tokens[:-1] if row.documents[token + 1] == row.documents[token]]


@pytest.mark.parametrize(
    ("objective", "positions"), [("mlm", "first"), ("mlm", "last"), ("mlm", "masked"), ("mlm", "labels"), ("causal", "labels")]
)
def test_fewer_positions_are_those_tokens_of_all(objective: str, positions: str, tmp_path: Path) -> None:
    source, rows = labelled_store(tmp_path / "source", objective)
    made_copy(source.path, tmp_path / "new", Wanted(keeping=Keeping(positions=positions)))
    store = Store.open(tmp_path / "new")
    assert verify(store.path) == []
    keys = [f"hidden.1@{positions}", f"lm_logits@{positions}:top3"]
    assert [spec.key for spec in store.manifest.passes["bert"].features] == keys
    for number, row in enumerate(rows):
        one = np.array([number])
        for old, key in zip(source.manifest.passes["bert"].features, keys, strict=True):
            for array, values in source.read(old.feature.of("bert"), one).items():
                found = store.read(FeatureKey.parse(f"bert/{key}"), one)[array]
                assert found.tobytes() == values[places(row, positions)].tobytes()


def test_the_mean_is_that_of_a_rows_tokens(tmp_path: Path) -> None:
    source, rows = labelled_store(tmp_path / "source", "mlm")
    with pytest.raises(ValueError, match="lm_logits@all:top3: word predictions have no mean"):
        made_copy(source.path, tmp_path / "new", Wanted(keeping=Keeping(positions="mean")))
    made_copy(source.path, tmp_path / "new", Wanted(features=("hidden.*",), keeping=Keeping(positions="mean")))
    store = Store.open(tmp_path / "new")
    for number in range(len(rows)):
        values = source.read(FeatureKey.parse("bert/hidden.1@all"), np.array([number]))[""]
        found = store.read(FeatureKey.parse("bert/hidden.1@mean"), np.array([number]))[""]
        np.testing.assert_allclose(found, values.astype(np.float64).mean(0, keepdims=True), rtol=1e-6)


def test_what_is_stored_for_the_positions_already_is_not_made_twice(numbers: Made, tmp_path: Path) -> None:
    made_copy(numbers.path, tmp_path / "new", Wanted(features=("hidden.1",), keeping=Keeping(positions="last")))
    store = Store.open(tmp_path / "new")
    assert [spec.key for spec in store.manifest.passes["bert"].features] == ["hidden.1@last"]
    check_rows(store, numbers, list(range(len(numbers.rows))))


@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_an_older_schema_is_written_in_todays(version: int, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "schemas" / str(version), old)
    made_copy(old, tmp_path / "new")
    store, source = Store.open(tmp_path / "new"), Store.open(old)
    assert verify(store.path) == []
    assert diff((old, store.path)).equal
    assert store.manifest.schema_version == SCHEMA
    slot = "bert/final/first/c.1.0"
    assert (old / slot).samefile(store.path / slot)
    if version in LINKABLE:
        assert (old / "rows/numbers/c.1.0").samefile(store.path / "rows/numbers/c.1.0")
    assert store.manifest.passes == source.manifest.passes
    assert store.rows.table.equals(source.rows.table)
    assert (store.path / "bert/hidden.1/all/c.0.0").samefile(old / "bert/hidden.1/all/c.0.0")
    StoreWriter.open(store.path).close()


def test_shards_that_are_not_there_yet_follow(tmp_path: Path) -> None:
    made, few = make_rows(tmp_path / "source", GROUPS), (spec("final@first"),)

    def commit(shards: list[int]) -> None:
        with StoreWriter.open(made.path) as writer:
            writer.add_pass("bert", pass_info(few), {})
            for shard in shards:
                writer.commit("bert", shard, answers(made, shard, few, writer.rows.columns.slot))

    commit([0, 2])
    did = made_copy(made.path, tmp_path / "new")
    assert (did.shards, did.pending) == (2, 2)
    assert set(Store.open(tmp_path / "new").committed("bert")) == {0, 2}
    commit([1, 3])
    did = made_copy(made.path, tmp_path / "new")
    assert (did.shards, did.pending) == (2, 0)
    assert diff((made.path, tmp_path / "new")).equal
    assert made_copy(made.path, tmp_path / "new").shards == 0


def test_what_cannot_be_copied_is_refused_and_nothing_is_made(numbers: Made, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for wanted, message in (
        (Wanted(split="tain"), "no split 'tain'; did you mean 'train'"),
        (Wanted(rows=(5, 99)), r"has rows 0 to 8; expected some of them as FIRST:AFTER, found 5:99"),
        (Wanted(rows=(5, 5)), "found 5:5"),
        (Wanted(rows=(0, 1), split="dev"), "no rows of split dev, rows 0 to 0"),
        (Wanted(passes=("brt",)), "no pass 'brt'; did you mean 'bert'"),
        (Wanted(features=("hidden.2",)), "no stored feature hidden.2; it holds bert/hidden.1@all, "),
        (Wanted(keeping=Keeping("int8", keep_bits=3)), "keep_bits: int8 has no mantissa"),
        (Wanted(keeping=Keeping(keep_bits=60)), "keep_bits: expected 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            made_copy(numbers.path, new, wanted)
        assert not new.exists()
    with pytest.raises(ValueError, match="expected a folder outside"):
        made_copy(numbers.path, numbers.path / "new")
    with pytest.raises(StoreError, match="expected a store"):
        made_copy(tmp_path / "none", new)
    made_copy(numbers.path, new)
    with pytest.raises(StoreError, match="already holds another store"):
        made_copy(numbers.path, new, Wanted(split="dev"))
    with pytest.raises(StoreError, match="already holds another store"):
        made_copy(numbers.path, new, Wanted(keeping=Keeping("float16")))
    with StoreWriter.open(new), pytest.raises(StoreBusy):
        made_copy(numbers.path, new)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(split="train", keeping=Keeping("float16"))], ids=["links", "numbers"])
def test_a_copy_that_is_killed_anywhere_ends_in_the_same_store(wanted: Wanted, tmp_path: Path) -> None:
    few: tuple[FeatureSpec, ...] = (spec("hidden.1@all"), spec("final@first"))
    source = make_store(tmp_path / "source", [*GROUPS[:3], GROUPS[5]], few).path
    made_copy(source, tmp_path / "whole", wanted)
    whole, step, kills = content(tmp_path / "whole"), 0, 0
    while True:
        new = tmp_path / f"new{step}"
        if not killed_at(step, lambda: made_copy(source, new, wanted)):  # noqa: B023
            break
        kills += killed_at(step // 2, lambda: made_copy(source, new, wanted))  # noqa: B023
        made_copy(source, new, wanted)
        assert content(new) == whole
        assert verify(new) == []
        step += 7
    assert kills > 8
    assert verify(source) == []
