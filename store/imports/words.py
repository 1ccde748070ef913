"""Words with their log-probabilities, as another program kept them, in the form ``topK``.

Shapes: n positions, M words given of each, K words kept.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.cast import restore, stored
from store.codecs.topk import NO_TAIL
from store.features import FeatureSpec

MISSING = -1
"""Id of an entry of a position that has fewer words than others."""

ROUNDING = 1e-3
"""By how much the sum of float32 or float16 probabilities may pass 1 without a reason to change them."""


def top_words(
    ids_nM: NDArray[np.int64], log_probs_nM: NDArray[np.float64], spec: FeatureSpec, vocab: int, most: float, where: Callable[[int], str]
) -> dict[str, NDArray[Any]]:
    """The arrays of ``spec`` (form ``topK``): words by falling log-probability, equal ones by rising id, and the others' mass.

    ``log_tail`` is log(1 - sum of the K probabilities) in float64; where the K words hold all of the mass, it is the
    lowest finite float32. A tail below about 1e-7 is the rounding of what was given. Where lossy numbers add up to more
    than 1, all are divided by their sum, so that they are a distribution.

    Args:
        most: Mass of all words given that still comes from the way they were kept.
        where: Names a position for the message.

    Raises:
        ValueError: a position has fewer than K words, one twice, one that is not in the vocabulary, a log-probability
            that is not finite as stored, or more mass than ``most``.
    """
    kept = spec.arrays[0].numbers
    given = ids_nM != MISSING
    _refuse((ids_nM < MISSING) | (ids_nM >= vocab), where, lambda n: f"word {_worst(ids_nM[n])} is not in a vocabulary of {vocab} words")
    _refuse(given & ~np.isfinite(log_probs_nM), where, lambda n: f"expected finite log-probabilities, found {log_probs_nM[n]}")
    few = given.sum(1) < kept
    _refuse(few[:, None], where, lambda n: f"expected at least {kept} words, found {int(given[n].sum())}; keep fewer, as in --top")
    log_probs_nM = np.where(given, log_probs_nM, -np.inf)
    mass = np.exp(np.minimum(log_probs_nM, 50)).sum(1)
    _refuse(
        (mass > most)[:, None],
        where,
        lambda n: f"the words' probabilities add up to {mass[n]:.4g}; expected log-probabilities of one distribution, at most {most:g}",
    )
    log_probs_nM -= np.where(mass > 1 + ROUNDING, np.log(np.maximum(mass, 1)), 0)[:, None]
    order = np.lexsort((ids_nM, -log_probs_nM), axis=1)
    ids_nM, log_probs_nM = np.take_along_axis(ids_nM, order, 1), np.take_along_axis(log_probs_nM, order, 1)
    ids_nK, log_probs_nK = ids_nM[:, :kept], log_probs_nM[:, :kept]
    again = np.diff(np.sort(ids_nK, axis=1), axis=1) == 0
    _refuse(again, where, lambda n: "a word is given twice")
    head = np.exp(log_probs_nK).sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_tail = np.maximum(np.log1p(-np.minimum(head, 1.0)), NO_TAIL)
    if kept == vocab:
        log_tail[:] = NO_TAIL
    found = {"ids": ids_nK, "log_probs": log_probs_nK, "log_tail": log_tail}
    arrays = {array.name: stored(found[array.name], array) for array in spec.arrays}
    numbers = restore(arrays["log_probs"], spec.arrays[1].dtype)
    _refuse(~np.isfinite(numbers), where, lambda n: "a log-probability does not fit its stored type; keep float32")
    return arrays


def _refuse(wrong: NDArray[np.bool_], where: Callable[[int], str], what: Callable[[int], str]) -> None:
    positions = wrong.any(1)
    if positions.any():
        n = int(positions.argmax())
        raise ValueError(f"{where(n)}: {what(n)}")


def _worst(ids_M: NDArray[np.int64]) -> int:
    return int(ids_M.max() if ids_M.min() >= MISSING else ids_M.min())
