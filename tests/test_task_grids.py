"""Grids of tasks: published numbers of other methods fit the training recipe beside them, and methods take them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field
from transformers import BertConfig

from online.models import model_shape
from store.shape import Head, ModelShape
from store.strict import Strict, load_yaml, read_yaml
from student_train.methods import parse_method
from student_train.recipe import PhaseSpec, TrainRecipe

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "recipes" / "tasks"
FOLDERS = sorted(str(file.parent.relative_to(TASKS)) for file in TASKS.glob("*/*/train.yaml"))


class Change(Strict):
    """What of the training recipe's phase another method changes."""

    name: str
    student: dict[str, Any] | None = None
    methods: list[Any]
    epochs: int | None = None
    batch_rows: int | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


class Numbers(Strict):
    """A method's numbers for a task."""

    source: str
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    phases: list[Change]


class Grid(Strict):
    """A file grid.yaml."""

    recipe: str
    grid: dict[str, list[Any]]
    methods: dict[str, Numbers]


def merged(recipe: Path, numbers: Numbers) -> dict[str, Any]:
    """The training recipe with a method's phases, as docs/protocols.md says."""
    tree = read_yaml(recipe)
    (first,) = tree["phases"]
    phases = []
    for change in numbers.phases:
        given = change.model_dump(exclude_none=True)
        start = {} if not phases or change.student else {"student": {"phase": phases[-1]["name"]}}
        phases.append({**first, **start, **given, "trainer": {**first["trainer"], **change.trainer}})
    return {**tree, "phases": phases}


def blocks(phase: PhaseSpec) -> int:
    """How many blocks its student of a teacher of 12 has."""
    layers = phase.student.layers
    if isinstance(layers, str):
        return 12 // int(layers[6:]) if layers.startswith("every") else int(layers[6:])
    return 3 if not isinstance(layers, tuple) else len(layers)


def check_methods(recipe: TrainRecipe, head: Head) -> None:
    """Refuse options that its methods do not take, for BERT-base and the student that the recipe starts with."""

    def shape(layers: int) -> ModelShape:
        return model_shape(BertConfig(num_hidden_layers=layers, num_labels=2), head)

    student = shape(blocks(recipe.phases[0]))
    for phase in recipe.phases:
        for spec in phase.methods:
            parse_method(spec.name, dict(spec.options), student, shape(12))


@pytest.mark.parametrize("folder", FOLDERS)
def test_grids_fit_their_training_recipe_and_name_options_that_methods_take(folder: str, tmp_path: Path) -> None:
    own = TASKS / folder / "grid.yaml"
    grid = load_yaml(Grid, own if own.is_file() else TASKS / folder / ".." / "grid.yaml")
    recipe = ROOT / grid.recipe.replace("TASK", folder.rpartition("/")[2])
    assert recipe == TASKS / folder / "train.yaml"
    head: Head = "multiple_choice" if folder.endswith("copa") else "classification"
    files = {"": (recipe, grid.grid)}
    for name, numbers in grid.methods.items():
        if name != "universal_kd" or head == "classification":
            file = tmp_path / f"{name}.yaml"
            file.write_text(yaml.safe_dump(merged(recipe, numbers)), encoding="utf-8")
            files[name] = (file, numbers.grid)
    for file, tried in files.values():
        check_methods(load_yaml(TrainRecipe, file), head)
        for key, values in tried.items():
            for value in values:
                check_methods(load_yaml(TrainRecipe, file, [f"{key}={json.dumps(value)}"]), head)


def test_there_are_eight_tasks_of_superglue_and_seven_of_glue() -> None:
    assert [sum(folder.startswith(f"{suite}/") for folder in FOLDERS) for suite in ("superglue", "glue")] == [8, 7]
