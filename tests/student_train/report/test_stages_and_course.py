"""Normalised losses and the course report's curves, from hand-written logs and numbers worked out by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from student_train.report import drawing
from student_train.report.course import course, ratio
from student_train.report.curves import Curve
from student_train.report.gkd_stages import gkd_stages, halfway, normalised
from student_train.report.runs import Phase, Run, Runs


def log(step: int, loss: float, **of: float) -> dict[str, float]:
    return {"loss": loss, "grad_norm": 4 * loss, **of, "step": step, "epoch": step / 10}


def runs(logs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], seeds: int = 1) -> Runs:
    """Finished runs: method -> phase -> logs; another seed's losses are the same."""
    found = []
    for method, phases in logs.items():
        made = tuple(
            Phase(name, Path("nowhere") / name, {}, (method,), tuple(lines), None, {"after": {"accuracy": 0.5}}, None, None)
            for name, lines in phases.items()
        )
        found += [
            Run(f"{method}-{seed}", Path("nowhere"), None, method, {}, seed, "finished", "", 1.0, made, len(made) - 1, method)
            for seed in range(seeds)
        ]
    return Runs(tuple(found), "accuracy", False)


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:  # noqa: ANN401
    """Label -> points, of the lines in a panel."""
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()}


def test_each_loss_is_divided_by_its_own_largest_value() -> None:
    assert normalised(Curve((1, 2, 3), (2.0, 8.0, 4.0))) == Curve((1, 2, 3), (0.25, 1.0, 0.5))
    assert normalised(Curve((1, 2), (-4.0, 1.0))) == Curve((1, 2), (-1.0, 0.25)), "a loss may be below 0"
    assert normalised(Curve((1, 2), (0.0, 0.0))) == Curve((), ())


def test_the_loss_is_half_way_where_it_first_passes_the_middle_after_its_largest_value() -> None:
    assert halfway(Curve((10, 20, 30, 40), (1.0, 0.8, 0.5, 0.2))) == pytest.approx(0.75)  # the middle of 1 and .2 is .6
    assert halfway(Curve((10, 20, 30, 40), (0.1, 1.0, 0.3, 0.2))) == pytest.approx(0.75), "the start lies before the largest value"
    assert halfway(Curve((10, 20), (0.5, 1.0))) == 1.0, "it rises to the end"


def test_stages_have_a_panel_each_over_their_own_share_of_steps() -> None:
    made = runs({"kd": {"first": [log(10, 4.0), log(20, 1.0)], "second": [log(50, 3.0), log(100, 6.0)]}, "pkd": {"second": [log(5, 9.0)]}})
    with drawing.style():
        section = gkd_stages(made)
    assert section is not None
    first, second = (axes for axes in section.pictures[0].figure.axes if axes.get_visible())
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["first", "second"]
    (line,) = lines(first).values()
    assert line == [(0.5, 1.0), (1.0, 0.25)]
    (line,) = lines(second).values()
    assert line == [(0.5, 0.5), (1.0, 1.0)], "pkd has logged once, which is no curve"
    assert section.tables[0].rows == (("kd", "first", "0.250", "100%"), ("kd", "second", "1.000", "100%"))


def test_phases_without_logs_have_neither_section() -> None:
    made = runs({"kd": {"only": []}})
    with drawing.style():
        assert gkd_stages(made) is None
        assert course(made) is None


def test_components_logit_losses_and_gradients_are_drawn_as_they_were_logged() -> None:
    train = [
        log(10, 3.0, **{"kd/soft": 2.0, "pkd/patience": 1.0, "gradient/block.1": 3.0, "gradient/block.2": 2.0, "gradient/kd/soft": 7.0}),
        log(20, 1.0, **{"kd/soft": 0.75, "pkd/patience": 0.25, "gradient/block.1": 1.0, "gradient/block.2": 4.0, "gradient/kd/soft": 7.0}),
    ]
    held_out = [{"eval_kd/soft": 2.5, "eval_loss": 4.0, "step": 20, "epoch": 2.0}]
    plain = [log(10, 1.0, **{"task_loss/hard": 1.0})]
    with drawing.style():
        section = course(runs({"both": {"only": [*train, *held_out]}, "labels": {"only": plain}}))
    assert section is not None
    components, logits, norms = (picture.figure.axes for picture in section.pictures)
    assert [picture.name for picture in section.pictures] == ["course-2", "course-3-4", "course-5"]
    assert lines(components[0]) == {"kd/soft": [(10, 2.0), (20, 0.75)], "pkd/patience": [(10, 1.0), (20, 0.25)]}
    assert lines(components[1]) == {"hard": [(10, 1.0)]}
    assert lines(logits[0]) == {"both (kd/soft)": [(10, 2.0), (20, 0.75)]}
    assert lines(logits[1]) == {"both (kd/soft)": [(20, 2.5)]}
    assert lines(norms[0]) == {"both": [(10, 12.0), (20, 4.0)], "labels": [(10, 4.0)]}
    assert lines(norms[1]) == {"both": [(10, 1.5), (20, 0.25)]}


def test_a_ratio_is_taken_where_both_are_and_the_lower_one_is_not_0() -> None:
    assert ratio(Curve((1, 2, 3), (4.0, 6.0, 1.0)), Curve((2, 3, 4), (3.0, 0.0, 1.0))) == Curve((2,), (2.0,))


def test_without_norms_of_parts_the_caption_says_how_to_measure_them() -> None:
    with drawing.style():
        section = course(runs({"labels": {"only": [log(10, 1.0), log(20, 0.5)]}}))
    assert section is not None
    (norms,) = section.pictures
    assert len(norms.figure.axes) == 1
    assert "gradient_norms" in norms.caption
