"""Two ranks under torchrun: the losses of one, and exact resumption with state that belongs to each rank."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from student_train import checkpoint
from student_train.journal import read_journal
from student_train.recipe import MethodSpec

METHODS = [
    MethodSpec(name="task_loss"),
    MethodSpec(name="hid_seq", weight=0.5, options={"layers": [[1, 2]]}),
]
PLAIN = {"dropout": 0.0, "bank": False, "batch_rows": 8, "epochs": 1, "steps": None}
RECOMPUTED = {**PLAIN, "trainer": {"gradient_checkpointing": True}}
STATEFUL = {"accumulation": 2, "workers": 1, "trainer": {"save_total_limit": 9}}
CLOCK = ("tokens_per_second", "loader_wait")


def torchrun(tiny: ModuleType, runs: list[dict[str, object]]) -> subprocess.CompletedProcess[str]:
    """Run the script on two ranks, all ``runs`` one after the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), tiny.__file__]
    return subprocess.run([*command, json.dumps(runs)], timeout=200, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_ranks_train_as_one_resume_exactly_and_stop_together(tiny: ModuleType, taught: Path, untaught: Path, tmp_path: Path) -> None:
    stores, methods = [str(taught), str(untaught)], [spec.model_dump() for spec in METHODS]
    runs: dict[str, dict[str, object]] = {
        "plain": PLAIN,
        "accumulated": {**PLAIN, "accumulation": 2},
        "recomputed": RECOMPUTED,
        "whole": STATEFUL,
        "resumed": {**STATEFUL, "copied": str(tmp_path / "whole" / "checkpoints" / "checkpoint-4")},
        "refused": {**STATEFUL, "copied": str(tmp_path / "whole" / "checkpoints" / "checkpoint-8"), "steps": 13},
    }
    done = torchrun(tiny, [{"stores": stores, "methods": methods, "output": str(tmp_path / name), **run} for name, run in runs.items()])
    assert done.returncode != 0
    assert done.stderr.count("was made with steps 12, this run has 13") == 2, done.stderr[-4000:]

    def curve(name: str) -> list[dict[str, float]]:
        entries = read_journal(tmp_path / name / "metrics.jsonl")
        return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in entries]

    # hid_seq's projection gets no gradient in the steps on rows without features
    _, one_rank = tiny.run([taught, untaught], tmp_path / "alone", methods=METHODS, **PLAIN)
    assert len(one_rank.history) == 10
    for name in ("plain", "accumulated", "recomputed"):
        for entry, expected in zip(curve(name), one_rank.history, strict=True):
            assert entry.keys() == expected.keys() - set(CLOCK)
            assert entry == pytest.approx({key: expected[key] for key in entry}, abs=1e-6), (name, entry["step"])

    weights = [checkpoint.load(tmp_path / name / "checkpoints" / "checkpoint-12" / "model.safetensors") for name in ("whole", "resumed")]
    for key, tensor in weights[0].items():
        assert torch.equal(weights[1][key], tensor), key
    assert curve("resumed") == curve("whole")[4:]
    buffers = [
        checkpoint.load(tmp_path / name / "checkpoints" / "checkpoint-12" / f"buffers_{rank}.safetensors")["bank.bank"]
        for name in ("whole", "resumed")
        for rank in range(2)
    ]
    assert not torch.equal(buffers[0], buffers[1])
    assert torch.equal(buffers[0], buffers[2])
    assert torch.equal(buffers[1], buffers[3])
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in (tmp_path / "whole" / "checkpoints" / "checkpoint-4").iterdir()}
