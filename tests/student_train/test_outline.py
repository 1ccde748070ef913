"""What no training could learn from is refused before anything is built."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from student_train.outline import outline
from student_train.recipe import TrainRecipe


def recipe(store: Path, output: Path, method: dict[str, Any], head: str | None = None) -> TrainRecipe:
    student = {"layers": [2], **({"head": head} if head else {})}
    phase = {"name": "only", "data": [{"store": str(store), "pass_name": "tiny"}], "student": student, "methods": [method],
             "batch_rows": 4, "steps": 1}  # fmt: skip
    return TrainRecipe.model_validate({"output": str(output), "phases": [phase]})


@pytest.fixture(scope="module")
def unlabelled(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = stores.write_store(tmp_path_factory.mktemp("unlabelled"), "classification", ["task_logits@row"], label=None)
    return path


@pytest.fixture(scope="module")
def words(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = stores.write_store(tmp_path_factory.mktemp("words"), "masked_lm", ["final@all"])
    return path


@pytest.mark.parametrize("method", [{"name": "task_loss"}, {"name": "kd"}, {"name": "kd", "options": {"alpha": 0.9}}])
def test_labels_are_asked_for_before_training(method: dict[str, Any], unlabelled: Path, tmp_path: Path) -> None:
    made = recipe(unlabelled, tmp_path / "out", method)
    with pytest.raises(ValueError, match=r"have no labels .* kd learns without them with alpha: 1"):
        outline(made, made.phases[0])


def test_kd_without_hard_labels_needs_none(unlabelled: Path, tmp_path: Path) -> None:
    made = recipe(unlabelled, tmp_path / "out", {"name": "kd", "options": {"alpha": 1.0}})
    assert outline(made, made.phases[0]).methods


def test_words_to_predict_are_asked_for_before_training(words: Path, tmp_path: Path) -> None:
    made = recipe(words, tmp_path / "out", {"name": "lm_loss"})
    with pytest.raises(ValueError, match="have no labelled tokens; build rows with objective: mlm or causal"):
        outline(made, made.phases[0])
