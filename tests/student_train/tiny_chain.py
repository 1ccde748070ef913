"""A chain for tests: teacher of 4 blocks, assistant of 3, student of 2, in a folder that its steps are started in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STUDENT = "out/student/student/model.safetensors"
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_steps": 1}


def write_chain(folder: Path, stores: ModuleType) -> Path:
    """``folder`` with teacher, texts and the recipes dump.yaml, train.yaml (phases of 8 steps) and chain.yaml."""
    folder.mkdir(parents=True)
    stores.write_text(folder, rows=24)
    stores.write_teacher(folder / "teacher", "classification")
    sources = [{"files": [f"{split}.jsonl"], "split": split} for split in ("train", "dev")]
    label = {"column": "label", "classes": ["negative", "positive"]}
    dump = {
        "store": "features", "pass_name": "teacher", "teacher": {"model": "teacher", "head": "classification"},
        "rows": {"sources": sources, "max_length": 16, "slot_tokens": 128, "label": label},
        "features": ["task_logits@row"], "ship_layers": [1, 2, 4], "device": "cpu", "batch_tokens": 128,
    }  # fmt: skip
    common = {"methods": [{"name": "kd"}], "steps": 8, "batch_rows": 8, "trainer": QUIET}
    phases = [
        {"name": "assistant", "student": {"layers": [1, 2, 4]}, "data": [{"store": "features", "pass_name": "teacher"}], **common},
        {"name": "student", "student": {"layers": [1, 3]}, "data": [{"store": "features", "pass_name": "assistant"}], **common},
    ]
    assistant = ["pass_name=assistant", "teacher.model=out/assistant/student", "ship_layers=[1, 3]"]
    chain = [
        {"dump": "dump.yaml"},
        {"train": "train.yaml", "phase": "assistant"},
        {"dump": "dump.yaml", "set": assistant},
        {"train": "train.yaml", "phase": "student"},
    ]
    write(folder / "dump.yaml", dump)
    write(folder / "train.yaml", {"output": "out", "phases": phases})
    write(folder / "chain.yaml", {"steps": chain})
    return folder


def write(file: Path, tree: Any) -> None:  # noqa: ANN401
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """``student-train chain`` with ``arguments`` in ``folder``, in a process of its own."""
    command = [sys.executable, "-m", "student_train.cli", "chain", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error of a chain at its end."""
    _, said = process.communicate(timeout=800)
    return process.returncode, said


def environment() -> dict[str, str]:
    """Where a shell finds both programs, as they are in this checkout."""
    scripts = str(Path(sys.executable).parent)
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{scripts}:{os.environ['PATH']}"}


def copied(made: Path, folder: Path) -> Path:
    """The recipes, texts and teacher of ``made`` in another folder, without what came of them."""
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("features*", "out"))
    return folder
