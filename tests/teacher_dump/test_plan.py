"""What `plan` says beforehand is what `run` then does."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_dump import Outcome, Tree, World, files_of

from store import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def planned_bytes(outcome: Outcome) -> int:
    found = re.search(r"([\d,]+) bytes, the length of every file", outcome.out)
    assert found, outcome.err + outcome.out
    return int(found[1].replace(",", ""))


def length_of(store: Path) -> int:
    return sum(len(content) for _, _, content in files_of(store).values())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("dtype=float16", "ship_layers=[1]"),
        ("ship_layers=all", "rows.copies=3", "rows.slot_tokens=512"),
        ("compression=zstd", "rows.copies=3", "rows.slot_tokens=512"),
        ("compression=zstd", "keep_bits=3", "rows.copies=5", "dtype=bfloat16", "features.3={key: hidden.-1@first, dtype: int8}"),
        ("features.2={key: hidden.1@all, dtype: float8, compression: zstd}", "features.4={key: attention_probs.1, dtype: int8}"),
    ],
)
def test_planned_bytes_are_those_that_are_written(
    options: tuple[str, ...], masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe = write(masked_recipe)
    before = files_of(tmp_path)
    plan = teacher_dump("plan", recipe, *options)
    assert plan.code == 0, plan.err
    assert files_of(tmp_path) == before, "a plan leaves nothing behind"
    assert teacher_dump("run", recipe, *options).code == 0
    store = Path(masked_recipe["store"])
    assert planned_bytes(plan) == pytest.approx(length_of(store), rel=0.02)
    opened = Store.open(store)
    written = sum(seal.size for commit in opened.committed("bert").values() for seal in commit.files.values())
    a_token = next(float(line.split()[1]) for line in plan.out.splitlines() if line.split()[:1] == ["all"])
    assert a_token == pytest.approx(written / opened.manifest.rows.tokens, rel=0.02)


def test_a_plan_names_what_is_stored_what_is_derived_and_what_it_costs(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    out = teacher_dump("plan", write(masked_recipe), "dtype=bfloat16").out
    lines = [line.split() for line in out.splitlines()]
    assert ["hidden.1@all", "bfloat16", "32", "B", "a", "token"] in [line[:6] for line in lines]
    derived = next(line for line in lines if line[:1] == ["attention_probs.1@all"])
    here, exact, half, brain, _, _ = map(float, derived[-6:])
    assert exact <= half < brain == here < 0.1, "errors of derived features in this recipe, float32, float16 and bfloat16"
    assert "3.9e-03 relative" in out
    for word in ("bytes/token", "free disk", "tokens/s", "rank hours", "of padding", "memory: up to", "enough"):
        assert word in out


def test_a_plan_sets_other_shardings_beside_the_measured_one(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    out = teacher_dump("plan", write(masked_recipe), "--ranks", "4").out
    rows = {(" ".join(line.split()[:3]), line.split()[-1]): line.split() for line in out.splitlines() if " × " in line}
    assert rows.keys() == {("none × 1", "measured")} | {
        (sharding, "calculated") for sharding in ("none × 1", "zero3 × 2", "zero3 × 4", "fsdp × 2", "fsdp × 4", "tp × 2")
    }, "two heads are not dealt out to four ranks, and a CPU has nowhere to offload to"
    held = {name: float(row[3]) for (name, how), row in rows.items() if how == "calculated"}
    assert held["none × 1"] == pytest.approx(2 * held["zero3 × 2"], rel=0.1)
    assert held["fsdp × 2"] == pytest.approx(2 * held["fsdp × 4"], rel=0.1)


@pytest.mark.slow
def test_a_sharded_teacher_is_measured_on_its_ranks(masked_recipe: Tree, write: Write, run_program: Callable[..., str]) -> None:
    recipe = write({**masked_recipe, "sharding": {"kind": "fsdp", "size": 2}})
    out = run_program(recipe.parent, "teacher_dump", "plan", str(recipe), "--nproc", "2")
    assert out.count("plan of pass bert") == 1, "the first rank speaks"
    assert " on 2 ranks, " in out
    assert next(line for line in out.splitlines() if line.startswith("  fsdp × 2")).endswith("measured")
    assert not Path(masked_recipe["store"]).exists()


def test_a_plan_counts_compressed_shards_that_are_there_as_they_are(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write({**masked_recipe, "compression": "zstd"})
    assert teacher_dump("run", recipe).code == 0
    plan = teacher_dump("plan", recipe)
    assert "0 B are left to write" in plan.out
    assert planned_bytes(plan) == pytest.approx(length_of(Path(masked_recipe["store"])), rel=0.002)


def test_a_plan_for_a_dump_that_has_begun_counts_what_is_left(world: World, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("run", recipe).code == 0
    store = Path(masked_recipe["store"])
    before = files_of(store)
    assert "0 B are left to write" in teacher_dump("plan", recipe).out
    second = write({**masked_recipe, "pass_name": "second", "teacher": {"model": str(world.other), "head": "masked_lm"}})
    plan = teacher_dump("plan", second)
    assert "in the store already" in plan.out
    assert files_of(store) == before
