"""Is one method better than another: paired tests and intervals between the best combinations of all methods.

Shapes: N pairs of seeds, R held-out rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations as pairs_of

import numpy as np

from student_train.report.answers import Array, read_answers, row_values
from student_train.report.colours import INK, MUTED, series
from student_train.report.combinations import Combination, best_of_methods
from student_train.report.drawing import panels
from student_train.report.runs import Runs
from student_train.report.section import Picture, Section, Table
from student_train.report.statistics import Interval, bootstrap, holm, paired_p, spans_zero

ALPHA = 0.05
_OfRows = dict[int, tuple[tuple[str, str, bytes], Array]]


@dataclass(frozen=True)
class Comparison:
    """Two methods over the seeds that both have."""

    one: str
    other: str
    seeds: int
    difference: float
    """Mean over seeds of the score of ``one`` less that of ``other``."""
    p: float | None
    """Of the paired t-test; None where it cannot be made."""
    corrected: float | None
    """The same, corrected for all comparisons of the report."""
    over_seeds: Interval | None
    over_rows: Interval | None
    """Of the difference that is a mean over the held-out rows, each value the mean over seeds; None where nothing is known of rows."""
    rows: int

    @property
    def resolved(self) -> bool:
        """Whether the test, after correction, and the interval (over rows where there is one) agree that there is a difference."""
        interval = self.over_rows or self.over_seeds
        return self.corrected is not None and self.corrected < ALPHA and interval is not None and not spans_zero(interval)


@lru_cache(maxsize=1)
def compare(runs: Runs) -> list[Comparison]:
    """All pairs of methods, each with its best combination; the better one of each pair comes first."""
    best = best_of_methods(runs)
    of_rows = {one.method: _of_rows(one, runs.metric) for one in best}
    pairs = [(one, other) for one, other in pairs_of(best, 2) if one.scores.keys() & other.scores.keys()]
    found = [_compare(one, other, of_rows[one.method], of_rows[other.method]) for one, other in pairs]
    tested = [place for place, comparison in enumerate(found) if comparison.p is not None]
    corrected: dict[int, float] = dict(zip(tested, holm([p for one in found if (p := one.p) is not None]), strict=True))
    return [replace(one, corrected=corrected.get(place)) for place, one in enumerate(found)]


def comparisons(runs: Runs) -> Section | None:
    """Tables and a picture of them; None for fewer than two methods with a common seed."""
    found = compare(runs)
    if not found:
        return None
    first = found[0].one
    with_first = [one for one in found if one.one == first]
    resolved = [one for one in found if one.resolved]
    most = max(one.seeds for one in found)
    if most < 2:
        verdict = "There is one seed: no test can be made over seeds, and nothing is resolved. Train each combination with more seeds."
    else:
        none = f"none of the {len(found)} pairs of methods differs" if len(found) > 1 else f"{first} and {found[0].other} don't differ"
        verdict = (
            f"Resolved: {len(resolved)} of {len(found)} pairs of methods."
            if resolved
            else f"Not resolved: with {most} seeds {none} by more than chance could."
        )
    text = (
        verdict,
        "A pair is resolved where the paired t-test over seeds, corrected for all pairs (Holm), has p < 0.05 and the 95 % bootstrap "
        "interval of the difference (over held-out rows where their answers were kept, or else over seeds) doesn't span zero. The test "
        "speaks of further seeds, the interval over rows of further rows.",
    )
    note = "Differences of the mean score, first method less second. Intervals over few seeds are narrower than they should be."
    tables = [_table(f"{first} against each other method", with_first, note)]
    if len(found) > len(with_first):
        tables.append(_table("All pairs", found, note, folded=True))
    drawn = (_picture(with_first, runs),) if any(one.over_rows or one.over_seeds for one in with_first) else ()
    return Section("Comparisons", text, tuple(tables), drawn)


def _compare(one: Combination, other: Combination, rows_of_one: _OfRows, rows_of_other: _OfRows) -> Comparison:
    seeds = sorted(one.scores.keys() & other.scores.keys())
    one_N, other_N = (np.array([side.scores[seed] for seed in seeds]) for side in (one, other))
    over_rows, rows = None, 0
    if all(seed in known for seed in seeds for known in (rows_of_one, rows_of_other)):
        which = {known[seed][0] for seed in seeds for known in (rows_of_one, rows_of_other)}
        one_R, other_R = (np.mean([known[seed][1] for seed in seeds], axis=0) for known in (rows_of_one, rows_of_other))
        if len(which) == 1:
            over_rows, rows = bootstrap(one_R, other_R), len(one_R)
    return Comparison(
        one.method,
        other.method,
        len(seeds),
        float((one_N - other_N).mean()),
        paired_p(one_N, other_N),
        None,
        bootstrap(one_N, other_N),
        over_rows,
        rows,
    )


def _of_rows(one: Combination, metric: str) -> _OfRows:
    """Of each seed whose answers to one split were kept: which rows, and [R] what the score is the mean of."""
    found: _OfRows = {}
    for run in one.finished:
        answers = [] if run.phase is None else read_answers(run.phase)
        if len(answers) == 1 and (values := row_values(answers[0], metric)) is not None:
            found[run.seed] = (str(answers[0].store), answers[0].split, answers[0].rows.tobytes()), values
    return found


def _table(name: str, found: Sequence[Comparison], note: str, *, folded: bool = False) -> Table:
    header = ("pair", "seeds", "difference", "p", "p, Holm", "interval over seeds", "interval over rows", "rows", "verdict")
    lines = [
        (
            f"{one.one} - {one.other}",
            str(one.seeds),
            f"{one.difference:+.4f}",
            "" if one.p is None else f"{one.p:.3g}",
            "" if one.corrected is None else f"{one.corrected:.3g}",
            _interval(one.over_seeds),
            _interval(one.over_rows),
            f"{one.rows:,}" if one.rows else "",
            _verdict(one),
        )
        for one in found
    ]
    return Table(name, header, tuple(lines), note, folded)


def _verdict(one: Comparison) -> str:
    if one.seeds < 2:
        return "one seed: no test"
    if one.p is None:
        return "no test: every seed differs by the same"
    return f"{one.one} is better" if one.resolved else "not resolved"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def _picture(found: Sequence[Comparison], runs: Runs) -> Picture:
    figure, (axes,) = panels(1, 1, 0.9 + 0.32 * len(found))
    for place, one in enumerate(found):
        for interval, shift, colour, label in (
            (one.over_rows, -0.12, series(0), "over rows"),
            (one.over_seeds, 0.12, series(1), "over seeds"),
        ):
            if interval is not None:
                axes.plot(interval, [place + shift] * 2, "-", color=colour, linewidth=2, label=label)
        axes.plot([one.difference], [place], "o", color=INK.light, markersize=4)
    axes.axvline(0, color=MUTED.light, linewidth=1)
    axes.set_yticks(range(len(found)), [one.other for one in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{runs.metric} of {found[0].one} less that of the method")
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes.legend(named.values(), named.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return Picture("comparisons", f"95 % bootstrap intervals of the difference between {found[0].one} and each other method.", figure)
