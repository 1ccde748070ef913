"""Teachers in parts that judge what the student writes, and write along: two ranks are one."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from two_ranks import launched

from student_train.journal import read_journal
from student_train.output import recipe_yaml
from student_train.run import run

CLOCK = ("tokens_per_second", "loader_wait")
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_answers", Path(__file__).with_name("tiny_answers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("answers")
    tiny.write_model(made / "teacher", tiny.llama(hidden_size=32, num_hidden_layers=3), 1)
    tiny.write_model(made / "student", tiny.gpt2(**STILL), 2)
    tiny.write_rows(made)
    return made


def curve(output: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in read_journal(output / "only" / "metrics.jsonl")]


def two_ranks(recipe: Path) -> "subprocess.CompletedProcess[str]":
    return launched("-m", "student_train.cli", "run", str(recipe))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [("fsdp", "minillm", {"mix": 0.4}), ("zero3", "minillm", {"mix": 0.4}), ("tp", "gkd", {"lmbda": 1.0})],
)
def test_two_ranks_train_as_one(kind: str, method: str, options: dict[str, Any], tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    methods = [{"name": method, "options": {**options, "max_new_tokens": 7}}]
    alone = tiny.recipe(folder, tmp_path / "one", methods)
    run(alone, ["test"])
    live = {"model": str(folder / "teacher"), "head": "causal_lm", "sharding": {"kind": kind, "size": 2}}
    spread = tiny.recipe(folder, tmp_path / "two", methods, {"teacher": {"online": live}})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(spread))
    done = two_ranks(file)
    assert done.returncode == 0, done.stderr[-4000:]
    for entry, expected in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), entry["step"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_split_teacher_cannot_write_along(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    live = {"model": str(folder / "teacher"), "head": "causal_lm", "sharding": {"kind": "tp", "size": 2}}
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(tiny.recipe(folder, tmp_path / "out", [{"name": "minillm"}], {"teacher": {"online": live}})))
    done = two_ranks(file)
    assert done.returncode != 0
    assert "a teacher split by tensor parallelism cannot write along; expected sharding zero3, fsdp or none, or mix: 0" in done.stderr
    assert "Traceback" not in done.stderr.partition("a teacher split")[0]
