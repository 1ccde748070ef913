"""Every recipe that ships parses, and works on the data it is for (the demo's are run by tests/test_docs.py)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from store.strict import Strict, load_yaml
from student_train.chain import Chain
from student_train.recipe import TrainRecipe
from student_train.sweep import Sweep
from teacher_dump.augment import AugmentRecipe
from teacher_dump.generate import GenerateRecipe
from teacher_dump.recipe import DumpRecipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "grid.yaml")  # those: test_task_grids.py
KINDS: dict[str, type[Strict]] = {
    "phases": TrainRecipe,
    "steps": Chain,
    "search": Sweep,
    "augment": AugmentRecipe,
    "prompt": GenerateRecipe,
}
"""A key that only recipes of this kind have; all others are those of a dump."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_parses(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    load_yaml(next((kind for key, kind in KINDS.items() if key in tree), DumpRecipe), path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
@pytest.mark.parametrize(
    ("name", "dumps", "trainings"),
    [("sst2", ["dump.yaml"], ["train.yaml"]), ("wikipedia", ["dump.yaml", "words.yaml"], ["train.yaml", "train-words.yaml"])],
)
def test_recipes_for_real_data_dump_and_train_three_steps(
    name: str, dumps: list[str], trainings: list[str], beside_shared: Path, run_program: Callable[..., str]
) -> None:
    for dump in dumps:
        recipe = str(ROOT / "recipes" / name / dump)
        run_program(beside_shared, "teacher_dump", "run", recipe, "rows.sources.0.limit=48", "rows.sources.1.limit=24")
    (beside_shared / "teachers").unlink()
    for training in trainings:
        run_program(beside_shared, "student_train", "run", str(ROOT / "recipes" / name / training), "--smoke")


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_a_chain_for_real_data_ends_in_a_student_of_its_assistant(beside_shared: Path, run_program: Callable[..., str]) -> None:
    (beside_shared / "recipes").symlink_to(ROOT / "recipes")
    few = "rows.sources.0.limit=48, rows.sources.1.limit=24"
    short = "phases.{0}.steps=3, phases.{0}.epochs=null, phases.{0}.batch_rows=8"
    assistant = "pass_name=assistant, teacher.model=out/takd/students/assistant/student, 'ship_layers=[2, 4]'"
    sets = [few, short.format(0), f"{few}, {assistant}", short.format(1)]
    changes = [f"steps.{number}.set=[{options}]" for number, options in enumerate(sets)]
    run_program(beside_shared, "student_train", "chain", "recipes/takd/chain.yaml", *changes)
    students = beside_shared / "out" / "takd" / "students"
    layers = [
        json.loads((students / name / "student" / "config.json").read_text())["num_hidden_layers"] for name in ("assistant", "student")
    ]
    assert layers == [4, 2]
