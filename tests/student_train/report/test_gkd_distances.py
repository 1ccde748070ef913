"""Coefficients of hand-made probes: expected values are SciPy's, or those of relations that are monotone by construction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from scipy import stats

from student_train.report import drawing
from student_train.report.checkpoints import Checkpoints, Distance, probed
from student_train.report.correlation import by_chance, coefficient, mean_coefficient
from student_train.report.gkd_distances import ROWS, Target, cells, gkd_distances, pooled
from student_train.report.heat_map import printed
from student_train.report.runs import Phase, Run, Runs
from student_train.report.tables import tables

LOSS = Target("training loss", lambda one: one.loss)
STEPS = (10, 20, 30, 40, 50)
LOSSES = (5.0, 3.0, 4.0, 2.0, 1.0)


def row(step: int, kind: str, name: str, value: float, **of: object) -> dict[str, Any]:
    columns = dict.fromkeys(("distance", "student_layer", "teacher_layer", "temperature"))
    return {"step": step, "kind": kind, "name": name, **columns, **of, "value": value}


def probe(
    distances: Mapping[str, Sequence[float]], losses: Sequence[float] = LOSSES, accuracy: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """``hidden.1-2`` and the like at STEPS; step 0 has distances and no loss."""
    rows = []
    for name, values in distances.items():
        kind, layers = name.split(".")
        student, teacher = (int(layer) for layer in layers.split("-"))
        of = {"distance": kind, "student_layer": student, "teacher_layer": teacher}
        rows += [row(step, "distance", name, value, **of) for step, value in zip((0, *STEPS), (99.0, *values), strict=True)]
    rows += [row(step, "loss", "loss", value) for step, value in zip(STEPS, losses, strict=True)]
    return rows + [row(step, "score", "eval_accuracy", value) for step, value in zip(STEPS, accuracy, strict=False)]


def runs(folder: Path, probes: Mapping[str, list[dict[str, Any]]], before: dict[str, float] | None = None) -> Runs:
    """A run for each of ``probes``, whose name is that of its method."""
    found = []
    for seed, (name, rows) in enumerate(probes.items()):
        own = folder / name / "only"
        own.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), own / "probe.parquet")
        phase = Phase("only", own, {}, (name,), (), before, None, own / "probe.parquet", None)
        found.append(Run(name, own.parent, None, name, {}, seed, "open", "", None, (phase,), 0, name))
    return Runs(tuple(found), "accuracy", False)


def of_hidden(found: Sequence[Checkpoints], name: str = "Spearman") -> float | None:
    return cells(name, found, LOSS, ROWS)["hidden", "1·2"]


def test_a_distance_that_rises_with_the_loss_has_1_and_one_that_falls_has_minus_1(tmp_path: Path) -> None:
    rising, falling = [math.exp(value) for value in LOSSES], [-(value**3) for value in LOSSES]
    found = probed(runs(tmp_path, {"one": probe({"hidden.1-2": rising, "value.1-2": falling, "value_relation.3-6": falling})}))
    made = cells("Spearman", found, LOSS, ROWS)
    assert made == {
        ("hidden", "1·2"): pytest.approx(1),
        ("value", "1·2"): pytest.approx(-1),
        ("value, pair-wise", "3·6"): pytest.approx(-1),
    }
    assert abs(cells("Pearson", found, LOSS, ROWS)["hidden", "1·2"] or 1) < 0.95  # monotone, yet no line


@pytest.mark.parametrize("name", ["Spearman", "Pearson"])
def test_a_coefficient_is_that_of_scipy_over_the_steps_that_both_have(name: str, tmp_path: Path) -> None:
    values = [2.0, 2.5, 0.5, 0.7, 0.1]
    found = probed(runs(tmp_path, {"one": probe({"hidden.1-2": values})}))
    expected = {"Spearman": stats.spearmanr, "Pearson": stats.pearsonr}[name](values, LOSSES).statistic
    assert of_hidden(found, name) == pytest.approx(expected, abs=1e-12)
    gone = [*values[:4], math.nan]
    found = probed(runs(tmp_path / "gone", {"one": probe({"hidden.1-2": gone})}))
    expected = {"Spearman": stats.spearmanr, "Pearson": stats.pearsonr}[name](values[:4], LOSSES[:4]).statistic
    assert of_hidden(found, name) == pytest.approx(expected, abs=1e-12)


def test_the_coefficient_of_several_runs_is_the_mean_of_theirs_and_not_that_of_their_values_together(tmp_path: Path) -> None:
    far = probe({"hidden.1-2": [value + 100 for value in LOSSES]}, [value - 50 for value in LOSSES])
    found = probed(runs(tmp_path, {"near": probe({"hidden.1-2": LOSSES}), "far": far}))
    assert of_hidden(found) == pytest.approx(1)
    pairs = [(one.distances[Distance("hidden.1-2", "hidden", 1, 2, None)], one.loss) for one in found]
    together = stats.spearmanr([*LOSSES, *(value + 100 for value in LOSSES)], [*LOSSES, *(value - 50 for value in LOSSES)]).statistic
    assert together < 0
    assert coefficient("Spearman", *pooled(pairs)) == pytest.approx(together, abs=1e-12)


def test_what_never_changed_has_no_coefficient_and_its_cell_says_so(tmp_path: Path) -> None:
    third = [1 / 3 * (1 + 1e-16 * number) for number in range(5)]
    made = runs(tmp_path, {"one": probe({"hidden.1-2": third, "key.1-2": [0.0] * 5, "query.1-2": LOSSES})})
    made_cells = cells("Spearman", probed(made), LOSS, ROWS)
    assert (made_cells["hidden", "1·2"], made_cells["key", "1·2"]) == (None, None)
    with drawing.style():
        section = gkd_distances(made)
    assert section is not None
    texts = [text.get_text() for text in section.pictures[0].figure.axes[0].texts]
    assert sorted(texts) == ["1", "–", "–"]


def test_three_checkpoints_are_too_few_and_the_text_says_how_to_get_more(tmp_path: Path) -> None:
    assert coefficient("Pearson", {1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.0, 2: 2.0, 3: 3.0}) is None
    few = [line for line in probe({"hidden.1-2": LOSSES}) if line["step"] in (0, 10, 20)]
    with drawing.style():
        section = gkd_distances(runs(tmp_path, {"short": few}))
    assert section is not None
    assert not section.pictures
    assert "short (only): 3" in section.text[-1]
    assert "probe.every" in section.text[-1]


def test_the_score_is_the_perplexity_where_there_is_one_and_step_0_counts_with_the_scores_before_training(tmp_path: Path) -> None:
    rows = probe({"hidden.1-2": LOSSES}, accuracy=[0.5, 0.7, 0.6, 0.8, 0.9])
    (one,) = probed(runs(tmp_path, {"one": rows}, before={"accuracy": 0.4}))
    assert one.held_out("accuracy") == "accuracy"
    accuracy = Target("held-out accuracy", lambda other: other.scores["accuracy"])
    expected = stats.spearmanr([99.0, *LOSSES], [0.4, 0.5, 0.7, 0.6, 0.8, 0.9]).statistic
    assert cells("Spearman", [one], accuracy, ROWS)["hidden", "1·2"] == pytest.approx(expected, abs=1e-12)
    rows += [row(step, "score", "eval_dev/perplexity", 1.0 / step) for step in STEPS]
    (other,) = probed(runs(tmp_path / "words", {"one": rows}))
    assert other.held_out("accuracy") == "dev/perplexity"


def test_maps_have_a_row_for_each_kind_and_a_column_for_each_layer_and_temperature(tmp_path: Path) -> None:
    rows = probe({"hidden.1-2": LOSSES, "hidden.2-4": LOSSES, "query_relation.2-4": LOSSES}, accuracy=LOSSES)
    for step in STEPS:
        rows.append(row(step, "distance", "embedding", float(step), distance="embedding"))
        rows += [row(step, "distance", f"soft.T{t}", float(step), distance="soft", temperature=float(t)) for t in (1, 5, 20)]
    with drawing.style():
        section = gkd_distances(runs(tmp_path, {"kd": rows, "pkd": rows}))
    assert section is not None
    assert [picture.name for picture in section.pictures] == ["gkd-4", "gkd-5", "gkd-4-methods"]
    upper, right, lower = section.pictures[0].figure.axes[:3]
    assert [tick.get_text() for tick in upper.get_yticklabels()] == ["embedding", "hidden", "query, pair-wise"]
    assert [tick.get_text() for tick in upper.get_xticklabels()] == ["0", "1·2", "2·4"]
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["T=1", "T=5", "T=20"]
    assert [axes.get_title(loc="left") for axes in (upper, right)] == ["Spearman, training loss", "Spearman, held-out accuracy"]
    methods = section.pictures[2].figure.axes[0]
    assert [tick.get_text() for tick in methods.get_xticklabels()] == ["kd", "pkd"]
    (table,) = section.tables
    assert table.rows[0] == ("hidden.1-2", "training loss", "1", "1 to 1", "1", "1 to 1", "1", "2")


def test_the_table_of_correlations_has_each_run_by_itself(tmp_path: Path) -> None:
    falling = [-value for value in LOSSES]
    made = runs(tmp_path, {"kd": probe({"hidden.1-2": LOSSES}), "pkd": probe({"hidden.1-2": falling}, accuracy=[0.5, 0.5, 0.5, 0.5, 0.5])})
    table = tables(made)["correlations"].to_pylist()
    of = {"phase": "only", "distance": "hidden.1-2", "checkpoints": 5}
    assert table == [
        {"run": "kd", **of, "with": "training loss", "spearman": pytest.approx(1), "pearson": pytest.approx(1)},
        {"run": "pkd", **of, "with": "training loss", "spearman": pytest.approx(-1), "pearson": pytest.approx(-1)},
        {"run": "pkd", **of, "with": "held-out accuracy", "spearman": None, "pearson": None},
    ]


def test_phases_have_pictures_of_their_own_and_names_that_differ(tmp_path: Path) -> None:
    made = [runs(tmp_path / name, {"one": probe({"hidden.1-2": LOSSES})}).all[0] for name in ("a", "b")]
    phases = tuple(replace(one.phases[0], name=name) for one, name in zip(made, ("first stage", "second stage"), strict=True))
    with drawing.style():
        section = gkd_distances(Runs((replace(made[0], phases=phases),), "accuracy", False))
    assert section is not None
    assert [picture.name for picture in section.pictures] == ["gkd-4-1", "gkd-5-1", "gkd-4-2", "gkd-5-2"]
    assert [table.name for table in section.tables] == ["Coefficients of phase first stage", "Coefficients of phase second stage"]
    assert "first stage, 1 run, 6 checkpoints" in section.pictures[1].caption


def test_runs_without_a_probe_have_no_such_section_and_a_damaged_probe_is_named(tmp_path: Path) -> None:
    phase = Phase("only", tmp_path, {}, ("kd",), (), None, None, None, None)
    run = Run("one", tmp_path, None, "kd", {}, 0, "open", "", None, (phase,), 0, "one")
    assert gkd_distances(Runs((run,), "accuracy", False)) is None
    made = runs(tmp_path, {"broken": probe({"hidden.1-2": LOSSES})})
    path = made.all[0].phases[0].probe
    assert path is not None
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"broken/only/probe\.parquet is damaged"):
        gkd_distances(made)
    parquet.write_table(pyarrow.table({"step": [1]}), path)
    with pytest.raises(ValueError, match="lacks the columns kind, name"):
        gkd_distances(made)


def test_coefficients_are_printed_short() -> None:
    assert [printed(value) for value in (0.874, -0.3, 1.0, -0.999, 0.0, -0.001, None)] == [".87", "−.30", "1", "−1", ".00", ".00", "–"]


def test_a_mean_over_runs_leaves_those_without_a_coefficient_out() -> None:
    steps = dict(enumerate(LOSSES))
    assert mean_coefficient("Spearman", [(steps, steps), (steps, {}), ({}, steps)]) == pytest.approx(1)
    assert mean_coefficient("Spearman", [({}, {})]) is None


@pytest.mark.parametrize(("checkpoints", "critical"), [(4, 0.950), (6, 0.811), (10, 0.632), (22, 0.423)])
def test_what_chance_alone_exceeds_is_the_critical_value_of_the_tables(checkpoints: int, critical: float) -> None:
    """Two-sided, 5 %, n - 2 degrees of freedom: as in the appendices of textbooks."""
    assert by_chance(checkpoints) == pytest.approx(critical, abs=0.0005)


def test_a_target_that_was_measured_at_too_few_steps_has_no_map_and_is_named(tmp_path: Path) -> None:
    losses, accuracy = (5.0, 3.0, 4.0, math.nan, math.nan), (0.5, 0.6, 0.8, 0.7, 0.9)
    values = [2.0, 2.5, 0.5, 0.7, 0.1]
    with drawing.style():
        section = gkd_distances(runs(tmp_path, {"one": probe({"hidden.1-2": values}, losses, accuracy)}))
    assert section is not None
    assert any("No map for the training loss of phase only: it was measured at 3 of the probed steps" in text for text in section.text)
    assert [picture.caption.split(": ")[0] for picture in section.pictures] == [
        f"{name} coefficients of distances with held-out accuracy" for name in ("Spearman", "Pearson")
    ]
