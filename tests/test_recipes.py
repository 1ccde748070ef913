"""Every recipe that ships parses, and works on the data it is for."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from store.strict import load_yaml
from student_train.recipe import TrainRecipe
from teacher_dump.recipe import DumpRecipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def recipe_type(path: Path) -> type[DumpRecipe] | type[TrainRecipe]:
    return TrainRecipe if "phases" in yaml.safe_load(path.read_text(encoding="utf-8")) else DumpRecipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_parses(path: Path) -> None:
    load_yaml(recipe_type(path), path)


def invoke(program: str, *arguments: str) -> str:
    """Run a program in this process; its output, which the message of a failure holds."""
    import student_train.cli
    import teacher_dump.cli

    main = {"teacher-dump": teacher_dump.cli.program, "student-train": student_train.cli.program}[program]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst2", "wikipedia"])
def test_a_recipe_for_real_data_dumps_and_trains_three_steps(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "teachers").symlink_to(shared / "teachers")
    monkeypatch.chdir(tmp_path)
    dump, train = (str(ROOT / "recipes" / name / f"{kind}.yaml") for kind in ("dump", "train"))
    invoke("teacher-dump", "run", dump, "rows.sources.0.limit=48", "rows.sources.1.limit=24")
    (tmp_path / "teachers").unlink()
    for phase in load_yaml(TrainRecipe, Path(train)).phases:
        if phase.student.phase is None:
            text = yaml.safe_dump({"output": "out/one", "phases": [phase.model_dump(mode="json", exclude_none=True)]})
            (tmp_path / "one.yaml").write_text(text)
            invoke("student-train", "run", "one.yaml", "--smoke")
