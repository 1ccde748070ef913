"""SIGTERM: a dump finishes what it can in the time it is given, and the next one goes on."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from launching import committed_bytes
from tiny_dump import Outcome, Tree, stored_bytes

from store.reader import Store
from store.verify import verify
from teacher_dump.stopping import Stopped, Stopping

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def test_before_its_steps_a_signal_stops_a_run_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="The same command goes on"), Stopping(grace=20):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_between_its_steps_a_signal_gives_time_and_a_second_one_takes_it() -> None:
    with Stopping(grace=20) as stopping:
        stopping.take_note()
        assert not stopping.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked
        assert not stopping.overdue
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.overdue


def test_time_runs_out() -> None:
    with Stopping(grace=0.05) as stopping:
        stopping.take_note()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stopping.overdue
        time.sleep(0.06)
        assert stopping.overdue


@pytest.mark.parametrize("kind", ["none", "fsdp"])
@pytest.mark.parametrize("grace", [20, 0])
def test_a_stopped_dump_keeps_whole_shards_and_goes_on(
    kind: str, grace: int, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    """Each rank of a sharded teacher is told at another moment; they stop together all the same."""
    recipe, store = write({**masked_recipe, "batch_tokens": 16}), Path(masked_recipe["store"])
    ranks = 1 if kind == "none" else 2
    sharding = [] if kind == "none" else ["sharding.kind=fsdp", "sharding.size=2"]
    job = jobs.start(recipe, ranks, tmp_path / "said", [f"--grace={grace}", *sharding], replica=ranks)
    assert jobs.until(lambda: committed_bytes(store) > 0 or not job.alive)
    for rank in job.alive:
        os.kill(rank.pid, signal.SIGTERM)
        time.sleep(0.02)
    assert job.codes() == [143] * ranks, job.said()
    slots, committed = Store.open(store).manifest.rows.slots, len(Store.open(store).committed("bert"))
    assert 0 < committed < slots
    said = [re.search(rf"(\d+) of {slots} shards of pass bert are committed", rank.text) for rank in job.ranks]
    assert max(int(found[1]) for found in said if found) == committed, "as the last of them knows it"
    for rank in job.ranks:
        assert rank.text.count("stopped by SIGTERM") == 1
        assert "Traceback" not in rank.text
    assert not list((store / "claims" / "bert").iterdir()), "nobody need wait for claims to run out"
    assert not list(store.rglob("*.tmp"))
    assert not verify(store)
    again = teacher_dump("run", recipe)
    assert again.code == 0
    assert f"going on after {committed} committed shards" in again.err
    if kind == "none":
        whole = tmp_path / "whole"
        assert teacher_dump("run", recipe, f"store={whole}").code == 0
        assert stored_bytes(store) == stored_bytes(whole)


def test_a_dump_that_is_told_to_stop_before_it_begins_says_so(masked_recipe: Tree, write: Write, tmp_path: Path) -> None:
    recipe = write(masked_recipe)
    job = jobs.start(recipe, 1, tmp_path / "said")
    assert jobs.until(lambda: Path(masked_recipe["store"]).exists() or not job.alive)
    os.kill(job.ranks[0].pid, signal.SIGTERM)
    assert job.codes() == [143], job.said()
    assert "what is committed is kept" in job.said() or "shards of pass bert are committed" in job.said()
    assert "Traceback" not in job.said()
