"""A sweep with a pruner and a database at work, in real processes."""

import json
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each trial is a process that loads torch

RATE = "phases.0.trainer.learning_rate"


def test_a_hopeless_combination_is_given_up_and_the_sweep_ends(tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    often = {"phases.0.trainer.eval_steps": 4, "phases.0.trainer.save_steps": 1000}
    search = {"rate": {"good": {RATE: 1e-2, **often}, "hopeless": {RATE: 1.0, "phases.0.steps": 100_000, **often}}}
    storage = f"sqlite:///{folder / 'study.db'}"
    file = tiny_sweep.write_sweep(folder, sentiment, search=search, pruner={"name": "median", "startup": 1}, storage=storage)
    code, out, err = tiny_sweep.ended(tiny_sweep.start(file))
    assert code == 0, err
    assert "Traceback" not in err
    rows = tiny_sweep.table(folder)
    assert [(row["parameters"]["rate"], row["seed"], row["state"]) for row in rows] == [
        ("good", 3, "finished"), ("good", 5, "finished"), ("hopeless", 3, "pruned"), ("hopeless", 5, "pruned"),
    ]  # fmt: skip
    curves = {}
    for row in rows[:3]:
        lines = (folder / "out" / "trials" / row["trial"] / "only" / "metrics.jsonl").read_text().splitlines()
        curves[row["trial"]] = {entry["step"]: entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry}
    good, hopeless = curves[rows[0]["trial"]], curves[rows[2]["trial"]]
    assert list(good) == [4, 8, 12]
    step = rows[2]["pruned"]
    assert step in good
    assert min(score for at, score in hopeless.items() if at <= step) > good[step]
    assert all(min(score for at, score in hopeless.items() if at <= earlier) <= good[earlier] for earlier in good if earlier < step)
    assert (rows[2]["best"], rows[2]["score"], rows[2]["scores"], rows[2]["error"]) == (min(hopeless.values()), None, {}, None)
    assert (rows[3]["pruned"], rows[3]["best"], rows[3]["seconds"]) == (step, None, None)  # it was not begun
    assert not (folder / "out" / "logs" / f"{rows[3]['trial']}.log").exists()
    assert f"rate=hopeless seed=3: pruned at step {step}, loss " in err
    assert out.splitlines()[2].split()[:5] == ["2", "hopeless", f"{min(hopeless.values()):.4f},", "pruned", "at"]
    assert "0 of 2" in out.splitlines()[2]
    assert not (folder / "out" / "study.log").exists()

    code, again, err = tiny_sweep.ended(tiny_sweep.start(file))  # nothing is left to do
    assert (code, again) == (0, out)
    assert "4 trials, of which 2 are finished" in err
    assert "seed=" not in err
