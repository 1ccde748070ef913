"""Learning curves: every loss term and held-out score, and the norms of gradients by block and by term, over the steps of a phase.

A curve is the mean over the seeds of a method's best combination.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from student_train.report.colours import dash, series
from student_train.report.combinations import Combination, best_of_methods, combinations
from student_train.report.drawing import legend, panels
from student_train.report.runs import Phase, Run, Runs
from student_train.report.section import Picture, Section

POINTS = 120
"""Points of a curve that are drawn."""
METHODS = 8
"""Methods that are drawn, the best ones: as many as there are colours."""
_PANELS = 24
HEIGHT = 2.0
GRADIENT = "gradient/"
_NO_TERMS = frozenset({"step", "epoch", "learning_rate", "tokens_per_second", "loader_wait", "wait_fraction", "grad_norm"})


SCORED = ""
"""Stands for the phase of each run that is scored, whatever its name."""


@dataclass(frozen=True)
class Curve:
    """A value over steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def curve(one: Combination, phase: str, name: str) -> Curve:
    """The logged value ``name`` of the phase of that name, or of SCORED; mean over the seeds that have it at a step; thinned to POINTS."""
    at_step: dict[int, list[float]] = {}
    for run in one.runs:
        for of_run in _of(run, phase):
            score = name.removeprefix("eval_")
            if score != name and of_run.before is not None and score in of_run.before:
                at_step.setdefault(0, []).append(of_run.before[score])
            for log in of_run.logs:
                if isinstance(value := log.get(name), int | float):
                    at_step.setdefault(int(log["step"]), []).append(value)
    steps = sorted(at_step)
    kept = steps[:: ceil(len(steps) / POINTS)] if steps else []
    if steps and kept[-1] != steps[-1]:
        kept.append(steps[-1])
    return Curve(tuple(kept), tuple(fmean(at_step[step]) for step in kept))


def curves(runs: Runs) -> Section | None:
    """Loss terms and held-out scores, a panel each, a line for each method."""
    shown, phases = _shown(runs), _phases(runs)
    pictures = []
    for phase in phases:
        names = _names(shown, phase)
        terms = [name for name in names if not name.startswith(("eval_", GRADIENT)) and name not in _NO_TERMS]
        scores = [name for name in names if name.startswith("eval_") and "/" not in name]
        held_out = [name for name in names if name.startswith("eval_") and "/" in name]
        where = "" if len(phases) == 1 else f" of {_called(phase)}"
        for kind, found, said in (
            ("scores", scores, f"Held-out scores{where}, from the untrained student on."),
            ("terms", terms, f"Loss and its terms{where} in training, times their weights."),
            ("held-out-terms", held_out, f"Loss terms{where} on held-out rows, times their weights."),
        ):
            if found:
                pictures.append(_by_name(f"curves-{kind}-{phases.index(phase)}", said, shown, phase, found[:_PANELS]))
    text = ["Means over the seeds of each method's best combination; a dot where a value was logged once."]
    if len(shown) < (methods := len({run.method for run in runs.all})):
        text.append(f"{len(shown)} of {methods} methods are drawn, the best of those that are finished; curves.parquet has all.")
    return Section("Learning curves", tuple(text), pictures=tuple(pictures)) if pictures else None


def gradients(runs: Runs) -> Section | None:
    """Norms of gradients, a panel for each method: one line for each part of the student, and one for each loss term."""
    shown, phases = _shown(runs), _phases(runs)
    pictures = []
    for phase in phases:
        norms = [name for name in _names(shown, phase) if name.startswith(GRADIENT)]
        parts = [name for name in norms if _is_part(name.removeprefix(GRADIENT))]
        where = "" if len(phases) == 1 else f" in {_called(phase)}"
        for kind, found, said in (
            ("parts", parts, f"Norm of the gradient in each part of the student{where}, before clipping."),
            (
                "terms",
                [name for name in norms if name not in parts],
                f"Norm of the gradient of each loss term over the whole student{where}.",
            ),
        ):
            if found:
                pictures.append(_by_method(f"gradients-{kind}-{phases.index(phase)}", said, shown, phase, found))
    return Section("Gradients", pictures=tuple(pictures)) if pictures else None


def _is_part(name: str) -> bool:
    return name in ("embeddings", "head") or name.startswith("block.")


def _shown(runs: Runs) -> list[Combination]:
    """The best methods; of runs that are all unfinished, those that there are."""
    return (best_of_methods(runs) or combinations(runs))[:METHODS]


def _phases(runs: Runs) -> list[str]:
    """Names of the phases that aren't scored, in the order in which they are met, and SCORED."""
    return [*dict.fromkeys(phase.name for run in runs.all for phase in run.phases if phase is not run.phase), SCORED]


def _of(run: Run, phase: str) -> list[Phase]:
    """The phase of that name; with SCORED the one that is scored."""
    return [one for one in run.phases if (one is run.phase if phase == SCORED else one.name == phase)]


def _called(phase: str) -> str:
    return f"phase {phase}" if phase != SCORED else "the phase that is scored"


def _names(shown: Sequence[Combination], phase: str) -> list[str]:
    """What is logged, in the order in which it is met."""
    logs = [log for one in shown for run in one.runs for own in _of(run, phase) for log in own.logs]
    return list(dict.fromkeys(name for log in logs for name in log if isinstance(log[name], int | float)))


def _by_name(name: str, said: str, shown: Sequence[Combination], phase: str, names: Sequence[str]) -> Picture:
    """A panel for each name, a line for each method."""

    def draw(axes: Axes, place: int) -> None:
        axes.set_title(names[place].removeprefix("eval_"))
        for number, one in enumerate(shown):
            _line(axes, curve(one, phase, names[place]), one.method, number)

    return _grid(name, said, len(names), draw, [one.method for one in shown])


def _by_method(name: str, said: str, shown: Sequence[Combination], phase: str, names: Sequence[str]) -> Picture:
    """A panel for each method, a line for each name."""

    def draw(axes: Axes, place: int) -> None:
        axes.set_title(shown[place].method)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        for number, norm in enumerate(names):
            found = curve(shown[place], phase, norm)
            if any(value > 0 for value in found.values):
                _line(axes, found, norm.removeprefix(GRADIENT), number)

    return _grid(name, said, len(shown), draw, [norm.removeprefix(GRADIENT) for norm in names])


def _line(axes: Axes, found: Curve, label: str, number: int) -> None:
    if found.steps:
        marker = "o" if len(found.steps) == 1 else ""
        axes.plot(found.steps, found.values, color=series(number), linestyle=dash(number), label=label, marker=marker, markersize=4)


def _grid(name: str, said: str, count: int, draw: Callable[[Axes, int], None], labels: Sequence[str]) -> Picture:
    """``count`` panels and one legend for all of them, in the order of ``labels``."""
    columns = min(min((3, 4), key=lambda columns: -count % columns), count)  # so that few places stay empty
    rows = ceil(count / columns)
    figure, axes = panels(rows, columns, HEIGHT)
    known: dict[str, Artist] = {}
    for place, one in enumerate(axes):
        if place >= count:
            one.set_visible(False)
            continue
        draw(one, place)
        if place + columns >= count:
            one.set_xlabel("step")
        known |= {label: handle for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    legend(figure, {label: known[label] for label in labels if label in known})
    return Picture(name, said, figure)
