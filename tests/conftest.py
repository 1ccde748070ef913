"""What every test needs: no network, one thread, a fixed seed, and the shared data where there is some."""

import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it takes a third of a second each time that garbage is collected."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # tests of the store do without it
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real teachers and texts: ``../shared`` beside the checkout, or $TEACHERCACHE_SHARED."""
    folder = Path(os.environ.get("TEACHERCACHE_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "teachers").is_dir():
        pytest.skip(f"no shared data at {folder}; set TEACHERCACHE_SHARED")
    return folder


@pytest.fixture(scope="session")
def run_program() -> Callable[..., str]:
    """``run_program(folder, "teacher_dump", "run", RECIPE, ...)``: one of the two programs in a process of its own; what it prints."""

    def run(folder: Path, package: str, *arguments: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", f"{package}.cli", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def beside_shared(shared: Path, tmp_path: Path) -> Path:
    """A folder where the shipped recipes for real data find ``data/`` and ``teachers/``."""
    for name in ("data", "teachers"):
        (tmp_path / name).symlink_to(shared / name)
    return tmp_path


@pytest.fixture
def tiny_teachers(shared: Path, tmp_path: Path) -> Callable[..., Path]:
    """``tiny_teachers(6, sst2="classification")``: a folder with the shared data/, the recipes/ and, below teachers/, random models of
    those names and heads: of width 48, with so many blocks and the shared teachers' tokenizer."""

    def write(layers: int, **heads: str) -> Path:
        from transformers import AutoConfig, AutoTokenizer

        from online.models import HEADS

        (tmp_path / "data").symlink_to(shared / "data")
        (tmp_path / "recipes").symlink_to(Path(__file__).parents[1] / "recipes")
        real = shared / "teachers" / "mlm"
        for name, head in heads.items():
            sizes = {"num_hidden_layers": layers, "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 96}
            config = AutoConfig.from_pretrained(real, **sizes)
            folder = tmp_path / "teachers" / name.replace("_", "-")
            HEADS[head].from_config(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(real).save_pretrained(folder)
        return tmp_path

    return write
