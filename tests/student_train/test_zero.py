"""A student under ZeRO on two ranks: the losses and weights of one rank, exact resumption, and weights that a step does not use."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from two_ranks import launched

from student_train import checkpoint
from student_train.journal import read_journal
from student_train.recipe import MethodSpec

METHODS = [MethodSpec(name="task_loss"), MethodSpec(name="hid_seq", weight=0.5, options={"layers": [[1, 2]]})]
DECAY = {"weight_decay": 0.1}
PLAIN: dict[str, Any] = {"dropout": 0.0, "bank": False, "trainer": DECAY}
STATEFUL: dict[str, Any] = {"accumulation": 2, "workers": 1, "trainer": {"save_total_limit": 9}}
TURNS: dict[str, Any] = {**PLAIN, "methods": METHODS[1:], "turns": True}
PART: dict[str, Any] = {**PLAIN, "methods": METHODS[1:]}
SPEED = ("tokens_per_second", "loader_wait")

EQUAL: dict[str, dict[str, Any]] = {
    "stage 1": {**PLAIN, "zero": {"stage": 1}},
    "stage 2": {**PLAIN, "zero": {"stage": 2}},
    "stage 3": {**PLAIN, "zero": {"stage": 3}},
    "stage 1 accumulated, offloaded": {**PLAIN, "accumulation": 2, "zero": {"stage": 1, "offload_optimizer": "cpu"}},
    "stage 2 accumulated": {**PLAIN, "accumulation": 2, "zero": {"stage": 2}},
    "stage 3 accumulated": {**PLAIN, "accumulation": 2, "zero": {"stage": 3}},
    "stage 3 offloaded": {**PLAIN, "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    "stage 2 recomputed": {**PLAIN, "trainer": {**DECAY, "gradient_checkpointing": True}, "zero": {"stage": 2}},
    "stage 3 recomputed": {**PLAIN, "trainer": {**DECAY, "gradient_checkpointing": True}, "zero": {"stage": 3}},
}
"""Those that train as one rank does with PLAIN."""


def on_two_ranks(tiny: ModuleType, stores: list[Path], runs: dict[str, dict[str, Any]], output: Path) -> subprocess.CompletedProcess[str]:
    """All ``runs``, one after the other, on two ranks."""
    options = [
        {
            "stores": [str(store) for store in run.get("stores", stores)],
            "output": str(output / name),
            **run,
            "methods": [spec.model_dump() for spec in run.get("methods", METHODS)],
        }
        for name, run in runs.items()
    ]
    return launched(str(tiny.__file__), json.dumps(options, default=str), timeout=500)


def curve(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key not in SPEED} for entry in read_journal(folder / "metrics.jsonl")]


def last(folder: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / "checkpoint-12" / file)


def check_like_one_rank(folder: Path, alone: Path) -> None:
    """Losses, gradient norms and weights are those of one rank."""
    expected, found = curve(alone), curve(folder)
    assert len(found) == len(expected) == 12
    for entry, one in zip(found, expected, strict=True):
        assert entry.keys() == one.keys()
        assert entry == pytest.approx(one, rel=1e-6, abs=2e-6), (folder.name, entry["step"])
    for name, weight in last(alone).items():
        torch.testing.assert_close(
            last(folder)[name], weight, atol=5e-7, rtol=0, msg=lambda text, name=name: f"{folder.name}: {name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_trains_as_one_rank_and_moves_nothing_that_a_step_does_not_use(
    tiny: ModuleType, taught: Path, untaught: Path, tmp_path: Path
) -> None:
    runs = {
        **EQUAL,
        "by turns 1": {**TURNS, "zero": {"stage": 1}},
        "by turns 2": {**TURNS, "accumulation": 2, "zero": {"stage": 2}},
        "in part 2": {**PART, "zero": {"stage": 2}},
        "in part 3": {**PART, "zero": {"stage": 3}},
        "two sources": {**PLAIN, "stores": [taught, untaught], "zero": {"stage": 2}},
        "half": {**PLAIN, "trainer": {**DECAY, "bf16": True}, "zero": {"stage": 2}},
        "half, DDP": {**PLAIN, "trainer": {**DECAY, "bf16": True}},
        "refused": {**TURNS, "zero": {"stage": 3}},
    }
    done = on_two_ranks(tiny, [taught], runs, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("ZeRO-3 would move it by the gradient of an earlier step") == 2, done.stderr[-4000:]

    alone = {"plain": PLAIN, "by turns": TURNS, "in part": PART, "two sources alone": {**PLAIN, "stores": [taught, untaught]}}
    for name, run in alone.items():
        tiny.run(**{"stores": [taught], "output": tmp_path / name, "methods": METHODS, **run})
    for name in EQUAL:
        check_like_one_rank(tmp_path / name, tmp_path / "plain")
    for name in ("by turns 1", "by turns 2"):
        check_like_one_rank(tmp_path / name, tmp_path / "by turns")
    for name in ("in part 2", "in part 3"):
        check_like_one_rank(tmp_path / name, tmp_path / "in part")
    check_like_one_rank(tmp_path / "two sources", tmp_path / "two sources alone")

    start = tiny.model(1, layers=2, width=16, dropout=0.0).model.state_dict()
    for name in ("in part 2", "in part 3"):  # no loss reaches block 2 or the head
        for weight, tensor in start.items():
            moved = not torch.equal(last(tmp_path / name)[f"student.{weight}"], tensor)
            assert moved == (".layer.1." not in weight and "pooler" not in weight and "classifier" not in weight), (name, weight)
    for entry, one in zip(curve(tmp_path / "half"), curve(tmp_path / "half, DDP"), strict=True):
        assert entry["loss"] == pytest.approx(one["loss"], abs=1e-3)
    assert curve(tmp_path / "half")[-1]["loss"] != curve(tmp_path / "stage 2")[-1]["loss"]
    assert {tensor.dtype for tensor in last(tmp_path / "half").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_and_goes_on_under_no_other_engine(
    tiny: ModuleType, taught: Path, untaught: Path, tmp_path: Path
) -> None:
    runs: dict[str, dict[str, Any]] = {}
    for stage in (1, 2, 3):
        run = {**STATEFUL, "zero": {"stage": stage}, "stores": [taught] if stage == 3 else [taught, untaught]}
        copied = tmp_path / f"whole {stage}" / "checkpoints" / "checkpoint-4"
        runs |= {f"whole {stage}": run, f"resumed {stage}": {**run, "copied": str(copied)}}
    runs["refused"] = {**runs["resumed 2"], "zero": {"stage": 1}}
    done = on_two_ranks(tiny, [taught], runs, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count('made with zero {"stage": 2') == 2, done.stderr[-4000:]
    for stage in (1, 2, 3):
        whole, resumed = tmp_path / f"whole {stage}", tmp_path / f"resumed {stage}"
        assert curve(resumed) == curve(whole)[4:]
        files = sorted(path.name for path in (whole / "checkpoints" / "checkpoint-12").iterdir())
        assert {"optimizer_0.pt", "optimizer_1.pt", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"} < set(files)
        for file in ("model.safetensors", "buffers_0.safetensors", "buffers_1.safetensors"):
            for name, tensor in last(whole, file).items():
                assert torch.equal(last(resumed, file)[name], tensor), (stage, file, name)
        assert not torch.equal(last(whole, "buffers_0.safetensors")["bank.bank"], last(whole, "buffers_1.safetensors")["bank.bank"])
