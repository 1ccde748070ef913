"""The same dump started twice at once: both share the work, and the store is that of one."""

import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny_dump import Outcome, Tree, stored_bytes

from store.reader import Store
from teacher_dump.cli import main

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def _dump(recipe: Path, said: Path) -> None:
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    torch.set_num_threads(1)
    main(["run", str(recipe)])


def start(recipe: Path, number: int) -> tuple[BaseProcess, Path]:
    said = recipe.with_suffix(f".{number}")
    process = multiprocessing.get_context("fork").Process(target=_dump, args=(recipe, said))
    process.start()
    return process, said


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_dumps_started_at_once_share_the_work_and_make_the_store_of_one(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path, killed: bool
) -> None:
    recipe = write({**masked_recipe, "batch_tokens": 16})
    whole, store = tmp_path / "whole", Path(masked_recipe["store"])
    assert teacher_dump("run", recipe, f"store={whole}").code == 0
    dumps = [start(recipe, number) for number in range(2)]  # rows, teacher and weights of the store are made at once too
    if killed:
        while any(process.is_alive() for process, _ in dumps) and not (store / "commits" / "1.log").exists():
            time.sleep(0.001)
        process, said = dumps.pop()
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), said.read_text()
    for process, said in dumps:
        process.join()
        assert process.exitcode == 0, said.read_text()
        assert "is complete" in said.read_text()
        assert "Traceback" not in said.read_text()
    assert stored_bytes(store) == stored_bytes(whole)
    assert teacher_dump("verify", store).code == 0
    assert not list(store.rglob("*.tmp"))
    if not killed:
        assert not list((store / "claims" / "bert").iterdir())
        done = [re.findall(r"this run: ([\d,]+) tokens in", said.read_text()) for _, said in dumps]
        tokens = [int(found.replace(",", "")) for of_run in done for found in of_run]  # a run that came late had nothing left to do
        assert sum(tokens) == Store.open(store).manifest.rows.tokens, "no row was answered twice"
