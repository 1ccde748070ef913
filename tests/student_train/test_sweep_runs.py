"""Sweeps at work, in real processes: ranked, killed and gone on with, shared by two workers, with trials that fail."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import pytest
from waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each trial is a process that loads torch

BEGUN = "a student of 2 blocks of width 16 starts as"
"""What a process says that begins or goes on with a phase."""


@pytest.fixture(scope="module")
def whole(tiny_sweep: ModuleType, sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A sweep of four trials, two at once, that ran undisturbed; and what it said."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    code, out, err = tiny_sweep.ended(tiny_sweep.start(tiny_sweep.write_sweep(folder, sentiment, devices=["cpu", "cpu"])))
    assert code == 0, err
    return folder, out, err


def results(folder: Path) -> dict[str, tuple[int, int]]:
    """Trial -> inode and time of change of its result."""
    found = (folder / "out" / "trials").glob("*/only/result.json")
    return {path.parents[1].name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def students(folder: Path) -> dict[str, bytes]:
    found = (folder / "out" / "trials").glob("*/only/student/model.safetensors")
    return {path.parents[2].name: path.read_bytes() for path in found}


def interrupted(folder: Path) -> set[str]:
    """Trials with checkpoints and no result; those of finished ones may be vanishing."""
    open_ones = [run for run in (folder / "out" / "trials").iterdir() if run.name not in results(folder)]
    return {run.name for run in open_ones if any((run / "only" / "checkpoints").glob("checkpoint-*"))}


def begun(folder: Path) -> dict[str, int]:
    """Trial -> how many processes have worked on it."""
    return {log.stem: log.read_text().count(BEGUN) for log in (folder / "out" / "logs").iterdir()}


def test_every_combination_is_trained_with_every_seed_and_ranked(whole: tuple[Path, str, str], tiny_sweep: ModuleType) -> None:
    folder, out, err = whole
    rows = tiny_sweep.table(folder)
    assert [(row["parameters"]["method"], row["seed"], row["state"]) for row in rows] == [
        ("kd", 3, "finished"), ("kd", 5, "finished"), ("labels", 3, "finished"), ("labels", 5, "finished"),
    ]  # fmt: skip
    assert len({student for student in students(folder).values()}) == 4
    assert not list((folder / "out" / "trials").glob("*/only/checkpoints")), "what is finished goes on from nothing"
    for row in rows:
        run = folder / "out" / "trials" / row["trial"]
        result = json.loads((run / "only" / "result.json").read_text())
        assert (row["scores"], row["score"], row["start"]) == (result["after"], result["after"]["loss"], result["start"])
        assert json.loads((run / "only" / "start.json").read_text())["identity"]["seed"] == row["seed"]
        assert (row["device"], row["error"]) == ("cpu", None)
        assert row["seconds"] > 0
        # embeddings 29 x 16, 32 x 16, 2 x 16; 2 blocks: 4 x (16 x 16 + 16), 16 x 24 + 24, 24 x 16 + 16, norms; pooler; 2 classes
        block = 4 * (16 * 16 + 16) + 16 * 24 + 24 + 24 * 16 + 16 + 4 * 16
        assert row["student_parameters"] == (29 + 32 + 2 + 2) * 16 + 2 * block + 16 * 16 + 16 + 2 * 16 + 2

    scores = {method: [row["score"] for row in rows if row["parameters"]["method"] == method] for method in ("kd", "labels")}
    first, second = sorted(scores, key=lambda method: mean(scores[method]))  # of a loss: lower is better
    header, *lines, starts = out.splitlines()
    assert header.split() == ["method", "loss", "seeds", "seconds", "parameters", "start"]
    for place, (line, method) in enumerate(zip(lines, (first, second), strict=True), 1):
        shown = f"{mean(scores[method]):.4f} ± {stdev(scores[method]):.4f}"
        assert line.split()[:2] == [str(place), method]
        assert f"{shown}  2 of 2" in line
    assert starts == "all students of a seed began with the same weights"
    assert "4 trials, of which 0 are finished" in err
    assert err.count("trial ") == 4


def test_what_is_finished_is_not_trained_again_and_a_longer_grid_goes_on(
    whole: tuple[Path, str, str], tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    before = results(folder)
    file = tiny_sweep.write_sweep(folder, sentiment)
    code, out, err = tiny_sweep.ended(tiny_sweep.start(file))
    assert code == 0, err
    assert "4 trials, of which 4 are finished" in err
    assert out == whole[1]

    fewer = "search.method={labels: {phases.0.methods: [{name: task_loss}]}}"
    code, out, err = tiny_sweep.ended(tiny_sweep.start(file, "seeds=[3, 5, 7]", fewer))
    assert code == 0, err
    assert "3 trials, of which 2 are finished" in err
    assert "3 of 3" in out
    after = results(folder)
    assert len(after) == 5
    assert {name: after[name] for name in before} == before


def test_a_killed_sweep_is_ended_by_two_workers_without_doing_anything_twice(
    whole: tuple[Path, str, str], tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    file = tiny_sweep.write_sweep(folder, sentiment)
    process = tiny_sweep.start(file)
    wait_for(lambda: len(results(folder)) == 1, process)
    wait_for(lambda: bool(interrupted(folder)), process)
    tiny_sweep.kill(process)
    assert interrupted(folder)
    before = results(folder)
    assert len(before) == 1

    workers = [tiny_sweep.start(file), tiny_sweep.start(file)]
    ends = [tiny_sweep.ended(worker) for worker in workers]
    assert [code for code, _, _ in ends] == [0, 0], ends
    after = results(folder)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert sorted(begun(folder).values()) == [1, 1, 1, 2]  # twice: the one that was interrupted
    assert "going on from " in "".join(log.read_text() for log in (folder / "out" / "logs").iterdir())
    ended = [sum("seed=" in line for line in err.splitlines()) for _, _, err in ends]
    assert sum(ended) == 3
    assert all(ended)
    assert students(folder) == students(whole[0])
    scored = [(row["trial"], row["scores"]) for row in tiny_sweep.table(folder)]
    assert scored == [(row["trial"], row["scores"]) for row in tiny_sweep.table(whole[0])]


def test_a_sweep_killed_alone_takes_its_trials_along(tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    search = {"phases.0.steps": [4000]}
    process = tiny_sweep.start(tiny_sweep.write_sweep(tmp_path / "alone", sentiment, search=search, seeds=[0]))
    checkpoints = tmp_path / "alone" / "out" / "trials"
    wait_for(lambda: any(checkpoints.rglob("checkpoint-*")), process)
    os.kill(process.pid, signal.SIGKILL)
    tiny_sweep.ended(process)
    nobody_trains(checkpoints)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_told_to_end_ends_its_trials_first(
    number: signal.Signals, expected: int, tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path
) -> None:
    search = {"phases.0.steps": [4000]}
    process = tiny_sweep.start(tiny_sweep.write_sweep(tmp_path / "told", sentiment, search=search, seeds=[0]))
    checkpoints = tmp_path / "told" / "out" / "trials"
    wait_for(lambda: any(checkpoints.rglob("checkpoint-*")), process)
    process.send_signal(number)
    code, _, err = tiny_sweep.ended(process)
    assert code == expected
    assert "Traceback" not in err
    assert not list((tmp_path / "told" / "out" / "ended").iterdir())  # it has not failed
    nobody_trains(checkpoints)


def nobody_trains(runs: Path) -> None:
    time.sleep(1)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    time.sleep(1)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    wild = {"phases.0.trainer.learning_rate": 1e30, "phases.0.trainer.max_grad_norm": 0}
    search = {"rate": {"wild": wild, "tame": {"phases.0.trainer.learning_rate": 1e-3}}}
    file = tiny_sweep.write_sweep(tmp_path / "failing", sentiment, search=search, seeds=[0])
    code, out, err = tiny_sweep.ended(tiny_sweep.start(file))
    assert code == 1
    assert "Traceback" not in err
    failed, finished = tiny_sweep.table(tmp_path / "failing")
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert (failed["score"], failed["start"]) == (None, None)
    assert failed["error"].startswith("error: step ")
    assert "the loss term kd/" in failed["error"]
    assert "trial 1 of 2: rate=wild seed=0: failed: error: step " in err
    lines = out.splitlines()
    assert lines[1].split()[:2] == ["1", "tame"]
    assert lines[2].split()[:3] == ["2", "wild", "failed"]
    assert lines[-1].startswith("1 of 2 trials failed: see trials.json and logs/ in ")

    assert tiny_sweep.ended(tiny_sweep.start(file))[0] == 1  # nothing is trained
    assert set(begun(tmp_path / "failing").values()) == {1}
    assert tiny_sweep.ended(tiny_sweep.start(file, "--retry"))[0] == 1
    assert sorted(begun(tmp_path / "failing").values()) == [1, 2]
