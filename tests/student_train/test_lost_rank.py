"""A rank that dies or hangs: the others end with one line that says what to do, and the same command goes on as if nothing had happened."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from two_ranks import launched

from student_train import checkpoint
from student_train.journal import read_journal

SCRIPT = str(Path(__file__).with_name("tiny_lost.py"))
SPEED = ("tokens_per_second", "loader_wait")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def written(folder: Path, store: Path, **phase: object) -> Path:
    """The recipe of a run into ``folder``."""
    trainer = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "save_steps": 4, "ddp_timeout": 40}
    plan = {
        "name": "phase",
        "student": {"layers": [2, 4]},
        "data": [{"store": str(store), "pass_name": "tiny"}],
        "methods": [{"name": "kd"}, {"name": "hid_seq"}],
        "steps": 16,
        "batch_rows": 8,
        "trainer": trainer,
        **phase,
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"output": str(folder), "phases": [plan]}), encoding="utf-8")
    return file


def command(folder: Path, recipe: Path, kind: str) -> list[str]:
    return [SCRIPT, kind, str(folder / "phase" / "checkpoints" / "checkpoint-4" / "complete.json"), "run", str(recipe)]


def launch(folder: Path, recipe: Path, kind: str = "none") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command(folder, recipe, kind)], timeout=250, capture_output=True, text=True, check=False, env=environment
    )


def advice(text: str) -> list[str]:
    """What the program itself says was wrong."""
    assert "student_train/trainer.py" not in text, text  # no traceback of ours
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("zero", [None, {"stage": 2}])
def test_a_killed_rank_ends_the_job_with_one_line_and_the_same_command_goes_on_exactly(
    zero: dict[str, int] | None, sentiment: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipes = {folder: written(folder, sentiment, zero=zero) for folder in (whole, cut)}
    done = launched("-m", "student_train.cli", "run", str(recipes[whole]))
    assert done.returncode == 0, done.stderr[-4000:]

    done = launch(cut, recipes[cut], "SIGKILL")
    assert done.returncode != 0
    (line,) = advice(done.stderr)
    assert "start the same command again" in line
    assert not (cut / "phase" / "student").exists()
    again = launch(cut, recipes[cut])
    assert again.returncode == 0, again.stderr[-4000:]

    curves = [
        [{key: value for key, value in entry.items() if key not in SPEED} for entry in read_journal(folder / "phase" / "metrics.jsonl")]
        for folder in (whole, cut)
    ]
    assert curves[0] == curves[1]
    weights = [checkpoint.load(folder / "phase" / "student" / "model.safetensors") for folder in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_silent_rank_is_given_up_after_ddp_timeout(sentiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    recipe = written(folder, sentiment, zero={"stage": 2})
    port, ranks = free_port(), []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        }  # fmt: skip
        arguments = [sys.executable, *command(folder, recipe, "SIGSTOP")]
        ranks.append(subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    try:
        _, text = ranks[0].communicate(timeout=200)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
        ranks[1].communicate()
    assert ranks[0].returncode == 2, text
    (line,) = advice(text)
    assert "does not answer" in line
    assert "start the same command again" in line
