"""Runs that differ in their seed alone, put together; and the best of them for each method."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from student_train.report.runs import Run, Runs


@dataclass(frozen=True)
class Combination:
    """A method with its hyperparameters, over its seeds."""

    method: str
    parameters: Mapping[str, object]
    runs: tuple[Run, ...]
    """All of them, in the order of their seeds."""
    metric: str

    @property
    def scores(self) -> dict[int, float]:
        """Seed -> score of the finished ones."""
        found = {run.seed: run.score(self.metric) for run in self.runs if run.state == "finished"}
        return {seed: score for seed, score in found.items() if score is not None}

    @property
    def mean(self) -> float | None:
        """Of its scores; None where none is finished."""
        return fmean(self.scores.values()) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) of its scores; None for fewer than two."""
        return stdev(self.scores.values()) if len(self.scores) > 1 else None

    @property
    def finished(self) -> tuple[Run, ...]:
        """Those with a score."""
        return tuple(run for run in self.runs if run.seed in self.scores)


def combinations(runs: Runs) -> list[Combination]:
    """Best first; those without a score last."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs.all:
        groups.setdefault((run.method, run.identity), []).append(run)
    found = [
        Combination(method, group[0].parameters, tuple(sorted(group, key=lambda run: run.seed)), runs.metric)
        for (method, _), group in groups.items()
    ]
    sign = 1 if runs.lower else -1
    return sorted(found, key=lambda one: (one.mean is None, sign * (one.mean or 0.0)))


def best_of_methods(runs: Runs) -> list[Combination]:
    """Of each method the combination with the best mean, of those with the most finished seeds; best first."""
    finished = [one for one in combinations(runs) if one.mean is not None]
    chosen: dict[str, Combination] = {}
    for one in finished:  # best first, so that the first of equally many seeds stays
        if one.method not in chosen or len(one.scores) > len(chosen[one.method].scores):
            chosen[one.method] = one
    return [one for one in finished if chosen[one.method] is one]


def hyperparameters(one: Combination) -> str:
    """``learning_rate 5e-05, batch_rows 32``: keys by their last part, without the one that names the method."""
    last = [key.rpartition(".")[2] for key in one.parameters]
    shown = [
        f"{short if last.count(short) == 1 else key} {plain(value)}"
        for (key, value), short in zip(one.parameters.items(), last, strict=True)
        if value != one.method
    ]
    return ", ".join(shown)


def plain(value: object) -> str:
    """A value of a recipe as people write it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def spread(mean: float | None, std: float | None) -> str:
    """``0.8123 ± 0.0041``; an empty text where there is nothing."""
    return "" if mean is None else f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"
