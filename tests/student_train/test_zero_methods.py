"""Every method under ZeRO on two ranks, where it is not refused: the losses of one rank that has all of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from case import all_of
from two_ranks import launched

from student_train.journal import read_journal
from student_train.methods import METHODS, method_class
from student_train.recipe import MethodSpec

FIRST = {method: options for method, options in reversed(all_of("RUNS"))}
"""Method -> the options of its first run in the golden tests."""
CHANGING = {"mobilebert", "rail_kd", "sid", "lrc_bert"}
"""Refused under stage 3 (test_unsafe.py)."""
WORDS = {"lm_loss", "lm_kd", "distilbert"}
CLOZES = {"cloze_loss", "cloze_kd"}
LOOP: dict[str, Any] = {"pass_name": "tiny", "bank": False, "steps": 4, "dropout": 0.0, "trainer": {"save_strategy": "no"}}
SPEED = ("tokens_per_second", "loader_wait")


@pytest.fixture(scope="module")
def store_of(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> 40 rows and all that a teacher of 4 blocks answers: labelled ones with phrases, masked ones for words, or clozes."""
    features, folder = ["hidden.*@all", "attention_scores.*", "value.*"], tmp_path_factory.mktemp("zero")
    labelled: Path = stores.write_store(
        folder / "labelled", "classification", [*features, "query.*", "key.*", "task_logits@row"], phrases={"words": 2}
    )
    masked: Path = stores.write_store(folder / "masked", "masked_lm", [*features, "lm_logits@all"], objective="mlm", mask_probability=0.4)
    clozes: Path = stores.write_clozes(folder / "clozes")
    return lambda method: clozes if method in CLOZES else masked if method in WORDS else labelled


def test_the_methods_that_are_left_out_under_stage_3_exist() -> None:
    assert METHODS.keys() >= CHANGING
    assert not any(method_class(name).live for name in FIRST)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # every method, under two stages and alone
def test_every_method_learns_under_zero_as_on_one_rank(tiny: ModuleType, store_of: Callable[[str], Path], tmp_path: Path) -> None:
    found = [(method, stage) for stage in (2, 3) for method in FIRST if stage == 2 or method not in CHANGING]
    specs = {method: MethodSpec(name=method, options=options) for method, options in FIRST.items()}
    runs = [
        {
            "stores": [str(store_of(method))],
            "output": str(tmp_path / f"{method} {stage}"),
            "methods": [specs[method].model_dump()],
            "zero": {"stage": stage},
            **LOOP,
        }
        for method, stage in found
    ]
    done = launched(str(tiny.__file__), json.dumps(runs), timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]

    alone = {method: tiny.run([store_of(method)], tmp_path / method, methods=[specs[method]], **LOOP)[1].history for method in FIRST}
    for method, stage in found:
        for entry, one in zip(read_journal(tmp_path / f"{method} {stage}" / "metrics.jsonl"), alone[method], strict=True):
            assert entry.keys() == one.keys()
            expected = {name: value for name, value in one.items() if name not in SPEED}
            assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=2e-6), (method, stage, entry["step"])
