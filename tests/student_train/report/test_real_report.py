"""The report of real tiny runs and of a real tiny sweep."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from store.reader import Store
from store.strict import parse
from student_train.recipe import TrainRecipe
from student_train.report.comparisons import compare
from student_train.report.curves import curves, gradients
from student_train.report.disagreements import disagreements
from student_train.report.drawing import style
from student_train.report.leaderboard import leaderboard
from student_train.report.runs import load
from student_train.run import run

pytestmark = pytest.mark.slow

METRICS = ["accuracy", "agreement", "task_kl"]
METHODS = {"kd": [{"name": "kd"}, {"name": "hid_seq"}], "labels": [{"name": "task_loss"}]}
SEEDS = (0, 1)
TRAINER = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "eval_steps": 3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def trained(sentiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """(Method, seed) -> the folder of its run of one phase ``only``."""
    folder = tmp_path_factory.mktemp("trained")
    data = {"store": str(sentiment), "pass_name": "tiny"}
    found = {}
    for method, specs in METHODS.items():
        for seed in SEEDS:
            phase = {
                "name": "only", "student": {"layers": [2, 4]}, "data": [data], "methods": specs, "evaluate": [{**data, "split": "dev"}],
                "metrics": METRICS, "steps": 6, "batch_rows": 8, "gradient_norms": 2, "trainer": TRAINER,
            }  # fmt: skip
            made = parse(TrainRecipe, {"output": str(folder / f"{method}-{seed}"), "seed": seed, "phases": [phase]}, "recipe")
            run(made, ["student-train", "run", "it"])
            found[method, seed] = made.output
    return found


def after(folder: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((folder / "only" / "result.json").read_text())["after"]
    return scores


def predictions(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "only" / "predictions.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    p, q = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in (teacher.astype(np.float64), student.astype(np.float64)))
    return (p * np.log(p / q)).sum(1)


def test_the_answers_that_are_kept_are_those_that_were_scored(trained: dict[tuple[str, int], Path], sentiment: Path) -> None:
    store = Store.open(sentiment)
    for folder in trained.values():
        found, scores = predictions(folder), after(folder)
        assert set(found["split"]) == {"dev"}
        assert set(found["store"]) == {str(sentiment)}
        assert [store.rows.about(int(row))["split"] for row in found["row"]] == ["dev"] * store.manifest.rows.splits["dev"]
        assert found["label"].tolist() == store.rows.label_at(found["row"]).tolist()
        assert (found["student"].argmax(1) == found["label"]).mean() == pytest.approx(scores["accuracy"], abs=1e-12)
        assert (found["student"].argmax(1) == found["teacher"].argmax(1)).mean() == pytest.approx(scores["agreement"], abs=1e-12)
        assert kl(found["teacher"], found["student"]).mean() == pytest.approx(scores["task_kl"], rel=1e-5)


def test_what_training_took_is_recorded(trained: dict[tuple[str, int], Path], sentiment: Path) -> None:
    costs = {key: json.loads((folder / "only" / "result.json").read_text())["cost"] for key, folder in trained.items()}
    for cost in costs.values():
        assert 0 < cost["seconds"] < 900
        assert cost["memory"] > 100e6  # torch alone takes more
        assert cost["gpu_memory"] is None or cost["gpu_memory"] > 0
    store = Store.open(sentiment)
    rows = [row for row in range(len(store.rows)) if store.rows.about(row)["split"] == "train"][:64]
    tokens = mean(len(store.tokens("input_ids", np.array([row]))) for row in rows)
    bytes_of = {spec.key.partition("/")[2] or spec.key: spec.unit_bytes for spec in store.manifest.passes["tiny"].features}
    # kd reads the logits; hid_seq the hidden states that the student's two blocks are compared with
    expected = bytes_of["task_logits@row"] + tokens * (bytes_of["hidden.2@all"] + bytes_of["hidden.4@all"])
    assert costs["kd", 0]["feature_bytes"] == pytest.approx(expected)
    assert costs["labels", 0]["feature_bytes"] == 0


def test_the_leaderboard_is_of_the_results(trained: dict[tuple[str, int], Path]) -> None:
    runs = load(list(trained.values()), "-task_kl")
    (best,) = (table for table in leaderboard(runs).tables if table.name.startswith("Best"))
    means = {method: mean(after(trained[method, seed])["task_kl"] for seed in SEEDS) for method in METHODS}
    names = {"kd": "kd + hid_seq", "labels": "task_loss"}
    assert [row[0] for row in best.rows] == [names[method] for method in sorted(means, key=lambda method: means[method])]
    assert [row[2].split(" ± ")[0] for row in best.rows] == [f"{value:.4f}" for value in sorted(means.values())]
    assert all("learning_rate 0.003" in row[1] for row in best.rows)
    (pair,) = compare(runs)
    assert (pair.seeds, pair.rows) == (2, len(predictions(trained["kd", 0])["row"]))


def test_rows_that_are_furthest_apart_stand_there_with_their_texts(trained: dict[tuple[str, int], Path], sentiment: Path) -> None:
    section = disagreements(load(list(trained.values())))
    assert section is not None
    table = section.tables[-1]
    of_runs = {folder: predictions(folder) for folder in trained.values()}
    apart = np.mean([kl(found["teacher"], found["student"]) for found in of_runs.values()], axis=0)
    rows = next(iter(of_runs.values()))["row"]
    order = np.argsort(-apart, kind="stable")[: len(table.rows)]
    assert [row[0] for row in table.rows] == [str(number) for number in rows[order]]
    assert [row[-1] for row in table.rows] == [f"{value:.2f}" for value in apart[order]]
    store = Store.open(sentiment)
    tokenizer: Any = AutoTokenizer.from_pretrained(store.shipped("tiny"), local_files_only=True)
    for row, cells in zip(rows[order], table.rows, strict=True):
        assert cells[1] == tokenizer.decode(store.tokens("input_ids", np.array([row])), skip_special_tokens=True)
        assert cells[2] in store.manifest.rows.task.classes

    often = section.tables[0]
    found = [of_runs[trained["labels", seed]] for seed in SEEDS]
    other = [(one["student"].argmax(1) != one["teacher"].argmax(1)).sum() for one in found]
    assert next(row[1] for row in often.rows if row[0] == "task_loss") == f"{np.mean(other):.1f}"


def test_texts_can_be_left_out(trained: dict[tuple[str, int], Path], sentiment: Path) -> None:
    runs, silent = load(list(trained.values())), load(list(trained.values()), texts=False)
    shown, hidden = disagreements(runs), disagreements(silent)
    assert shown is not None
    assert hidden is not None
    (often, with_texts), (same, without) = shown.tables, hidden.tables
    assert often == same
    assert without.header == tuple(name for name in with_texts.header if name != "text")
    assert without.rows == tuple((row[0], *row[2:]) for row in with_texts.rows)
    assert "left out" in " ".join(hidden.text)


def test_every_term_score_and_norm_has_its_panel(trained: dict[tuple[str, int], Path]) -> None:
    runs = load(list(trained.values()))

    def titles(name: str) -> set[str]:
        with style():
            sections = [section for section in (curves(runs), gradients(runs)) if section is not None]
        (figure,) = (picture.figure for section in sections for picture in section.pictures if picture.name == name)
        return {axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()}

    assert titles("curves-terms-0") == {"loss", "kd/soft", "kd/hard", "hid_seq/hidden", "task_loss/hard"}
    assert titles("curves-scores-0") == {*METRICS, "loss"}
    assert titles("gradients-parts-0") == titles("gradients-terms-0") == {"kd + hid_seq", "task_loss"}


def test_the_command_says_where_the_page_is_and_refuses_what_is_no_run(
    trained: dict[tuple[str, int], Path], tmp_path: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = program("report", *trained.values(), "--save", tmp_path / "out")
    assert (code, out.strip()) == (0, str(tmp_path / "out" / "report.html")), err
    assert (tmp_path / "out" / "report.md").is_file()
    code, out, err = program("report", tmp_path, "--save", tmp_path / "other")
    assert code == 2
    assert err.startswith("error: expected the output folder of student-train run or sweep")


@pytest.mark.timeout(900)
def test_a_sweeps_trials_stand_under_the_sweeps_names(tiny_sweep: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    file = tiny_sweep.write_sweep(tmp_path / "sweep", sentiment, seeds=[3], metric="-loss")
    code, _, err = tiny_sweep.ended(tiny_sweep.start(file))
    assert code == 0, err
    runs = load([tmp_path / "sweep" / "out"])
    rows = tiny_sweep.table(tmp_path / "sweep")
    assert (runs.metric, runs.lower) == ("loss", True)
    assert [(run.method, run.seed, run.state, run.score("loss")) for run in runs.all] == [
        (row["parameters"]["method"], row["seed"], "finished", row["score"]) for row in rows
    ]
    assert {run.method for run in runs.all} == {"kd", "labels"}
