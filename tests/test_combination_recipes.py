"""Combinations of methods in recipes/methods: what they are made of, and that tiny teachers' stores serve them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from store.strict import load_yaml
from student_train.recipe import TrainRecipe
from student_train.run import check

METHODS = Path(__file__).parents[1] / "recipes" / "methods"
INNER = "hidden.*@all, attention_scores.*, query.*, key.*, value.*, final@all"
WORDS = f"features=[{INNER}, lm_logits@all]"
CLASSES = f"features=[{INNER}, task_logits@row]"
FEW = ["rows.sources.0.limit=60", "rows.sources.1.limit=12"]


def names(recipe: str) -> dict[str, list[str]]:
    """Phase -> its methods."""
    return {phase.name: [spec.name for spec in phase.methods] for phase in load_yaml(TrainRecipe, METHODS / recipe).phases}


def test_best_c_is_the_features_of_tinybert_and_minilmv2_and_soft_labels_in_three_phases() -> None:
    assert names("best_c.yaml") == {
        "pretraining": ["tinybert", "minilmv2", "lm_kd"],
        "task_features": ["tinybert", "minilmv2"],
        "task_labels": ["kd"],
    }


def test_mix5_has_all_five_methods_and_keeps_words_to_the_general_text() -> None:
    found = names("mix5.yaml")
    assert found["pretraining"] == ["tinybert", "minilm", "minilmv2", "distilbert"]
    assert "distilbert" not in found["task_features"] + found["task_labels"]
    assert found["task_labels"] == ["kd", "kd"]


def test_every_combination_of_features_is_made_of_matches_and_followed_by_labels_alone() -> None:
    found = names("table4.yaml")
    kinds = {"emb": 1, "att": 1, "hs": 1, "rel": 3}
    features = {name.removesuffix("_features"): methods for name, methods in found.items() if name.endswith("_features")}
    assert len(features) == 6
    for row, methods in features.items():
        assert methods == ["match"] * sum(kinds[kind] for kind in row.split("_"))
        assert any(re.fullmatch(rf"{row}_(soft|hard|soft_hard)", name) for name in found)
    assert all(methods in (["kd"], ["task_loss"]) for name, methods in found.items() if not name.endswith("_features"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_stores_of_tiny_teachers_serve_all_combinations_and_best_c_and_mix5_train(
    tiny_teachers: Callable[..., Path], run_program: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_teachers(6, sst2="classification", mlm="masked_lm")
    monkeypatch.chdir(folder)
    run_program(folder, "teacher_dump", "run", "recipes/sst2/dump.yaml", CLASSES, *FEW)
    run_program(folder, "teacher_dump", "run", "recipes/wikipedia/dump.yaml", WORDS, *FEW)
    table = load_yaml(TrainRecipe, METHODS / "table4.yaml")
    check(table, table.phases)
    for recipe in ("best_c.yaml", "mix5.yaml"):
        assert "3 phases work" in run_program(folder, "student_train", "run", f"recipes/methods/{recipe}", "--smoke")
