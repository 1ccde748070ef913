"""A dump that is killed, interrupted or out of disk goes on where it was."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny_dump import Outcome, Tree, files_of, stored_bytes

from store.reader import Store
from teacher_dump.cli import main

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]
KILLS = 8


def _dump(recipe: Path, errors: Path, soft_limit: int | None) -> None:
    """In a process of its own: run the program, standard error into a file."""
    sys.stderr = errors.open("w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if soft_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, resource.RLIM_INFINITY))
    main(["run", str(recipe)])


def start(recipe: Path, soft_limit: int | None = None) -> tuple[BaseProcess, Path]:
    errors = recipe.with_suffix(".err")
    process = multiprocessing.get_context("fork").Process(target=_dump, args=(recipe, errors, soft_limit))
    process.start()
    return process, errors


def committed_files(store: Path) -> dict[str, tuple[int, int, bytes]]:
    """Files that a commit line names, as they lie on disk."""
    if not (store / "manifest.json").exists() or "bert" not in Store.open(store).manifest.passes:
        return {}
    found = files_of(store / "bert")
    commits = Store.open(store).committed("bert").values()
    names = {f"{array}/c.{commit.shard}.0" for commit in commits for array in commit.files}
    assert names <= found.keys()
    return {name: found[name] for name in names}


@pytest.mark.slow
def test_a_killed_dump_goes_on_and_ends_as_if_it_had_not_been(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe = write({**masked_recipe, "batch_tokens": 16})
    whole = tmp_path / "whole"
    assert teacher_dump("run", recipe, f"store={whole}").code == 0
    store = Path(masked_recipe["store"])
    draw = random.Random(5)
    kept: dict[str, tuple[int, int, bytes]] = {}
    seen = set()
    log = store / "commits" / "0.log"
    for number in range(KILLS):
        process, _ = start(recipe)
        if number < 3:  # while rows are built, the teacher loads or ships
            time.sleep(draw.uniform(0.02, 0.3))
        else:  # between two commits, or in the middle of one
            length = log.stat().st_size if log.exists() else 0
            while process.is_alive() and (log.stat().st_size if log.exists() else 0) == length:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.01))
        process.kill()
        process.join()
        now = committed_files(store)
        assert {name: now[name] for name in kept} == kept, "what was committed is neither lost nor written again"
        kept = now
        seen.add(len(now))
    assert len(seen) >= 3, "kills land at different moments of the dump"
    assert teacher_dump("run", recipe).code == 0
    now = committed_files(store)
    assert {name: now[name] for name in kept} == kept
    assert stored_bytes(store) == stored_bytes(whole)
    assert teacher_dump("verify", store).code == 0
    assert not list(store.rglob("*.tmp"))


def test_an_interrupted_dump_says_how_to_go_on(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write({**masked_recipe, "batch_tokens": 16})
    store = Path(masked_recipe["store"])
    process, errors = start(recipe)
    while process.is_alive() and not (store / "commits" / "0.log").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130, errors.read_text()
    assert "The same command goes on" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert 0 < len(Store.open(store).committed("bert")) < Store.open(store).manifest.rows.slots
    again = teacher_dump("run", recipe)
    assert again.code == 0
    assert "going on after" in again.err


def test_a_write_that_fails_stops_the_dump_and_harms_nothing(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write({**masked_recipe, "rows": {**masked_recipe["rows"], "slot_tokens": 1024}, "features": ["hidden.*@all"]})
    store = Path(masked_recipe["store"])
    process, errors = start(recipe, soft_limit=60_000)
    process.join()
    assert process.exitcode == 2, errors.read_text()
    message = errors.read_text()
    assert "Traceback" not in message
    assert "File too large" in message
    assert "cannot write" in message
    assert not Store.open(store).committed("bert")
    assert teacher_dump("run", recipe).code == 0
    assert teacher_dump("verify", store).code == 0
