"""A small corpus, recipes for tiny teachers, and the program run in this process."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from tiny_dump import WORDS, Outcome, Tree, World, make_teacher

from teacher_dump.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(1)
    lines = []
    for number in range(90):
        words = draw.choices([word for word in WORDS if not word.startswith("#")], k=draw.randint(2, 28))
        lines.append({"text": " ".join(words), "label": draw.choice(["negative", "positive"]), "number": number})
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return World(
        masked=make_teacher(folder / "masked", "masked_lm", 1),
        other=make_teacher(folder / "other", "masked_lm", 2),
        classifier=make_teacher(folder / "classifier", "classification", 3),
        corpus=corpus,
    )


@pytest.fixture
def masked_recipe(world: World, tmp_path: Path) -> Tree:
    """A dump with all three kinds of features, in shards of 128 tokens."""
    return {
        "store": str(tmp_path / "store"),
        "pass_name": "bert",
        "teacher": {"model": str(world.masked), "head": "masked_lm"},
        "rows": {"sources": [{"files": str(world.corpus)}], "objective": "mlm", "max_length": 32, "hold_out": 0.1, "slot_tokens": 128},
        "features": [
            "lm_logits@masked:top8",
            {"key": "lm_logits@labels:select", "ids": [7], "words": ["good", "bad"]},
            "hidden.1@all",
            "hidden.-1@first",
            "attention_probs.1",
        ],
        "batch_tokens": 256,
        "device": "cpu",
    }


@pytest.fixture
def class_recipe(world: World, tmp_path: Path) -> Tree:
    label = {"column": "label", "classes": ["negative", "positive"]}
    return {
        "store": str(tmp_path / "store"),
        "pass_name": "classes",
        "teacher": {"model": str(world.classifier), "head": "classification"},
        "rows": {"sources": [{"files": str(world.corpus)}], "label": label, "max_length": 32, "slot_tokens": 256},
        "features": ["task_logits", "hidden.*@first", "final@mean"],
        "batch_tokens": 256,
        "device": "cpu",
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tree], Path]:
    """Put a recipe into a YAML file."""

    def write(tree: Tree) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def teacher_dump(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``teacher_dump("run", recipe, "dtype=float16")``: the program, in this process."""

    def run(*arguments: object) -> Outcome:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
