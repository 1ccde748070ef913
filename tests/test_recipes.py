"""Every recipe that ships parses, and works on the data it is for (the demo's are run by tests/test_docs.py)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from store.strict import load_yaml
from student_train.recipe import TrainRecipe
from teacher_dump.recipe import DumpRecipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_parses(path: Path) -> None:
    phases = "phases" in yaml.safe_load(path.read_text(encoding="utf-8"))
    load_yaml(TrainRecipe if phases else DumpRecipe, path)


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
