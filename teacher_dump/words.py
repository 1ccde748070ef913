"""Word predictions as people read them.

Shapes: n places of a row, V vocabulary, K kept words.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from store.codecs.topk import UNUSED
from store.reader import Store

PLACES = 6
"""Places of a row that are shown."""
WORDS = 5
"""Likeliest words that are shown of each."""
_NONE = -100
"""Label of a token without one."""


@dataclass(frozen=True)
class Place:
    """Where a word was predicted: number of the token (None for the row as a whole), its id and the true word's."""

    number: int | None
    token: int | None
    true: int | None


def places(store: Store, row: int, positions: str) -> list[Place]:
    """The places that ``positions`` names in a row, in the order of its units."""
    rows = np.array([row])
    arrays = {array.name for array in store.manifest.rows.token_arrays}
    ids = store.tokens("input_ids", rows).astype(np.int64)
    true = np.full(len(ids), _NONE)
    if "token_labels" in arrays and store.manifest.rows.objective in ("mlm", "causal"):
        true = store.tokens("token_labels", rows).astype(np.int64)
    elif store.manifest.rows.objective == "causal":
        documents = store.tokens("documents", rows) if "documents" in arrays else np.zeros(len(ids), np.uint16)
        true[:-1] = np.where(documents[:-1] == documents[1:], ids[1:], _NONE)
    if positions == "mean":
        return [Place(None, None, None)]
    chosen = {"all": range(len(ids)), "first": [0], "last": [len(ids) - 1]}.get(positions, np.flatnonzero(true != _NONE))
    return [Place(int(i), int(ids[i]), None if true[i] == _NONE else int(true[i])) for i in chosen]


def predictions(
    shown: Sequence[Place], word: Callable[[int], str], chosen: Sequence[int], values: dict[str, NDArray[Any]]
) -> Iterator[str]:
    """For each place the likeliest words, or the ``chosen`` ones and the true one, with their probabilities.

    ``values`` are the arrays of a key of word logits: dense [n, V], or of one of their forms. Of words drawn from the whole prediction the
    shares of the draws are shown.
    """
    for unit, place in enumerate(shown[:PLACES]):
        if "log_sum_exp" in values:
            named = {word(number): values["logits"][unit, i] for i, number in enumerate(chosen)}
            if place.true is not None:
                named[f"true {word(place.true)}"] = values["true_logit"][unit, 0]
            found = [(name, math.exp(logit - values["log_sum_exp"][unit, 0])) for name, logit in named.items()]
        elif "counts" in values:
            counts = values["counts"][unit]
            most = np.argsort(-counts, kind="stable")[:WORDS]
            found = [(word(int(values["ids"][unit, n])), float(counts[n] / counts.sum())) for n in most if counts[n] > 0]
        elif "ids" in values:
            log_probs = values["log_probs"][unit, :WORDS]
            kept = zip(values["ids"][unit, : len(log_probs)], log_probs[log_probs > UNUSED], strict=False)
            found = [(word(int(number)), math.exp(log_prob)) for number, log_prob in kept]
            found.append(("others", 1 - sum(probability for _, probability in found)))
        else:
            log_probs_V = log_softmax(values[""][unit].astype(np.float64))
            found = [(word(int(number)), math.exp(log_probs_V[number])) for number in np.argsort(-log_probs_V)[:WORDS]]
        at = "" if place.number is None or place.token is None else f"{place.number:>5} {word(place.token)}"
        true = "" if place.true is None else f" ({word(place.true)})"
        yield f"  {at + true:32} " + "  ".join(f"{name} {_share(probability)}" for name, probability in found)
    if len(shown) > PLACES:
        yield f"  {'':5} and {len(shown) - PLACES} more places"


def _share(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 1e-3 or probability <= 0 else f"{probability:.0e}"
