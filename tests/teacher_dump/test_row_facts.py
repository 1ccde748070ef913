"""Domains and phrases in a recipe: what `status` and `show` tell of them, and that a dump goes on with its rows alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_dump import Outcome, Tree

from store.manifest import Manifest, manifest_bytes, read_manifest
from store.reader import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


@pytest.fixture
def recipe(masked_recipe: Tree, tmp_path: Path) -> Tree:
    texts = [("the river, old city people", "news"), ("new house", "books"), (", ,", "news"), ("good people", "web")]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text, "genre": genre}) for text, genre in texts))
    rows = {
        "sources": [{"files": str(corpus)}],
        "slot_tokens": 128,
        "domain": {"column": "genre", "classes": ["news", "books", "web"]},
        "phrases": {"words": 2},
    }
    return {**masked_recipe, "rows": rows, "features": ["hidden.1@all"]}


def test_show_prints_the_domain_and_the_phrases_of_a_row(recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("run", write(recipe)).code == 0
    assert "\n  domains: news, books, web\n" in teacher_dump("status", recipe["store"]).out
    shown = teacher_dump("show", recipe["store"], "--rows", "4").out.split("\n\n")
    assert [row.splitlines()[0].rpartition(" ── ")[2] for row in shown] == ["domain news", "domain books", "domain news", "domain web"]
    lines = [row.splitlines()[2] for row in shown]
    assert lines == [
        "  │ phrases: [the river] [old city] [people]",
        "  │ phrases: [new house]",
        "  │ phrases: none",
        "  │ phrases: [good people]",
    ]


def test_rows_without_a_tokenizer_are_shown_by_their_ids(recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(recipe)).code == 0
    ids = Store.open(Path(recipe["store"])).tokens("input_ids", Store.open(Path(recipe["store"])).rows.rows_of(0)[:1]).tolist()
    out = teacher_dump("show", recipe["store"], "--rows", "1").out
    assert f"phrases: [{ids[1]} {ids[2]}] [{ids[4]} {ids[5]}] [{ids[6]}]" in out
    assert "domain news" in out


def test_stores_without_them_show_neither(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(masked_recipe)).code == 0
    out = teacher_dump("status", masked_recipe["store"]).out + teacher_dump("show", masked_recipe["store"]).out
    assert "domain" not in out
    assert "phrases" not in out


def test_a_dump_goes_on_with_the_same_domains_and_phrases_alone(recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(recipe)).code == 0
    for option, field in (("rows.phrases.words=3", "rows.phrases"), ("rows.domain.classes=[news, books, web, talk]", "rows.domain")):
        refused = teacher_dump("run", write(recipe), option)
        assert refused.code == 2
        assert f"was made with another {field}" in refused.err
    assert teacher_dump("run", write(recipe)).code == 0
    assert teacher_dump("verify", recipe["store"]).code == 0


def test_a_dump_goes_on_with_rows_that_are_older_than_some_options(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(masked_recipe)).code == 0
    file = Path(masked_recipe["store"]) / "manifest.json"
    tree = read_manifest(file.parent).model_dump(mode="json")
    for name in ("domain", "phrases", "interchange", "response", "cloze", "chat", "vocabulary", "padding"):
        del tree["rows"]["origins"][0]["options"][name]
    file.write_bytes(manifest_bytes(Manifest.model_validate_json(json.dumps(tree))))
    refused = teacher_dump("run", write(masked_recipe), "rows.padding=true")
    assert refused.code == 2
    assert "was made with another rows.padding: expected False as stored, found True" in refused.err
    assert teacher_dump("run", write(masked_recipe)).code == 0
    assert teacher_dump("verify", masked_recipe["store"]).code == 0
