"""What recipes need before anything is dumped, from the configurations of several teachers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from store.strict import parse
from student_train.cli import main
from student_train.needs import needs
from student_train.outline import outline
from student_train.recipe import TrainRecipe


@pytest.fixture
def folders(stores: ModuleType, tmp_path: Path) -> dict[str, Path]:
    """A language model of 6 blocks, a classifier of 4 and a scorer, of whom there are configurations alone."""
    made = {
        "words": stores.write_teacher(tmp_path / "words", "masked_lm", layers=6),
        "classes": stores.write_teacher(tmp_path / "classes", "classification", labels=3),
        "scores": stores.write_teacher(tmp_path / "scores", "classification", labels=1),
    }
    for folder in made.values():
        (folder / "model.safetensors").unlink()
    return made


def phase(name: str, pass_name: str, methods: list[dict[str, Any]], student: dict[str, Any]) -> dict[str, Any]:
    data = [{"store": f"absent/{pass_name}", "pass_name": pass_name}]
    return {"name": name, "student": student, "data": data, "methods": methods, "steps": 1}


def two_teachers() -> dict[str, Any]:
    """General text with one teacher, then a task with another, whose head is new to the student."""
    general = phase("general", "words", [{"name": "lm_kd"}, {"name": "hid_seq"}], {"layers": [2, 6]})
    task = phase("task", "classes", [{"name": "kd"}, {"name": "hid_cls"}], {"phase": "general", "head": "classification"})
    return {"output": "unused", "phases": [general, task]}


def test_each_pass_has_its_teacher(folders: dict[str, Path]) -> None:
    recipe = parse(TrainRecipe, two_teachers(), "recipe")
    found = {document["pass_name"]: document for document in yaml.safe_load_all(needs([recipe], folders))}
    assert found == {
        "words": {
            "store": "absent/words",
            "pass_name": "words",
            "features": ["hidden.3@all", "hidden.6@all", "lm_logits@labels"],  # 2 of its 6 blocks, uniformly
            "ship_layers": [2, 6],
        },
        "classes": {"store": "absent/classes", "pass_name": "classes", "features": ["hidden.2@first", "hidden.4@first", "task_logits@row"]},
    }
    assert outline(recipe, recipe.phases[1], folders).blueprint.shape.labels == 3


def test_a_new_head_for_scores_has_one_output(folders: dict[str, Path]) -> None:
    student = {"layers": [1], "source": str(folders["words"]), "head": "classification"}
    recipe = parse(TrainRecipe, {"output": "unused", "phases": [phase("task", "scores", [{"name": "kd"}], student)]}, "recipe")
    assert outline(recipe, recipe.phases[0], folders).blueprint.shape.labels == 1
    with pytest.raises(ValueError, match="no labels to count"):
        outline(recipe, recipe.phases[0], {"": folders["words"]})


def test_the_program_takes_a_folder_for_each_pass_and_one_for_all_others(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(two_teachers()), encoding="utf-8")
    expected = needs([parse(TrainRecipe, two_teachers(), "recipe")], folders)
    for teachers in (
        [f"words={folders['words']}", f"classes={folders['classes']}"],
        [str(folders["words"]), f"classes={folders['classes']}"],
    ):
        main(["needs", str(file), *(word for teacher in teachers for word in ("--teacher", teacher))])
        assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit):
        main(["needs", str(file), "--teacher", f"words={folders['words']}"])
    assert "absent/classes" in capsys.readouterr().err
