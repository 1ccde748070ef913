"""Sweeps for tests: a training recipe over a store of labelled sentences, and the program in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_steps": 1, "learning_rate": 1e-2}
METHODS = {"kd": {"phases.0.methods": [{"name": "kd"}]}, "labels": {"phases.0.methods": [{"name": "task_loss"}]}}


def write_sweep(folder: Path, store: Path, **changes: object) -> Path:
    """``folder/sweep.yaml``, which tries two methods over the two seeds 3 and 5, and ``folder/train.yaml``, with changes to the sweep."""
    data = {"store": str(store), "pass_name": "tiny"}
    phase = {
        "name": "only", "student": {"layers": [2, 4]}, "data": [data], "methods": [{"name": "kd"}],
        "evaluate": [{**data, "split": "dev"}], "metrics": ["accuracy"], "steps": 12, "batch_rows": 4, "trainer": QUIET,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    write(folder / "train.yaml", {"output": "unused", "phases": [phase]})
    sweep = {
        "recipe": str(folder / "train.yaml"), "output": str(folder / "out"), "search": {"method": METHODS}, "seeds": [3, 5],
        "metric": "-loss", "threads": 1,
    }  # fmt: skip
    write(folder / "sweep.yaml", {**sweep, **changes})
    return folder / "sweep.yaml"


def write(file: Path, tree: Any) -> None:  # noqa: ANN401
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def start(sweep: Path, *arguments: str) -> subprocess.Popen[str]:
    """``student-train sweep`` in a process group of its own."""
    command = [sys.executable, "-m", "student_train.cli", "sweep", str(sweep), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a sweep at its end."""
    out, err = process.communicate(timeout=800)
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a sweep and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "out" / "trials.json").read_text(encoding="utf-8"))
    return rows
