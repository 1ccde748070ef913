"""Students that keep only some words on two ranks, whole and in parts: the words and losses of one."""

import json
from pathlib import Path
from typing import Any

import pytest
from two_ranks import launched

from online.kept_words import read_kept_words
from store.strict import parse
from student_train.output import recipe_yaml, student_folder
from student_train.recipe import TrainRecipe
from student_train.run import run

STILL = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def recipe(output: Path, folder: Path, zero: dict[str, Any] | None) -> TrainRecipe:
    data = {"store": str(folder / "store"), "pass_name": "tiny"}
    phase = {
        "name": "words", "student": {"random": STILL, "vocabulary": {"rate": 0.3}}, "data": [data], "evaluate": [{**data, "split": "dev"}],
        "steps": 3, "batch_rows": 8, "metrics": ["perplexity"], "zero": zero,
        "methods": [{"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}, {"name": "lm_loss"}],
        "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "learning_rate": 1e-3},
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_find_the_words_of_one_and_train_alike_whole_and_in_parts(many_words: Path, tmp_path: Path) -> None:
    alone = recipe(tmp_path / "alone", many_words, None)
    run(alone, ["tests"])
    expected = json.loads((alone.output / "words" / "result.json").read_text())
    kept = read_kept_words(student_folder(alone, "words"))
    assert kept is not None
    for name, zero in {"whole": None, "parts": {"stage": 3}}.items():
        made = recipe(tmp_path / name, many_words, zero)
        (tmp_path / f"{name}.yaml").write_text(recipe_yaml(made))
        done = launched("-m", "student_train.cli", "run", str(tmp_path / f"{name}.yaml"), "--phase", "words")
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads((made.output / "words" / "result.json").read_text())
        assert found["start"] == expected["start"]
        assert found["after"] == pytest.approx(expected["after"], rel=1e-4), name
        words = read_kept_words(student_folder(made, "words"))
        assert words is not None
        assert words.fingerprint == kept.fingerprint
