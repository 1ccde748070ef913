"""`teacher-dump add`: more rows, another teacher, more features; what was there stays, and is read meanwhile."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_dump import Outcome, Tree, World, files_of

from store import Store
from store.verify import verify

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

READER = """
import hashlib, sys, time
from pathlib import Path
import numpy as np
from store import FeatureKey, Store

path, ended = Path(sys.argv[1]), Path(sys.argv[2])
store = Store.open(path)
key, rows = FeatureKey.parse("bert/hidden.1@all"), np.arange(len(store.rows))
first, reads = None, 0
while not ended.exists() or not reads:
    found = hashlib.sha256(store.read(key, rows)[""].tobytes() + store.tokens("input_ids", rows).tobytes()).hexdigest()
    again = Store.open(path)
    assert first in (None, found) and len(store.rows) == len(rows) <= len(again.rows)
    np.testing.assert_array_equal(again.tokens("input_ids", rows), store.tokens("input_ids", rows))
    first, reads = found, reads + 1
    if reads == 1:
        print("reading", flush=True)
    time.sleep(0.05)
print(reads)
"""


@pytest.fixture
def more(tmp_path: Path) -> str:
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": f"river city word{number} old stone"}) + "\n" for number in range(30)))
    return f"rows.sources=[{{files: {path}}}]"


@pytest.fixture
def store(masked_recipe: Tree, write: Write, teacher_dump: Run) -> Path:
    masked_recipe["features"] = ["hidden.1@all", "lm_logits@masked:top8"]
    outcome = teacher_dump("run", write(masked_recipe))
    assert outcome.code == 0, outcome.err
    return Path(masked_recipe["store"])


def slots_of(store: Path, name: str) -> dict[str, tuple[int, int, bytes]]:
    return {path: entry for path, entry in files_of(store / name).items() if path.endswith(".0")}


def test_rows_a_teacher_and_features_are_added_under_a_reader(
    store: Path, masked_recipe: Tree, world: World, more: str, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    before, ended = slots_of(store, "bert"), tmp_path / "ended"
    slots = Store.open(store).manifest.rows.slots
    reader = subprocess.Popen([sys.executable, "-c", READER, str(store), str(ended)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "reading\n"
    try:
        rows = teacher_dump("add", write(masked_recipe), more)
        assert rows.code == 0, rows.err
        assert "added 30 rows" in rows.out
        assert "pass bert is complete" in rows.out
        other = teacher_dump("add", write(masked_recipe), more, "pass_name=other", f"teacher.model={world.other}")
        assert other.code == 0, other.err
        features = "features=[hidden.1@all, hidden.2@first, lm_logits@masked:top8]"
        wider = teacher_dump("add", write(masked_recipe), more, features)
        assert wider.code == 0, wider.err
        assert "pass bert-2 is for what is not in bert: hidden.2@first" in wider.out
    finally:
        ended.touch()
        out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert int(out) >= 2
    now = Store.open(store)
    assert [spec.key for spec in now.manifest.passes["bert-2"].features] == ["hidden.2@first"]
    assert all(now.complete(name) for name in ("bert", "other", "bert-2"))
    assert now.manifest.rows.slots > slots
    assert {path: entry for path, entry in slots_of(store, "bert").items() if path in before} == before
    assert verify(store) == []
    alone = tmp_path / "alone"
    assert teacher_dump("run", write(masked_recipe), more, "features=[hidden.2@first]", f"store={alone}").code == 0
    both, rows_ = Store.open(alone), np.arange(30)
    key = both.manifest.passes["bert"].features[0].feature
    added = np.arange(len(now.rows) - 30, len(now.rows))
    np.testing.assert_allclose(now.read(key.of("bert-2"), added)[""], both.read(key.of("bert"), rows_)[""], rtol=0, atol=1e-5)


def test_only_what_neither_is_there_nor_follows_is_new(store: Path, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    def added(*features: str, **options: object) -> Outcome:
        return teacher_dump("add", write({**masked_recipe, "features": list(features), **options}))

    manifest = (store / "manifest.json").read_bytes()
    nothing = added("hidden.1@all", "hidden.1@mean", "lm_logits@masked:top8")
    assert (nothing.code, "has all features of this recipe" in nothing.out) == (0, True), nothing.out + nothing.err
    coarser = added("hidden.1@first", dtype="bfloat16")
    assert "has all features of this recipe" in coarser.out
    assert (store / "manifest.json").read_bytes() == manifest
    second = added("hidden.1@all", "hidden.2@all", dtype="bfloat16")
    assert second.code == 0, second.err
    assert "bert-2 is for what is not in bert: hidden.2@all" in second.out
    finer = added("hidden.2@all")
    assert finer.code == 0, finer.err
    assert "bert-3 is for what is not in bert, bert-2: hidden.2@all" in finer.out
    assert Store.open(store).manifest.passes["bert-3"].features[0].exact
    assert "has all features" in added("hidden.1@mean", "hidden.2@mean", "hidden.1@all").out


def test_a_further_pass_goes_on_where_it_was_stopped(store: Path, masked_recipe: Tree, more: str, write: Write, teacher_dump: Run) -> None:
    wider = write({**masked_recipe, "features": [*masked_recipe["features"], "hidden.2@first"]})
    assert teacher_dump("add", wider).code == 0
    rows = teacher_dump("add", wider, more, "--rows-only")
    assert "to be answered by bert, bert-2" in rows.out
    both = teacher_dump("add", wider, more)
    assert both.code == 0, both.err
    assert [name for name in ("bert", "bert-2") if f"pass {name} is complete" in both.out] == ["bert", "bert-2"]
    assert Store.open(store).complete("bert")
    assert set(Store.open(store).manifest.passes) == {"bert", "bert-2"}


def test_features_of_another_teacher_do_not_join_a_pass(
    store: Path, masked_recipe: Tree, world: World, write: Write, teacher_dump: Run
) -> None:
    other = {**masked_recipe, "teacher": {"model": str(world.other), "head": "masked_lm"}, "features": ["hidden.2@first"]}
    refused = teacher_dump("add", write(other))
    assert refused.code == 2
    assert "pass bert-2 is not of the teacher of pass bert: its teacher is" in refused.err
    assert set(Store.open(store).manifest.passes) == {"bert"}
    missing = teacher_dump("add", write({**masked_recipe, "store": str(store.parent / "none")}))
    assert (missing.code, "expected a store" in missing.err) == (2, True)
