"""Codec ``topband``: the K likeliest words with their log-probabilities, and of all others how much mass lies in each of B bands of ids.

A tokenizer's ids rise as its words get rarer, roughly, so that a band of neighbouring ids holds words of about one frequency. Bands grow
with the ids: band b starts at ((V / 1000 + 1)^(b / B) - 1) * 1000, rounded down, so that none starts from a table that would have to be
kept. What the student makes of a teacher's tail is then free within a band only, where ``topk`` leaves it free as a whole; the KL over
K + B words and bands stays a lower bound of that over all words. The construction is ours.

Shapes: n units, V words, K kept words, B bands.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs.ids import ids_array
from store.codecs.topk import UNUSED, form_of, log_sum_exp
from store.features import ArraySpec, FeatureKey, FeatureSpec, StoreDtype

STEPS = 16
"""Of a band's code for each nat: rounding moves its mass by 3 % at most, which costs less than a word less in the head would."""
NONE = 255
"""Code of a band without mass, and of less than e^-15.9."""
COMMON = 1000
"""Ids from which on bands begin to widen: special tokens and single letters come first."""


def arrays(key: FeatureKey, dtype: StoreDtype, width: int, ids: Sequence[int]) -> tuple[ArraySpec, ...]:
    """``ids`` [K], ``log_probs`` [K] in ``dtype``, and ``bands`` [B] uint8: -16 times the logarithm of each band's mass."""
    form = form_of(key)
    form.check(width)
    return (
        ids_array(form.top, width),
        ArraySpec(name="log_probs", dtype=dtype, width=form.top),
        ArraySpec(name="bands", dtype="uint8", width=form.bands),
    )


def reduce(
    logits_nV: NDArray[np.float32], spec: FeatureSpec, labels: NDArray[np.int64] | None, seeds: NDArray[np.uint64] | None
) -> dict[str, NDArray[Any]]:
    """Words by falling logit, equal ones by rising id; everything is computed in float64."""
    form = form_of(spec.feature)
    ids_nK = np.argsort(-logits_nV, axis=1, kind="stable")[:, : form.top]
    log_probs_nV = logits_nV.astype(np.float64)
    log_probs_nV -= log_sum_exp(log_probs_nV)
    others_nV = log_probs_nV.copy()
    np.put_along_axis(others_nV, ids_nK, -np.inf, 1)
    with np.errstate(divide="ignore"):
        parts = [log_sum_exp(part_nW) for part_nW in np.split(others_nV, starts(logits_nV.shape[1], form.bands)[1:], axis=1)]
    codes_nB = np.clip(np.rint(-STEPS * np.maximum(np.concatenate(parts, axis=1), UNUSED)), 0, NONE)
    return {"ids": ids_nK, "log_probs": np.take_along_axis(log_probs_nV, ids_nK, 1), "bands": codes_nB}


@lru_cache(maxsize=64)
def starts(words: int, bands: int) -> tuple[int, ...]:
    """The first id of each of so many bands of a vocabulary."""
    at = COMMON * ((words / COMMON + 1) ** (np.arange(bands) / bands) - 1)
    first = np.maximum(np.floor(at).astype(np.int64), np.arange(bands))  # each band has a word at least
    return tuple(int(start) for start in np.minimum(first, words - bands + np.arange(bands)))
