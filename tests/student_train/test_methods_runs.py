"""Every method in a run: resumed in the middle it is the uninterrupted one, and on two ranks that of one."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from case import all_of
from two_ranks import launched

from student_train import checkpoint
from student_train.journal import read_journal
from student_train.methods import METHODS
from student_train.recipe import MethodSpec

RUNS: list[tuple[str, dict[str, Any]]] = all_of("RUNS")
NAMES = [f"{method}-{number}" for number, (method, _) in enumerate(RUNS)]
LOOP: dict[str, Any] = {"pass_name": "tiny", "bank": False, "steps": 8, "trainer": {"save_total_limit": 9, "save_steps": 4}}
ELSEWHERE = {"rw_kd", "meta_kd", "hrkd", "gkd", "minillm", "distillm", "distillm2", "diito"}
"""Need more of their rows: tests/student_train/test_row_weights.py, test_on_policy.py, test_diito.py."""
WORDS = {"lm_loss", "lm_kd", "distilbert"}
CLOZES = {"cloze_loss", "cloze_kd"}
CLOCK = ("tokens_per_second", "loader_wait")


@pytest.fixture(scope="module")
def store_of(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> 40 rows and all that a teacher of 4 blocks answers: labelled ones with phrases, masked ones for words, or clozes."""
    features, folder = ["hidden.*@all", "attention_scores.*", "value.*"], tmp_path_factory.mktemp("runs")
    labelled: Path = stores.write_store(
        folder / "labelled", "classification", [*features, "query.*", "key.*", "task_logits@row"], phrases={"words": 2}
    )
    masked: Path = stores.write_store(folder / "masked", "masked_lm", [*features, "lm_logits@all"], objective="mlm", mask_probability=0.4)
    clozes: Path = stores.write_clozes(folder / "clozes")
    return lambda method: clozes if method in CLOZES else masked if method in WORDS else labelled


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in history]


def spec(method: str, options: dict[str, Any]) -> MethodSpec:
    return MethodSpec(name=method, options=options)


def test_every_method_is_run() -> None:
    assert {method for method, _ in RUNS} | ELSEWHERE == {name for name, cls in METHODS.items() if not cls.live}


@pytest.mark.parametrize(("method", "options"), RUNS, ids=NAMES)
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(
    method: str, options: dict[str, Any], tiny: ModuleType, store_of: Callable[[str], Path], tmp_path: Path
) -> None:
    store = store_of(method)
    bundle, whole = tiny.run([store], tmp_path / "whole", methods=[spec(method, options)], **LOOP)
    weights = {name: tensor.clone() for name, tensor in bundle.state_dict().items()}
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-4", tmp_path / "resumed" / "checkpoints" / "checkpoint-4")
    bundle, resumed = tiny.run([store], tmp_path / "resumed", methods=[spec(method, options)], **LOOP)
    assert resumed.resumed == 4
    assert timeless(resumed.history) == timeless(whole.history)
    assert len({entry["loss"] for entry in timeless(whole.history) if "loss" in entry}) == 8
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow
@pytest.mark.timeout(1200)  # every method, on two ranks and alone
def test_two_ranks_train_as_one(tiny: ModuleType, store_of: Callable[[str], Path], tmp_path: Path) -> None:
    plain = {**LOOP, "dropout": 0.0}
    runs = [
        {"stores": [str(store_of(run[0]))], "output": str(tmp_path / name), "methods": [spec(*run).model_dump()], **plain}
        for name, run in zip(NAMES, RUNS, strict=True)
    ]
    done = launched(str(tiny.__file__), json.dumps(runs), timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, run in zip(NAMES, RUNS, strict=True):
        bundle, alone = tiny.run([store_of(run[0])], tmp_path / "alone" / name, methods=[spec(*run)], **plain)
        together = timeless(read_journal(tmp_path / name / "metrics.jsonl"))
        for entry, expected in zip(together, timeless(alone.history), strict=True):
            assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), (name, entry["step"])
        saved = checkpoint.load(tmp_path / name / "checkpoints" / "checkpoint-8" / "buffers_1.safetensors")
        for key, tensor in checkpoint.method_buffers(bundle.methods).items():  # weights may differ: Adam makes steps of noise
            torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=2e-5)
