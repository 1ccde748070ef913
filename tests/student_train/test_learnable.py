"""Held-out rows and domains that a method reads are there before it trains, or the recipe is refused."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from student_train.outline import outline
from student_train.recipe import TrainRecipe

RW_KD, HRKD = {"name": "rw_kd"}, {"name": "hrkd", "options": {"domains": 4}}


def recipe(store: Path, method: dict[str, Any], meta: Path | dict[str, str] | None = None, **changes: object) -> TrainRecipe:
    phase = {
        "name": "only",
        "data": [{"store": str(store), "pass_name": "tiny"}],
        "meta": {"store": str(meta), "split": "dev"} if isinstance(meta, Path) else meta,
        "student": {"layers": [2]},
        "methods": [method],
        "batch_rows": 4,
        "steps": 1,
    }
    return TrainRecipe.model_validate({"output": "out", "phases": [phase | changes]})


@pytest.fixture(scope="module")
def unlabelled(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = stores.write_store(tmp_path_factory.mktemp("unlabelled"), "classification", ["task_logits@row"], label=None)
    return path


@pytest.fixture(scope="module")
def genres(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of four domains, and rows of two of them."""
    features, found = ["task_logits@row", "hidden.*@all", "attention_scores.*"], {}
    for name, classes in (("four", ["news", "books", "web", "talk"]), ("two", ["news", "books"])):
        domain = {"column": "label", "classes": classes}  # a number is a place in the list
        found[name] = stores.write_store(tmp_path_factory.mktemp(name), "classification", features, domain=domain)
    return found


def refused(made: TrainRecipe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outline(made, made.phases[0])


def test_held_out_rows_are_given_where_a_method_judges_by_them_and_nowhere_else(sentiment: Path, unlabelled: Path) -> None:
    made = recipe(sentiment, RW_KD, sentiment)
    assert outline(made, made.phases[0]).methods
    refused(recipe(sentiment, RW_KD), "methods: rw_kd judges rows by held-out ones; give the phase meta: {store: STORE, split: SPLIT}")
    refused(recipe(sentiment, {"name": "kd"}, sentiment), "meta: none of the phase's methods looks at held-out rows; leave it out")
    refused(recipe(sentiment, RW_KD, unlabelled), "meta: rw_kd: the rows of .* have no labels to judge by")
    refused(recipe(sentiment, RW_KD, meta={"store": str(sentiment), "split": "held"}), "has no split 'held'")


def test_the_teacher_alone_can_be_weighed_by_held_out_labels(sentiment: Path, unlabelled: Path) -> None:
    made = recipe(unlabelled, {"name": "rw_kd", "options": {"hard": 0}}, sentiment)
    assert outline(made, made.phases[0]).methods
    refused(recipe(unlabelled, RW_KD, sentiment), "methods: rw_kd: the rows of .* have no labels")


def test_rows_have_as_many_domains_as_a_method_is_told_of(sentiment: Path, genres: dict[str, Path]) -> None:
    made = recipe(genres["four"], HRKD)
    assert outline(made, made.phases[0]).methods
    refused(recipe(sentiment, HRKD), r"hrkd: the rows of .* have no domains \(rows.domain in the dump's recipe names their column\)")
    refused(recipe(genres["two"], HRKD), "methods: hrkd: expected domains: 2, for its rows are of news, books; found 4")
    refused(recipe(genres["two"], {"name": "hrkd"}), "method hrkd: domains: required")


def test_all_rows_of_a_phase_are_of_one_list_of_domains(sentiment: Path, genres: dict[str, Path]) -> None:
    both = [{"store": str(path), "pass_name": "tiny"} for path in genres.values()]
    lists = r"methods: hrkd: expected rows of one list of domains .*, found \[news, books\] and \[news, books, web, talk\]"
    refused(recipe(genres["four"], HRKD, data=both), lists)
    measured = [{"store": str(genres["two"]), "pass_name": "tiny", "split": "dev"}]
    refused(recipe(genres["four"], HRKD, evaluate=measured), lists)
    alone = {"store": str(sentiment), "split": "dev"}  # without a pass: HRKD is not measured there
    made = recipe(genres["four"], HRKD, evaluate=[alone])
    assert outline(made, made.phases[0]).methods
