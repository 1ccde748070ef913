"""One method on real data, as in the README's table but with 500 rows: the real teacher, the two programs, no teacher while training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from store.reader import Store

ROOT = Path(__file__).parents[1]


def run(folder: Path, program: str, *arguments: str) -> None:
    """One of the two programs in a process of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"{program}.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_five_hundred_sentences_teach_a_student_of_half_the_depth(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "teachers").symlink_to(shared / "teachers")
    recipes = ROOT / "recipes" / "sst2"
    run(tmp_path, "teacher_dump", "run", str(recipes / "dump.yaml"), "rows.sources.0.limit=500", "rows.sources.1.limit=300")
    (tmp_path / "teachers").unlink()

    run(tmp_path, "student_train", "run", str(recipes / "train.yaml"), "--phase", "kd", "phases.1.epochs=3", "phases.1.trainer.warmup_steps=5")

    result = json.loads((tmp_path / "out/sst2/students/kd/result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["agreement"] > before["agreement"] + 0.1
    assert after["accuracy"] > 0.72
    store = Store.open(tmp_path / "out/sst2/features")
    assert store.complete("sst2")
    assert store.manifest.rows.splits == {"train": 500, "dev": 300}
