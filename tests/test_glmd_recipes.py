"""GLMD's shipped recipes: their numbers agree, and the chain ends in a student with all words and one with half of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPES = Path(__file__).parents[1] / "recipes" / "glmd"
FEW = "rows.sources.0.limit=48, rows.sources.1.limit=24"


def phases(name: str) -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return {phase["name"]: phase for phase in tree["phases"]}


def test_a_smaller_vocabulary_is_all_that_sets_the_two_students_apart() -> None:
    plain, smaller = phases("train"), phases("train_vc")
    kept = smaller["pretraining"]["student"].pop("vocabulary")
    assert smaller == plain
    cloze = yaml.safe_load((RECIPES / "clozes.yaml").read_text(encoding="utf-8"))["rows"]["cloze"]
    assert kept["keep"] == cloze["words"]


def test_ablations_have_the_numbers_of_the_whole() -> None:
    plain, others = phases("train"), phases("ablations")
    assert {**others["glmd"], "name": "task"} == plain["task"]
    assert others["pretraining"] == plain["pretraining"]
    assert others["task_words"] == plain["task_words"]
    for name, phase in others.items():
        words = any(method["name"] == "lm_kd" for method in phase["methods"])
        like = plain["pretraining" if name.endswith("pretraining") else "task_words" if words else "task"]
        for key in ("epochs", "batch_rows", "accumulation", "trainer", "metrics"):
            assert phase.get(key) == like.get(key), (name, key)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ten processes, each of which loads torch
def test_the_chain_ends_in_students_with_all_and_with_half_of_the_words(
    tiny_teachers: Callable[..., Path], run_program: Callable[..., str]
) -> None:
    folder = tiny_teachers(6, mlm="masked_lm")
    short = "phases.{0}.steps=2, phases.{0}.epochs=null, phases.{0}.batch_rows=8, phases.{0}.accumulation=1, phases.{0}.trainer.bf16=false"
    three = ", ".join(short.format(number) for number in range(3)) + ", phases.0.student.random.num_attention_heads=12"
    sets = [f"{FEW}, teacher.model=teachers/mlm", short.format(0), FEW, FEW, three, three]
    changes = [f"steps.{number}.set=[{options}]" for number, options in enumerate(sets)]
    run_program(folder, "student_train", "chain", "recipes/glmd/chain.yaml", *changes)
    sizes = []
    for name in ("students", "students_vc"):
        done = folder / "out" / "glmd" / name / "task"
        assert json.loads((done / "result.json").read_text())["after"].keys() >= {"accuracy", "f1", "agreement", "cloze_kd/soft"}
        sizes.append((done / "student" / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]
