"""Curves of hand-written logs: means over seeds, thinned, by phase."""

from collections.abc import Callable
from pathlib import Path

import pytest

from student_train.report.combinations import combinations
from student_train.report.curves import POINTS, SCORED, curve, curves
from student_train.report.drawing import style
from student_train.report.runs import load


def test_a_curve_is_the_mean_over_the_seeds_that_have_a_step(write_run: Callable[..., Path], tmp_path: Path) -> None:
    logs = [
        [{"loss": 4.0, "step": 2}, {"eval_accuracy": 0.6, "step": 3}, {"loss": 2.0, "step": 4}],
        [{"loss": 6.0, "step": 2}, {"eval_accuracy": 0.8, "step": 3}],  # one that was interrupted
    ]
    before = [{"accuracy": 0.5}, {"accuracy": 0.4}]
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, before=before[seed], logs=logs[seed]) for seed in range(2)]
    (one,) = combinations(load(folders))
    loss, accuracy = curve(one, "only", "loss"), curve(one, SCORED, "eval_accuracy")
    assert (loss.steps, loss.values) == ((2, 4), (5.0, 2.0))
    assert accuracy.steps == (0, 3)  # from the untrained students on
    assert accuracy.values == pytest.approx((0.45, 0.7))
    assert curve(one, "another", "loss").steps == ()


def test_a_long_curve_is_thinned_and_keeps_its_ends(write_run: Callable[..., Path], tmp_path: Path) -> None:
    logs = [{"loss": 1.0 / step, "step": step} for step in range(1, 1001)]
    (one,) = combinations(load([write_run(tmp_path / "run", logs=logs)]))
    found = curve(one, "only", "loss")
    assert len(found.steps) <= POINTS + 1
    assert (found.steps[0], found.steps[-1]) == (1, 1000)
    assert found.values == tuple(1.0 / step for step in found.steps)


def test_scored_phases_are_drawn_together_whatever_their_names(write_run: Callable[..., Path], tmp_path: Path) -> None:
    logs = [{"loss": 1.0, "step": step} for step in (2, 4)]
    folders = [write_run(tmp_path / method, methods=[method], after={"accuracy": 0.5}, logs=logs) for method in ("kd", "pkd")]
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: only", "name: other"))
    (folders[1] / "only").rename(folders[1] / "other")
    with style():
        section = curves(load(folders))
    assert section is not None
    (picture,) = section.pictures
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["kd", "pkd"]
