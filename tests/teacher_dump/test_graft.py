"""A student learns task logits of a teacher whose tokenizer it does not share, and is refused everything else of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from store.errors import FingerprintMismatch
from store.features import FeatureKey
from store.graft import graft
from store.reader import Store
from store.strict import parse
from student_train.recipe import TrainRecipe
from student_train.run import run
from teacher_dump.dump import build_rows, dump
from teacher_dump.recipe import DumpRecipe

WORDS = ["good", "bad", "film", "plot", "the"]
LOGITS = FeatureKey("task_logits", positions="row")


def model(folder: Path, words: list[str], width: int) -> Path:
    """A random classifier whose tokenizer numbers ``words`` in this order."""
    torch.manual_seed(width)
    names = ["[PAD]", "[UNK]", *words]
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(names), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def recipe(folder: Path, name: str, texts: str, features: list[str], **rows: Any) -> DumpRecipe:  # noqa: ANN401
    made = {
        "store": str(folder / f"{name}-store"), "pass_name": "large", "teacher": {"model": str(folder / name), "head": "classification"},
        "rows": {"sources": [{"files": str(folder / texts)}], "label": {"column": "label", "classes": [0, 1]}, "max_length": 8, **rows},
        "features": features, "device": "cpu",
    }  # fmt: skip
    return parse(DumpRecipe, made, "recipe")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    for name in ("texts", "others"):
        lines = [{"text": " ".join(draw.choice(WORDS, draw.integers(1, 7))), "label": int(draw.integers(2))} for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model(folder / "teacher", WORDS, 16)
    model(folder / "student", WORDS[::-1], 8)
    dump(recipe(folder, "teacher", "texts.jsonl", ["task_logits@row", "final@all"]), ["tests"])
    build_rows(recipe(folder, "student", "texts.jsonl", ["task_logits@row"]), ["tests"])
    return folder


def training(world: Path, output: Path, store: str, methods: list[dict[str, Any]]) -> TrainRecipe:
    phase = {
        "name": "only", "student": {"model": {"model": str(world / "student"), "head": "classification"}}, "methods": methods,
        "data": [{"store": str(world / store), "pass_name": "large"}], "steps": 2, "batch_rows": 8,
        "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True},
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def test_rows_get_what_the_teacher_said_of_the_same_text_and_students_learn_it(world: Path, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch, match=r"another tokenizer .*teacher-dump generate.*teacher-dump graft"):
        run(training(world, tmp_path / "refused", "teacher-store", [{"name": "kd"}]), ["tests"])
    target = world / "student-store"
    assert graft(world / "teacher-store", "large", target) == ("task_logits@row",)
    assert graft(world / "teacher-store", "large", target) == ("task_logits@row",)  # nothing is left to do
    there, here = Store.open(world / "teacher-store"), Store.open(target)
    assert here.complete("large")
    for row in range(40):
        other = next(number for number in range(40) if there.rows.about(number)["record"] == here.rows.about(row)["record"])
        left, right = (store.read(LOGITS.of("large"), np.array([one])) for store, one in ((here, row), (there, other)))
        assert {name: value.tolist() for name, value in left.items()} == {name: value.tolist() for name, value in right.items()}
    run(training(world, tmp_path / "out", "student-store", [{"name": "kd"}]), ["tests"])
    assert (tmp_path / "out" / "only" / "student" / "model.safetensors").is_file()


def test_other_texts_rows_and_features_of_tokens_are_refused(world: Path) -> None:
    build_rows(recipe(world, "student", "others.jsonl", ["task_logits@row"]).model_copy(update={"store": world / "other"}), ["tests"])
    with pytest.raises(FingerprintMismatch, match="are of other texts"):
        graft(world / "teacher-store", "large", world / "other")
    with pytest.raises(ValueError, match="has no pass 'small'; it has large"):
        graft(world / "teacher-store", "small", world / "student-store")
    words = recipe(world, "teacher", "texts.jsonl", ["hidden.1@all"]).model_copy(update={"store": world / "tokens"})
    dump(words, ["tests"])
    with pytest.raises(ValueError, match=r"has nothing of whole rows \(hidden.1@all\)"):
        graft(world / "tokens", "large", world / "student-store")
