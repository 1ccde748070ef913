"""Bad input: one clear message, exit code 2, no traceback, and nothing on disk is touched."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dump import Outcome, Tree, World, files_of, make_tokenizer

from store import commits
from store.reader import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def refuses(outcome: Outcome, *said: str) -> None:
    assert outcome.code == 2, outcome.out
    assert outcome.out == ""
    message = outcome.err[outcome.err.rindex("error: ") if "error: " in outcome.err else outcome.err.index("Error: ") :]
    assert "Traceback" not in outcome.err
    assert [words for words in said if words not in message] == [], message
    assert len(message.strip().splitlines()) == 1


def with_value(tree: Tree, path: str, value: object) -> Tree:
    tree = copy.deepcopy(tree)
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return tree


class Bad(NamedTuple):
    path: str
    value: object
    said: tuple[str, ...]


BAD_RECIPES = {
    "unknown key": Bad("featuers", ["hidden.1"], ("'featuers'", "did you mean 'features'")),
    "unknown key of rows": Bad("rows.max_lenght", 12, ("'rows.max_lenght'", "did you mean 'max_length'")),
    "missing corpus": Bad("rows.sources.0.files", "nowhere.jsonl", ("no such file", "nowhere.jsonl")),
    "missing column": Bad("rows.text", "{txt}", ("txt", "text")),
    "label outside the classes": Bad("rows.label", {"column": "label", "classes": ["negative", "neutral"]}, ("positive", "record")),
    "missing teacher": Bad("teacher.model", "nowhere", ("model folder", "nowhere")),
    "unknown head": Bad("teacher.head", "classifier", ("teacher.head", "classification")),
    "unknown feature": Bad("features.0", "hiden.1@all", ("hiden", "did you mean 'hidden'")),
    "layer out of range": Bad("features.0", "hidden.3@all", ("the teacher has 2 blocks", "hidden.0 to hidden.2")),
    "negative layer out of range": Bad("features.0", "value.-3@all", ("the teacher has 2 blocks", "value.1 to value.2")),
    "block 0 of attention": Bad("features.0", "query.0@all", ("the teacher has 2 blocks", "query.1")),
    "site without a layer": Bad("features.0", "hidden@all", ("needs a layer",)),
    "unknown positions": Bad("features.0", "hidden.1@frist", ("did you mean 'first'",)),
    "a pass in a key": Bad("features.0", "bert/hidden.1@all", ("pass_name", "hidden.1@all")),
    "form of something else": Bad("features.0", "hidden.1@all:top4", ("lm_logits",)),
    "more words than there are": Bad("features.0", "lm_logits@labels:top999", ("fewer than top999",)),
    "attention at single tokens": Bad("features.0", "attention_probs.1@first", ("attention_probs.1@first",)),
    "task logits of a language model": Bad("features.0", "task_logits", ("masked_lm", "classification", "multiple_choice")),
    "the whole row of a hidden state": Bad("features.0", "hidden.1@row", ("row",)),
    "a word of several tokens": Bad(
        "features.0", {"key": "lm_logits@labels:select", "words": ["rivers"]}, ("'rivers'", "'river', '##s'", "ids")
    ),
    "an unknown word": Bad("features.0", {"key": "lm_logits@labels:select", "words": ["Żółw"]}, ("does not know",)),
    "an id beyond the vocabulary": Bad("features.0", {"key": "lm_logits@labels:select", "ids": [5000]}, ("5000",)),
    "words of another form": Bad("features.0", {"key": "hidden.1@all", "words": ["good"]}, ("select",)),
    "the same feature in two ways": Bad("features.0", {"key": "hidden.1@all", "dtype": "float16"}, ("hidden.1@all", "twice")),
    "no features": Bad("features", [], ("at least one", "teacher-dump rows")),
    "a type that is none": Bad("dtype", "int4", ("dtype", "'int8'", "'float8'")),
    "a misspelt option of a feature": Bad("features.0", {"key": "hidden.1@all", "keepbits": 4}, ("keepbits", "did you mean 'keep_bits'")),
    "words in whole numbers": Bad("features.0", {"key": "lm_logits@masked:top8", "dtype": "int8"}, ("top8", "float16", "found int8")),
    "more bits than a type has": Bad(
        "features.0", {"key": "hidden.1@all", "dtype": "float16", "keep_bits": 11, "compression": "zstd"}, ("expected 1 to 10", "found 11")
    ),
    "bits of whole numbers": Bad("features.2", {"key": "hidden.1@all", "dtype": "int8", "keep_bits": 3}, ("int8 has no mantissa",)),
    "fewer bits that save nothing": Bad("features.2", {"key": "hidden.1@all", "keep_bits": 3}, ("keep_bits", "compression: zstd")),
    "a layer that cannot ship": Bad("ship_layers", [7], ("blocks 1 to 2",)),
    "a reserved pass name": Bad("pass_name", "rows", ("rows",)),
    "an odd pass name": Bad("pass_name", "../up", ("pass_name", "found '../up'\n")),
    "a device that is none": Bad("device", "abacus", ("device",)),
    "slots that are no multiple": Bad("rows.slot_tokens", 100, ("slot_tokens", "128")),
}


@pytest.mark.parametrize("bad", BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_a_bad_recipe_is_refused(bad: Bad, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe = write(with_value(masked_recipe, bad.path, bad.value))
    before = files_of(tmp_path)
    for command in ("plan", "run"):
        refuses(teacher_dump(command, recipe), *bad.said)
        assert files_of(tmp_path) == before


def test_masked_tokens_need_masked_rows(class_recipe: Tree, world: World, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    teacher = {"model": str(world.masked), "head": "masked_lm"}
    for key, said in (("lm_logits@masked:top4", "mlm"), ("lm_logits@labels", "mlm or causal")):
        recipe = write({**class_recipe, "teacher": teacher, "features": [key]})
        before = files_of(tmp_path)
        refuses(teacher_dump("run", recipe), key, said)
        assert files_of(tmp_path) == before


def test_word_logits_need_a_language_model_head(class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    refuses(teacher_dump("run", write({**class_recipe, "features": ["lm_logits@first"]})), "classification", "head: masked_lm")


def test_empty_text_names_its_record(masked_recipe: Tree, world: World, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "gap.jsonl"
    corpus.write_text('{"text": "a river"}\n{"text": "   "}\n')
    recipe = write(with_value(masked_recipe, "rows.sources.0.files", str(corpus)))
    refuses(teacher_dump("run", recipe), "gap.jsonl, record 1", "empty")
    corpus.write_text('{"text": "a river"}\n{"text": "a city"}\n')
    assert teacher_dump("run", recipe).code == 0, "a build that failed is started over"


def test_a_missing_or_broken_recipe_is_refused(teacher_dump: Run, tmp_path: Path) -> None:
    refuses(teacher_dump("run", tmp_path / "none.yaml"), "no such recipe", "none.yaml")
    refuses(teacher_dump("run", tmp_path), "found a folder")
    (tmp_path / "bad.yaml").write_text("- a\n- b\n")
    refuses(teacher_dump("plan", tmp_path / "bad.yaml"), "expected a mapping")


def test_bad_command_lines_are_refused(teacher_dump: Run, masked_recipe: Tree, write: Write, tmp_path: Path) -> None:
    recipe = write(masked_recipe)
    for arguments, said in (
        (("run", recipe, "dtype:float16"), "key.path=value"),
        (("run", recipe, "features.9=hidden.1"), "0 to"),
        (("run",), "RECIPE"),
        (("dump", recipe), "No such command"),
        (("show", tmp_path, "--rows", "0"), "--rows"),
    ):
        outcome = teacher_dump(*arguments)
        assert outcome.code == 2
        assert said in outcome.err


def test_a_folder_that_holds_something_else_stays_as_it_is(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    recipe = write(masked_recipe)
    before = files_of(tmp_path)
    for command in ("run", "rows", "plan"):
        refuses(teacher_dump(command, recipe), str(folder), "another folder")
    for command in ("status", "verify", "show"):
        refuses(teacher_dump(command, folder), "expected a store", "something else")
    refuses(teacher_dump("status", tmp_path / "nothing"), "found nothing")
    assert files_of(tmp_path) == before


def test_a_store_of_something_else_stays_as_it_is(
    world: World, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    assert teacher_dump("run", write(masked_recipe)).code == 0
    store = Path(masked_recipe["store"])
    corpus = tmp_path / "other.jsonl"
    corpus.write_text(world.corpus.read_text().replace("river", "road"))
    renamed = tmp_path / "renamed"
    shutil.copytree(world.masked, renamed)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["word1"]})
    tokenizer.save_pretrained(renamed)
    before = files_of(store)
    for path, value, field in (
        ("rows.sources.0.files", str(corpus), "another corpus"),
        ("rows.max_length", 30, "another rows.max_length: expected 32 as stored, found 30"),
        ("teacher.model", str(renamed), "another tokenizer"),
        ("teacher.model", str(world.other), "another teacher"),
        ("teacher.dtype", "bfloat16", "another"),
        ("features.2", "hidden.0@all", "another"),
        ("dtype", "float16", "another"),
    ):
        recipe = write(with_value(masked_recipe, path, value))
        for command in ("plan", "run"):
            refuses(teacher_dump(command, recipe), field)
    assert files_of(store) == before


def test_a_store_of_another_schema_is_refused(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write({**masked_recipe, "features": []})
    assert teacher_dump("rows", recipe).code == 0
    manifest = Path(masked_recipe["store"]) / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "schema_version": 99}))
    refuses(teacher_dump("rows", recipe), "schema version", "99")


def test_a_dump_into_a_store_that_is_changed_as_a_whole_is_refused(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("rows", recipe).code == 0
    with commits.exclusive(Path(masked_recipe["store"])):
        refuses(teacher_dump("run", recipe), f"another process ({os.getpid()} on ")


def test_a_disk_that_is_too_small_is_refused_with_numbers(
    masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("rows", recipe).code == 0
    before = files_of(Path(masked_recipe["store"]))
    full = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "NOT ENOUGH" in teacher_dump("plan", recipe).out
    refuses(teacher_dump("run", recipe), "100 kB", "MB", "make room")
    assert files_of(Path(masked_recipe["store"])) == before


def spoilt(world: World, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the masked teacher with other weights."""
    shutil.copytree(world.masked, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_that_answers_nan_names_row_and_feature(
    world: World, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    lines = [json.loads(line)["text"].replace("stone", "road") for line in world.corpus.read_text().splitlines()]
    lines[17] = "the old stone house"
    corpus = tmp_path / "one-stone.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    stone = make_tokenizer().convert_tokens_to_ids("stone")

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["bert.embeddings.word_embeddings.weight"][stone] = torch.nan

    teacher = {"model": str(spoilt(world, tmp_path / "nan", change)), "head": "masked_lm"}
    recipe = write({**masked_recipe, "teacher": teacher, "features": ["hidden.1@all"]})
    plain = ("rows.objective=plain", f"rows.sources.0.files={corpus}")
    refuses(teacher_dump("run", recipe, *plain), "hidden.1@all of row 17", "one-stone.jsonl, record 17", "NaN or infinity")
    committed = Store.open(Path(masked_recipe["store"])).committed("bert")
    assert 0 < len(committed) < 17, "what was answered before is kept"


def test_half_precision_overflow_names_row_feature_and_the_way_out(
    world: World, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["bert.encoder.layer.0.output.LayerNorm.weight"] *= 1e6

    teacher = {"model": str(spoilt(world, tmp_path / "large", change)), "head": "masked_lm"}
    recipe = write({**masked_recipe, "teacher": teacher, "features": ["hidden.1@all"]})
    refuses(teacher_dump("run", recipe, "dtype=float16"), "hidden.1@all of row", "float16", "bfloat16 or float32")
    assert teacher_dump("run", recipe, "dtype=bfloat16").code == 0, "the refusal left a store that can be used"
