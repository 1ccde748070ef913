"""Course report 2 to 5: loss components, the logit loss in training and on held-out rows, and the norm of the gradient.

Named after figures 2 to 5 of a course report by Barakat and Huang (2023), which compares a loss of embeddings, hidden states, attention and
logits with one of logits alone by the logit loss of both and by their gradients. What stands on the axes is ours: losses that differ in
number and scale have gradients of other norms, so the share of the first block in the last one's norm is drawn beside the norm.
"""

from collections.abc import Mapping, Sequence
from math import ceil

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from student_train.report.colours import PAPER, dash, series
from student_train.report.combinations import Combination, best_of_methods, combinations
from student_train.report.curves import METHODS, Curve, curve
from student_train.report.drawing import legend, panels
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section

PANELS = 6
"""Methods whose components are drawn, the best ones."""
COLUMNS = 3
HEIGHT = 1.9
LOGITS = ("soft", "logits", "words")
"""Terms that compare logits, by the last part of their names."""
NORM, BLOCK = "grad_norm", "gradient/block."


def course(runs: Runs) -> Section | None:
    """The section; None where nothing was logged in the phases that are scored."""
    shown = (best_of_methods(runs) or combinations(runs))[:METHODS]
    pictures = [picture for picture in (_components(shown), _logit_losses(shown), _norms(shown)) if picture is not None]
    if not pictures:
        return None
    text = (
        "The phase that is scored, mean over the seeds of each method's best combination. Terms are as they enter the loss, times their "
        "weights: of two methods compare how curves run; how high they lie only where weights and temperatures are the same.",
    )
    return Section("Course report 2 to 5: components, logit loss, gradients", text, pictures=tuple(pictures))


def terms(one: Combination) -> list[str]:
    """The loss terms of its scored phase, in the order of its log: ``kd/soft`` ..."""
    phases = [run.phase for run in one.runs if run.phase is not None]
    names = dict.fromkeys(name for phase in phases for log in phase.logs for name in log)
    return [name for name in names if "/" in name and not name.startswith(("eval_", "gradient/"))]


def logit_term(one: Combination) -> str | None:
    """The first of its terms that compares logits; None where none does."""
    return next((name for name in terms(one) if name.rpartition("/")[2] in LOGITS), None)


def ratio(one: Curve, other: Curve) -> Curve:
    """``one`` over ``other``, at the steps where both are and the latter isn't 0."""
    below = {step: value for step, value in zip(other.steps, other.values, strict=True) if value}
    found = {step: value / below[step] for step, value in zip(one.steps, one.values, strict=True) if step in below}
    return Curve(tuple(found), tuple(found.values()))


def _components(shown: Sequence[Combination]) -> Picture | None:
    """Course report 2: a panel for each method, a line for each of its terms."""
    drawn = [(one, names) for one in shown if (names := terms(one))][:PANELS]
    if not drawn:
        return None
    columns = min(COLUMNS, len(drawn))
    figure, axes = panels(ceil(len(drawn) / columns), columns, HEIGHT)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for axis, (one, names) in zip(axes, drawn, strict=False):
        lines = {name.partition("/")[2] if len(_methods(names)) == 1 else name: _scored(one, name) for name in names}
        _lines(axis, lines, one.method)
        if all(value > 0 for line in lines.values() for value in line.values):
            _logarithmic(axis)
        axis.legend(frameon=True, facecolor=PAPER.light, edgecolor="none", framealpha=0.8)
    return Picture("course-2", "Loss components in training: each term of the loss by method.", figure)


def _logit_losses(shown: Sequence[Combination]) -> Picture | None:
    """Course report 3 and 4: training on the left, held-out rows on the right, a line for each method with a term on logits."""
    named = [(one, logit_term(one)) for one in shown]
    if not any(name for _, name in named):
        return None
    figure, axes = panels(1, 2, 2.4)
    training = {_labelled(one, name): _scored(one, name) for one, name in named}
    held_out = {_labelled(one, name): _scored(one, name and f"eval_{name}") for one, name in named}
    _lines(axes[0], training, "Logit loss, training")
    _lines(axes[1], held_out, "Logit loss, held-out rows")
    legend(figure, _drawn(axes[0]))
    return Picture("course-3-4", "The term of the loss that compares logits, on training batches and on held-out rows.", figure)


def _norms(shown: Sequence[Combination]) -> Picture | None:
    """Course report 5: the norm of the whole gradient, and the first block's over the last one's where parts are measured."""
    whole = {one.method: _scored(one, NORM) for one in shown}
    if not any(line.steps for line in whole.values()):
        return None
    shares = {one.method: _share(one) for one in shown}
    tracked = any(line.steps for line in shares.values())
    figure, axes = panels(1, 2 if tracked else 1, 2.4)
    _lines(axes[0], whole, "Norm of the gradient")
    _logarithmic(axes[0])
    caption = "Norm of the gradient before clipping."
    if tracked:
        _lines(axes[1], shares, "First block / last block")
        caption += " Right: that of the first block over that of the last one, which does not grow with the scale of the loss."
    else:
        caption += " With gradient_norms in the recipe, the norms of blocks and terms are measured too."
    legend(figure, _drawn(axes[0]))
    return Picture("course-5", caption, figure)


def _share(one: Combination) -> Curve:
    """The first block's norm over the last one's; nothing where they aren't measured."""
    phases = [run.phase for run in one.runs if run.phase is not None]
    blocks = {int(name.removeprefix(BLOCK)) for phase in phases for log in phase.logs for name in log if name.startswith(BLOCK)}
    if not blocks:
        return Curve((), ())
    return ratio(_scored(one, f"{BLOCK}{min(blocks)}"), _scored(one, f"{BLOCK}{max(blocks)}"))


def _scored(one: Combination, name: str | None) -> Curve:
    """A logged value of the phase that is scored; nothing where it has no name."""
    phase = next((run.phase for run in one.runs if run.phase is not None), None)
    return Curve((), ()) if phase is None or name is None else curve(one, phase.name, name)


def _methods(names: Sequence[str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


def _labelled(one: Combination, name: str | None) -> str:
    """The method, with the term where its name says something else."""
    return one.method if name is None or name.startswith(f"{one.method}/") else f"{one.method} ({name})"


def _lines(axes: Axes, lines: Mapping[str, Curve], title: str) -> None:
    """A line for each curve with points; its colour follows its place, also where others have none."""
    for number, (label, line) in enumerate(lines.items()):
        if line.steps:
            marker = "o" if len(line.steps) == 1 else ""
            axes.plot(line.steps, line.values, color=series(number), linestyle=dash(number), label=label, marker=marker, markersize=4)
    axes.set(title=title, xlabel="step")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose ticks 1, 2, 5, 10 are also there, and legible, within a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _drawn(axes: Axes) -> dict[str, Artist]:
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))
