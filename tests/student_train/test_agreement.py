"""Ranks that are about to do different things say so, all of them, instead of waiting for each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from store.strict import parse
from student_train.output import recipe_yaml
from student_train.recipe import TrainRecipe

TRAIN = """
import os, sys
import numpy as np
from student_train.cli import main
from student_train.moment import Moment

if os.environ["RANK"] == "1" and sys.argv[1] == "draws":  # as another version of a library would
    Moment.draws = lambda moment, purpose, number: np.random.Generator(np.random.PCG64(number + 1))
main(["run", sys.argv[2 + int(os.environ["RANK"])]])
"""


@pytest.fixture(scope="module")
def folder(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("agreement")
    stores.write_store(made, "classification", ["task_logits@row"])
    return made


def recipe(folder: Path, output: Path, rate: float) -> str:
    phase: dict[str, Any] = {
        "name": "only", "teacher": {"online": {"model": str(folder / "teacher"), "head": "classification"}}, "student": {"layers": [1, 2]},
        "data": [{"store": str(folder / "store")}], "methods": [{"name": "theseus", "options": {"rate": rate}}], "steps": 30,
        "batch_rows": 8, "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "ddp_timeout": 60},
    }  # fmt: skip
    return recipe_yaml(parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "rates", "said"),
    [
        ("draws", (0.5, 0.5), "a method drew different things on different ranks"),
        ("recipes", (0.5, 0.6), "the ranks of this launch train different runs"),
    ],
)
def test_ranks_that_disagree_all_stop_with_the_reason(
    what: str, rates: tuple[float, float], said: str, folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    files = [tmp_path / f"{rank}.yaml" for rank in range(2)]
    for file, rate in zip(files, rates, strict=True):
        file.write_text(recipe(folder, tmp_path / "out", rate))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), str(script), what]
    done = subprocess.run(
        [*command, *map(str, files)],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode != 0
    for rank in range(2):
        assert f"{said} (this is rank {rank})" in done.stderr, done.stderr[-3000:]
    ours = [line for line in done.stderr.splitlines() if "student_train" in line and line.startswith("  File")]
    assert not ours  # no traceback of ours
    assert not list((tmp_path / "out" / "only" / "checkpoints").glob("checkpoint-*"))
