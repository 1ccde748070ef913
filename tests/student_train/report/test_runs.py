"""What is read of runs and sweeps, finished and not."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from student_train.report.answers import read_answers
from student_train.report.combinations import best_of_methods, combinations, hyperparameters
from student_train.report.runs import load


def test_runs_of_one_recipe_with_other_seeds_are_one_combination(write_run: Callable[..., Path], tmp_path: Path) -> None:
    scores = [0.80, 0.86, 0.83]
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, after={"accuracy": score}) for seed, score in enumerate(scores)]
    other = write_run(tmp_path / "other", methods=["kd", "pkd"], after={"accuracy": 0.7})
    runs = load([*folders, other])
    first, second = combinations(runs)
    assert (first.method, first.scores) == ("kd", dict(enumerate(scores)))
    assert first.mean == pytest.approx(mean(scores))
    assert first.std == pytest.approx(stdev(scores))
    assert (second.method, second.mean, second.std) == ("kd + pkd", 0.7, None)


def test_the_best_combination_of_a_method_is_the_one_with_the_best_mean(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", {"kd": [0.8, 0.9], "pkd": [0.7, 0.75]})
    rows = json.loads((folder / "trials.json").read_text())
    for row in rows:
        row["parameters"]["phases.0.trainer.learning_rate"] = 1e-4 if row["seed"] else 5e-5
    (folder / "trials.json").write_text(json.dumps(rows))
    best = best_of_methods(load([folder]))
    assert [(one.method, one.mean, hyperparameters(one)) for one in best] == [
        ("kd", 0.9, "learning_rate 0.0001"),
        ("pkd", 0.75, "learning_rate 0.0001"),
    ]


def test_a_combination_with_fewer_finished_seeds_does_not_stand_for_its_method(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, after={"accuracy": 0.8}) for seed in range(2)]
    lucky = write_run(tmp_path / "lucky", after={"accuracy": 0.9})
    recipe = lucky / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch_rows: 8", "batch_rows: 16"))
    runs = load([*folders, lucky])
    assert [one.mean for one in combinations(runs)] == [0.9, pytest.approx(0.8)]
    assert [one.mean for one in best_of_methods(runs)] == [pytest.approx(0.8)]


def test_unfinished_runs_and_trials_are_read_as_far_as_they_have_come(
    write_run: Callable[..., Path], write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    begun = write_run(tmp_path / "begun", before={"accuracy": 0.5}, logs=[{"loss": 2.0, "step": 2}])
    journal = begun / "only" / "metrics.jsonl"
    journal.write_text(journal.read_text() + '{"loss": 1.')  # as a killed process leaves it
    sweep = write_sweep(tmp_path / "sweep", {"kd": [0.8, None]})
    rows = json.loads((sweep / "trials.json").read_text())
    rows.append({"trial": "never begun", "parameters": {"method": "kd"}, "seed": 7, "state": "failed", "error": "error: no\nmore"})
    (sweep / "trials.json").write_text(json.dumps(rows))
    runs = load([begun, sweep])
    assert [run.state for run in runs.all] == ["open", "finished", "open", "failed"]
    assert [run.score("accuracy") for run in runs.all] == [None, 0.8, None, None]
    assert runs.all[0].phases[0].logs == ({"loss": 2.0, "step": 2},)
    assert runs.all[3].phases == ()
    assert [run.seed for run in runs.finished] == [0]


@pytest.mark.parametrize(
    ("metric", "said", "lower"),
    [("accuracy", None, False), ("-agreement", None, True), ("accuracy", "-agreement", True), ("loss", None, True)],
)
def test_the_metric_is_the_one_that_is_said_or_the_sweeps(
    write_sweep: Callable[..., Path], tmp_path: Path, metric: str, said: str | None, lower: bool
) -> None:
    folder = write_sweep(tmp_path / "sweep", {"kd": [0.8]}, metric=metric)
    result = folder / "trials" / "method=kd-seed=0" / "only" / "result.json"
    result.write_text(json.dumps({"after": {"accuracy": 0.8, "agreement": 0.5, "loss": 1.0}}))
    runs = load([folder], said)
    assert (runs.metric, runs.lower) == ((said or metric).removeprefix("-"), lower)


def test_a_metric_that_no_run_has_measured_is_refused(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", after={"accuracy": 0.8, "loss": 1.0})
    with pytest.raises(ValueError, match=r"none of the runs has measured 'acuracy'.*accuracy"):
        load([folder], "acuracy")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output folder of student-train run or sweep"):
        load([tmp_path])


@pytest.mark.parametrize("name", ["result.json", "start.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(write_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", before={"accuracy": 0.5}, after={"accuracy": 0.8})
    (folder / "only" / name).write_text("{no json}\n")
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        load([folder])


def test_a_file_that_holds_something_else_is_named(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", after={"accuracy": 0.8})
    (folder / "only" / "result.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"result.json is damaged: expected an object"):
        load([folder])


def test_a_damaged_table_of_trials_is_named(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", {"kd": [0.8]})
    (folder / "trials.json").write_text("[{")
    with pytest.raises(ValueError, match=r"trials.json is damaged"):
        load([folder])


def test_a_table_or_answers_that_lack_something_are_named(
    write_run: Callable[..., Path], write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_sweep(tmp_path / "sweep", {"kd": [0.8]})
    (folder / "trials.json").write_text('[{"trial": "a"}]')
    with pytest.raises(ValueError, match=r"trials.json is damaged: a trial in it has no 'parameters'"):
        load([folder])
    run = write_run(tmp_path / "run", after={"accuracy": 0.8})
    pq.write_table(pa.table({"row": [1]}), run / "only" / "predictions.parquet")
    with pytest.raises(ValueError, match=r"predictions.parquet is damaged: it has no label, split"):
        read_answers(load([run]).all[0].phases[0])
    (run / "only" / "predictions.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match=r"predictions.parquet is damaged"):
        read_answers(load([run]).all[0].phases[0])
    (run / "recipe.yaml").write_text("phases: [{methods: []}]")
    with pytest.raises(ValueError, match=r"recipe.yaml is damaged: a phase in it has no 'name'"):
        load([run])
    (run / "recipe.yaml").write_text("seed: 0")
    with pytest.raises(ValueError, match=r"recipe.yaml is damaged: expected phases"):
        load([run])


def test_a_sweep_of_which_no_trial_has_ended_says_so(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("metric: accuracy\n")
    with pytest.raises(ValueError, match=r"no trial .* has ended yet"):
        load([tmp_path])
