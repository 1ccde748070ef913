"""Combinations of a sweep by their mean score over seeds, best first."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from student_train.sweep import combination, short_keys
from student_train.trial import Row


@dataclass(frozen=True)
class Ranked:
    """One combination over its seeds."""

    parameters: dict[str, object]
    rows: list[Row]
    """One for each seed."""

    @property
    def scores(self) -> list[float]:
        """Those of its finished trials; none of a combination that was given up."""
        return [] if self.pruned else [row.score for row in self.rows if row.score is not None]

    @property
    def pruned(self) -> bool:
        """Whether it was given up for the scores of its first seed."""
        return any(row.state == "pruned" for row in self.rows)

    @property
    def mean(self) -> float | None:
        """Of its scores; None where no trial is finished."""
        return fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) of its scores; None for fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else None


def ranked(rows: Sequence[Row], metric: str) -> list[Ranked]:
    """Combinations by mean score; a leading minus of ``metric`` means lower is better. Those without a score come last."""
    groups: dict[str, Ranked] = {}
    for row in rows:
        groups.setdefault(combination(row.parameters), Ranked(row.parameters, [])).rows.append(row)
    sign = 1 if metric.startswith("-") else -1
    return sorted(groups.values(), key=lambda one: (one.mean is None, sign * (one.mean or 0.0)))


def table(rows: Sequence[Row], metric: str) -> str:
    """The ranking as text, with a line that says whether the students that are compared began alike."""
    header = ["", *short_keys(rows[0].parameters), metric.removeprefix("-"), "seeds", "seconds", "parameters", "start"]
    lines = [header]
    for place, one in enumerate(ranked(rows, metric), 1):
        seconds = [row.seconds for row in one.rows if row.seconds is not None and row.state == "finished"]
        sizes = sorted({row.student_parameters for row in one.rows if row.student_parameters is not None})
        starts = sorted({row.start for row in one.rows if row.start is not None})
        values = [part.partition("=")[2] for part in (combination({key: value}) for key, value in one.parameters.items())]
        lines.append(
            [
                str(place),
                *values,
                _score(one),
                f"{sum(row.score is not None for row in one.rows)} of {len(one.rows)}",
                f"{fmean(seconds):.0f}" if seconds else "",
                f"{sizes[0]:,}" if len(sizes) == 1 else "",
                starts[0][:8] if len(starts) == 1 else f"{len(starts)} starts" if starts else "",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return f"{text}\n{_starts(rows)}"


def _score(one: Ranked) -> str:
    if one.pruned:
        ended = next(row for row in one.rows if row.state == "pruned")
        return f"{'no number' if ended.best is None else f'{ended.best:.4f}'}, pruned at {ended.pruned}"
    if one.mean is None:
        return "failed" if any(row.state == "failed" for row in one.rows) else "open"
    return f"{one.mean:.4f}" if one.std is None else f"{one.mean:.4f} ± {one.std:.4f}"


def _starts(rows: Sequence[Row]) -> str:
    found: dict[int, set[str]] = {}
    for row in rows:
        if row.start is not None:
            found.setdefault(row.seed, set()).add(row.start)
    if not found:
        return "no trial is finished"
    if all(len(starts) == 1 for starts in found.values()):
        return "all students of a seed began with the same weights"
    return "students of one seed began with different weights: " + ", ".join(
        f"{len(starts)} with seed {seed}" for seed, starts in sorted(found.items())
    )
