"""Is one method better than another? Paired t-tests over seeds, bootstrap intervals, and Holm's correction for many comparisons.

Shapes: N pairs (seeds, or held-out rows).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 9999
_CELLS = 4_000_000
"""Numbers that are resampled at a time."""


def paired_p(one_N: Array, other_N: Array) -> float | None:
    """Two-sided p of the paired t-test (Student 1908); None for fewer than two pairs, or where all of them differ by the same."""
    differences_N = one_N - other_N
    if len(differences_N) < 2 or _constant(differences_N):
        return None
    return float(stats.ttest_rel(one_N, other_N).pvalue)


def bootstrap(one_N: Array, other_N: Array) -> Interval | None:
    """The 95 % interval of the mean difference when pairs are drawn anew (BCa, Efron 1987); None for fewer than two pairs.

    Always the same draws, so that a report doesn't change when it is made again. Of few seeds there are few different draws (10 of 3
    pairs): the interval is then narrower than it should be.
    """
    differences_N = one_N - other_N
    if len(differences_N) < 2:
        return None
    if _constant(differences_N):
        return float(differences_N[0]), float(differences_N[0])
    found = stats.bootstrap(
        (differences_N,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _CELLS // len(differences_N)),
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, at most 1, and no less than the one before."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for before, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - before) * p_values[place]))
        corrected[place] = largest
    return corrected


def spans_zero(interval: Interval) -> bool:
    """Whether no difference is among the values that it holds possible."""
    return interval[0] <= 0 <= interval[1]


def _constant(differences_N: Array) -> bool:
    """But for rounding: a t of that would be rounding, divided by rounding."""
    return bool(np.ptp(differences_N) <= 1e-12 * max(1.0, float(np.abs(differences_N).max())))
