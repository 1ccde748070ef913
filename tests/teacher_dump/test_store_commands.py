"""The life of a store on the command line: add, merge, drop, copy, diff."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_dump import Outcome, Tree, World, files_of

from store import FeatureKey, Store
from store.strays import strays

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def texts(path: Path, count: int, seed: int) -> Path:
    """A corpus like the world's, of other texts."""
    draw = random.Random(seed)
    words = ["river", "city", "old", "new", "word3", "word7", "stone", "house", "water"]
    lines = [{"text": " ".join(draw.choices(words, k=draw.randint(2, 20))), "label": "positive", "number": 0} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return texts(tmp_path / "more.jsonl", 20, 5)


@pytest.fixture
def recipe(masked_recipe: Tree, write: Write) -> Path:
    return write(masked_recipe)


@pytest.fixture
def store(masked_recipe: Tree, recipe: Path, teacher_dump: Run) -> Path:
    assert teacher_dump("run", recipe).code == 0
    return Path(masked_recipe["store"])


def test_rows_are_added_and_answered(
    store: Path, recipe: Path, masked_recipe: Tree, more: Path, world: World, teacher_dump: Run, tmp_path: Path
) -> None:
    sources = f"rows.sources=[{{files: {more}}}]"
    before, slots = files_of(store / "bert"), Store.open(store).manifest.rows.slots
    refused = teacher_dump("run", recipe, sources)
    assert refused.code == 2
    assert "another corpus" in refused.err
    assert "teacher-dump add RECIPE" in refused.err
    added = teacher_dump("add", recipe, sources, "--rows-only")
    assert added.code == 0, added.err
    assert "added 20 rows" in added.out
    assert "to be answered by bert" in added.out
    again = teacher_dump("add", recipe, sources, "--rows-only")
    assert (again.code, "already" in again.out) == (0, True)
    for over in ([], [sources]):  # the recipe of either corpus goes on
        assert teacher_dump("run", recipe, *over).code == 0
    now = Store.open(store)
    assert now.complete("bert")
    assert now.manifest.rows.slots > slots
    after = files_of(store / "bert")
    assert all(after[name] == entry for name, entry in before.items() if name.endswith(".0"))
    alone = tmp_path / "alone"
    assert teacher_dump("run", recipe, sources, f"store={alone}").code == 0
    merged, first = tmp_path / "merged", tmp_path / "first"
    assert teacher_dump("run", recipe, f"store={first}").code == 0
    done = teacher_dump("merge", merged, first, alone)
    assert done.code == 0, done.err
    assert "files linked: they take no disk" in done.out
    same = teacher_dump("diff", store, merged)  # added and answered here, or dumped apart and merged
    assert (same.code, "hold the same" in same.out) == (0, True), same.out
    assert teacher_dump("verify", merged).code == 0
    assert teacher_dump("run", recipe, f"store={merged}").code == 0
    tag = teacher_dump("add", recipe, sources, "rows.max_length=16")
    assert (tag.code, "another rows.max_length" in tag.err) == (2, True)
    none = teacher_dump("add", recipe, f"store={tmp_path / 'none'}")
    assert (none.code, "expected a store" in none.err) == (2, True)


def test_a_pass_of_one_store_is_pending_after_a_merge(recipe: Path, store: Path, more: Path, teacher_dump: Run, tmp_path: Path) -> None:
    sources, rows = f"rows.sources=[{{files: {more}}}]", tmp_path / "rows"
    assert teacher_dump("rows", recipe, sources, f"store={rows}").code == 0
    done = teacher_dump("merge", tmp_path / "merged", store, rows)
    assert done.code == 0, done.err
    assert "are left: `teacher-dump run` with its recipe" in done.out
    assert teacher_dump("run", recipe, f"store={tmp_path / 'merged'}").code == 0
    assert Store.open(tmp_path / "merged").complete("bert")
    overlap = teacher_dump("merge", tmp_path / "twice", store, tmp_path / "merged")
    assert (overlap.code, "rows of the same texts" in overlap.err) == (2, True)


def test_what_others_are_derived_from_is_dropped_only_by_force(store: Path, recipe: Path, teacher_dump: Run) -> None:
    before = files_of(store)
    info = Store.open(store).manifest.passes["bert"]
    source = next(spec.key for spec in info.features if spec.key.startswith("input.1"))
    refused = teacher_dump("drop", store, f"bert/{source}")
    assert refused.code == 2
    assert "bert/attention_probs.1@all follows from what is to be dropped of pass bert" in refused.err
    assert "--force" in refused.err
    assert files_of(store).keys() == before.keys()
    dropped = teacher_dump("drop", store, f"bert/{source}", "bert/lm_logits*", "--force")
    assert dropped.code == 0, dropped.err
    assert "lost with it: bert/attention_probs.1@all" in dropped.out
    assert "of disk freed" in dropped.out
    info = Store.open(store).manifest.passes["bert"]
    assert info.requested == ("hidden.1@all", "hidden.2@first")
    assert info.statics == ()
    status = teacher_dump("status", store).out
    assert "attention_probs" not in status
    assert teacher_dump("verify", store).code == 0
    assert strays(store) == []
    unknown = teacher_dump("drop", store, "bret")
    assert (unknown.code, "did you mean 'bert'" in unknown.err) == (2, True)
    assert teacher_dump("drop", store, "bert").code == 0
    assert teacher_dump("run", recipe).code == 0
    assert Store.open(store).complete("bert")


def test_a_dump_with_fewer_features_goes_on_where_some_were_dropped(
    store: Path, masked_recipe: Tree, write: Write, teacher_dump: Run
) -> None:
    assert teacher_dump("drop", store, "bert/lm_logits@masked:top8", "bert/lm_logits@labels:select").code == 0
    tree = {**masked_recipe, "features": ["hidden.1@all", "hidden.-1@first", "attention_probs.1"]}
    again = teacher_dump("run", write(tree))
    assert again.code == 0, again.err
    assert "nothing was left to do" in again.out


def test_a_copy_in_16_bits_is_what_a_dump_in_16_bits_would_be(store: Path, recipe: Path, teacher_dump: Run, tmp_path: Path) -> None:
    new = tmp_path / "new"
    copied = teacher_dump("copy", store, new, "--dtype", "bfloat16", "--compression", "zstd")
    assert copied.code == 0, copied.err
    assert "hidden.1@all in bfloat16, zstd" in copied.out
    differ = teacher_dump("diff", store, new)
    assert (differ.code, "differ" in differ.out) == (1, True)
    assert "attention_probs" not in teacher_dump("status", new).out.partition("relative error")[2]
    dumped = tmp_path / "dumped"
    assert teacher_dump("run", recipe, f"store={dumped}", "dtype=bfloat16").code == 0
    same = teacher_dump("diff", new, dumped).out
    lines = [line for line in same.splitlines() if "  bert/" in line]
    assert lines
    assert all("equal" in line for line in lines)  # they do not store quite the same: words are cheaper in 16 bits
    assert teacher_dump("copy", store, new, "--dtype", "bfloat16", "--compression", "zstd").out.endswith("nothing was left to do\n")
    assert teacher_dump("verify", new).code == 0


def test_a_copy_of_some_rows_and_positions(store: Path, teacher_dump: Run, tmp_path: Path) -> None:
    new = tmp_path / "new"
    copied = teacher_dump(
        "copy", store, new, "--split", "train", "--features", "hidden.1@all", "--features", "input.1", "--positions", "first"
    )
    assert copied.code == 0, copied.err
    assert "no more derived from what is kept: bert/" in copied.out
    one, other = Store.open(store), Store.open(new)
    train = one.rows.select("train")
    assert len(other.rows) == len(train)
    values = one.read(FeatureKey.parse("bert/hidden.1@all"), train)[""]
    starts = np.cumsum(one.rows.at(train).length) - one.rows.at(train).length
    found = other.read(FeatureKey.parse("bert/hidden.1@first"), np.arange(len(train)))[""]
    np.testing.assert_array_equal(found, values[starts])
    assert [origin.taken for origin in other.manifest.rows.origins] == ["split train"]
    for arguments, message in (
        (("--rows", "3"), "expected FIRST:AFTER"),
        (("--rows", "5:1000"), "has rows 0 to"),
        (("--split", "tset"), "no split 'tset'"),
        (("--features", "hidden.7@all"), "no stored feature hidden.7@all"),
        (("--dtype", "int8", "--keep-bits", "3"), "keep_bits"),
        (("--dtype", "int9"), "int9"),
    ):
        refused = teacher_dump("copy", store, tmp_path / "other", *arguments)
        assert refused.code == 2
        assert message in refused.err
        assert "Traceback" not in refused.err
        assert not (tmp_path / "other").exists()


def test_two_teachers_are_compared_by_name(store: Path, recipe: Path, world: World, teacher_dump: Run) -> None:
    assert teacher_dump("run", recipe, "pass_name=again").code == 0
    assert teacher_dump("run", recipe, "pass_name=other", f"teacher.model={world.other}").code == 0
    same = teacher_dump("diff", store, store, "--pass", "bert=again")
    assert same.code == 0, same.out
    assert "bert and again/hidden.1@all" in same.out
    other = teacher_dump("diff", store, store, "--pass", "bert=other")
    assert other.code == 1
    assert "rows: 90 are the same" in other.out
    missing = teacher_dump("diff", store, store, "--pass", "bert=ohter")
    assert (missing.code, "did you mean 'other'" in missing.err) == (2, True)
