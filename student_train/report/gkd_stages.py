"""GKD 6: how fast the loss of each method falls in each stage, whatever its scale.

Named after figure 6 of Tan et al., "GKD" (arXiv 2306.06629); how losses are scaled is ours: each curve is divided by its own largest
absolute value, so a loss that begins at the top begins at 1. A stage is a phase, and steps are shares of it.
"""

from collections.abc import Mapping, Sequence
from math import ceil

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from student_train.report.colours import dash, series
from student_train.report.combinations import Combination, best_of_methods, combinations
from student_train.report.curves import METHODS, Curve, curve
from student_train.report.drawing import legend, panels
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section, Table

COLUMNS = 3
HEIGHT = 2.4


def gkd_stages(runs: Runs) -> Section | None:
    """The section; None where no phase has logged two losses."""
    shown = (best_of_methods(runs) or combinations(runs))[:METHODS]
    stages = list(dict.fromkeys(phase.name for one in shown for run in one.runs for phase in run.phases))
    found = {stage: [(number, one, curve(one, stage, "loss")) for number, one in enumerate(shown)] for stage in stages}
    found = {stage: [(number, one, normalised(line)) for number, one, line in of_stage] for stage, of_stage in found.items()}
    found = {stage: drawn for stage, of_stage in found.items() if (drawn := [each for each in of_stage if len(each[2].steps) > 1])}
    if not found:
        return None
    text = (
        "Training loss, each curve divided by its own largest absolute value, over the share of the stage that is done: how much of a loss "
        "a method takes away, and how early. Weighted terms that switch on late, and weights that change, show as rises.",
    )
    caption = "Normalised training loss in each stage, mean over the seeds of each method's best combination."
    return Section("GKD 6: normalised loss by method and stage", text, (_table(found),), (Picture("gkd-6", caption, _draw(found)),))


def normalised(line: Curve) -> Curve:
    """``line`` over its own largest absolute value; nothing where all values are 0."""
    largest = max((abs(value) for value in line.values), default=0.0)
    return Curve(line.steps, tuple(value / largest for value in line.values)) if largest else Curve((), ())


Lines = Sequence[tuple[int, Combination, Curve]]
"""Number of the method, which is that of its colour; the method; its curve."""


def _draw(found: Mapping[str, Lines]) -> Figure:
    """A panel for each stage, a line for each method."""
    columns = min(COLUMNS, len(found))
    figure, axes = panels(ceil(len(found) / columns), columns, HEIGHT)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    known: dict[str, Artist] = {}
    for axis, (stage, lines) in zip(axes, found.items(), strict=False):
        axis.set(title=stage, xlabel="share of the stage", xlim=(0, 1))
        axis.set_ylabel("loss / largest")
        for number, one, line in lines:
            shares = [step / line.steps[-1] for step in line.steps]
            (known[one.method],) = axis.plot(shares, line.values, color=series(number), linestyle=dash(number))
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    legend(figure, known)
    return figure


def _table(found: Mapping[str, Lines]) -> Table:
    """Where each loss ends, and when it is half way between its largest value and its end."""
    rows = []
    for stage, lines in found.items():
        for _, one, line in lines:
            rows.append((one.method, stage, f"{line.values[-1]:.3f}", f"{halfway(line):.0%}"))
    note = (
        "Half way: the share of the stage after which the loss is for the first time at or below the middle between largest and last value."
    )
    return Table("Normalised losses", ("method", "stage", "last / largest", "half way after"), tuple(rows), note)


def halfway(line: Curve) -> float:
    """The share of its steps after which ``line`` has, once it was at its largest, come down half the way to its last value."""
    top = line.values.index(max(line.values))
    middle = (line.values[top] + line.values[-1]) / 2
    first = next(step for step, value in zip(line.steps[top:], line.values[top:], strict=True) if value <= middle)
    return first / line.steps[-1]
