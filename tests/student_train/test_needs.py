"""The features that recipes need, as lines of a dump recipe."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from store.strict import parse
from student_train.needs import needs
from student_train.recipe import TrainRecipe
from teacher_dump.recipe import DumpRecipe


def recipe(store: Path, methods: list[dict[str, Any]], **changes: object) -> TrainRecipe:
    data = {"store": str(store), "pass_name": "tiny"}
    phase = {"name": "p", "student": {"layers": [2, 4]}, "data": [data], "methods": methods, "steps": 1, **changes}
    return parse(TrainRecipe, {"output": "unused", "phases": [phase]}, "recipe")


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def test_every_feature_of_all_recipes_is_named_once(sentiment: Path) -> None:
    first = recipe(sentiment, [{"name": "kd"}, {"name": "hid_cls"}])
    second = recipe(sentiment, [{"name": "hid_cls"}, {"name": "att_mse"}], student={"layers": [1, 4]})
    (only,) = documents(needs([first, second]))
    assert only["store"] == str(sentiment)
    assert only["pass_name"] == "tiny"
    assert only["features"] == [
        "attention_scores.2@all", "attention_scores.4@all", "hidden.2@first", "hidden.4@first", "task_logits@row",
    ]  # fmt: skip
    assert only["ship_layers"] == [1, 2, 4]


def test_metrics_need_features_too(sentiment: Path) -> None:
    plain = recipe(sentiment, [{"name": "task_loss"}], evaluate=[{"store": str(sentiment), "split": "dev", "pass_name": "tiny"}])
    assert needs([plain]).startswith("#")
    measured = recipe(
        sentiment, [{"name": "task_loss"}], teacher="none", metrics=["agreement", "similarity_spearman"],
        evaluate=[{"store": str(sentiment), "split": "dev", "pass_name": "tiny"}],
    )  # fmt: skip
    (only,) = documents(needs([measured]))
    assert only["features"] == ["final@mean", "task_logits@row"]


def test_a_teachers_configuration_is_enough_before_there_is_a_store(stores: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    stores.write_teacher(tmp_path / "teacher", "classification")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    wanted = [{"name": "kd"}, {"name": "hid_cls"}]
    before = documents(needs([recipe(tmp_path / "store", wanted)], {"": tmp_path / "teacher"}))
    with_store = documents(needs([recipe(sentiment, wanted)]))
    assert before[0]["features"] == with_store[0]["features"]
    assert before[0]["ship_layers"] == [2, 4]


def test_passes_are_documents_of_their_own(sentiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sentiment, other)
    found = documents(needs([recipe(sentiment, [{"name": "kd"}]), recipe(other, [{"name": "hid_cls"}])]))
    assert {document["store"]: document["features"] for document in found} == {
        str(sentiment): ["task_logits@row"],
        str(other): ["hidden.2@first", "hidden.4@first"],
    }


def test_the_lines_are_a_dump_recipes(stores: ModuleType, words: Path, tmp_path: Path) -> None:
    lines = needs([recipe(words, [{"name": "minilmv2"}, {"name": "lm_kd"}])])
    text, _ = stores.write_text(tmp_path)
    tree = {**yaml.safe_load(lines), "teacher": {"model": "m", "head": "masked_lm"}, "rows": {"sources": [{"files": [str(text)]}]}}
    made = parse(DumpRecipe, tree, "dump")
    assert [request.key for request in made.features] == ["key.4@all", "lm_logits@labels", "query.4@all", "value.4@all"]
    assert made.ship_layers == (2, 4)


@pytest.mark.parametrize(
    "method", ["lm_kd", "hid_cls", "hid_seq", "att_mse", "att_kl", "val_kl", "minilm", "minilmv2", "tinybert", "distilbert", "sentence"]
)
def test_every_method_that_learns_from_a_teacher_has_needs(method: str, words: Path) -> None:
    (only,) = documents(needs([recipe(words, [{"name": method}])]))
    assert only["features"]
