"""How closely two quantities go together over the checkpoints of training: Spearman's and Pearson's coefficients, of one run and of many.

A coefficient is taken within each run, over its checkpoints; of several runs the mean of theirs is shown. So runs whose losses have other
scales, as those of other methods have, don't stand in for a relation that none of them has.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

from student_train.report.checkpoints import Series, paired

FEWEST = 4
"""Checkpoints that a coefficient is taken over, at least."""
_CONSTANT = 1e-12
"""A range this small beside the values themselves is rounding."""


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    return float(stats.spearmanr(one, other).statistic)


def _pearson(one: Sequence[float], other: Sequence[float]) -> float:
    return float(stats.pearsonr(one, other).statistic)


COEFFICIENTS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {"Spearman": _spearman, "Pearson": _pearson}
"""Of ranks, and of the values themselves."""


def coefficient(name: str, one: Series, other: Series) -> float | None:
    """Between -1 and 1, over the steps where both have a number; None: fewer than FEWEST steps, or one of them is the same at all."""
    ones, others = paired(one, other)
    if len(ones) < FEWEST or _is_constant(ones) or _is_constant(others):
        return None
    return COEFFICIENTS[name](ones, others)


def mean_coefficient(name: str, pairs: Iterable[tuple[Series, Series]]) -> float | None:
    """The mean over runs, each a pair of series; runs without a coefficient don't count. None: none has one."""
    found = [value for one, other in pairs if (value := coefficient(name, one, other)) is not None]
    return float(np.mean(found)) if found else None


def by_chance(checkpoints: int) -> float:
    """What the absolute value of Pearson's coefficient of so many pairs of independent normal values exceeds in one of 20 cases."""
    t = float(stats.t.ppf(0.975, checkpoints - 2))
    return t / (checkpoints - 2 + t**2) ** 0.5


def _is_constant(values: Sequence[float]) -> bool:
    return float(np.ptp(values)) <= _CONSTANT * float(np.max(np.abs(values)))
