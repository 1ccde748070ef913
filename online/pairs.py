"""Pairs of rows for interchange interventions (DIITO), drawn once when rows are built: who takes which hidden states of whom.

Partners are rows of one split that stand up to WINDOW rows apart in the corpus, so that nothing but these is held in memory. Draws are
addressed like masks (online.masking): they follow from the seed, the masking copy and the place in the corpus alone. n tokens of a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from online.batch import IGNORED
from online.drafts import Draft
from store.rows import Row
from store.strict import Strict

WINDOW = 4096
"""Rows of a split that are mixed before they are paired."""

_PLAN, _MIX = 1, 2
"""Second halves of the generators' keys; 0 is that of masks."""


class InterchangeSpec(Strict):
    """Rows come in pairs, each the base of an intervention whose source is the other. Of a split's rows an odd one at the end is left out.

    Source: Wu et al. 2022 (arXiv 2112.02505), section 3, and its code: ``share`` of the shorter row's tokens, special tokens
    among them and no padding; as many in both rows, the first chosen one for the first and so on.
    """

    share: float = Field(default=0.3, gt=0, le=1)
    """Tokens that are exchanged, of those of the shorter row; rounded down, so that very short rows exchange none."""
    positions: Literal["consecutive", "random", "masked"] = "consecutive"
    """consecutive: a stretch that starts anywhere in each row, drawn for each; random: any tokens; masked: of those that were chosen for
    mlm, of which both rows must have so many."""
    most: int | None = Field(default=None, ge=1)
    """At most so many tokens."""


def paired(drafted: Iterable[list[Draft]], seed: int, number_of_copy: int) -> Iterator[list[Draft]]:
    """All drafts of a masking copy in pairs: of each split, WINDOW at a time in an order drawn by ``seed``, two by two."""
    waiting: dict[str, list[Draft]] = {}
    windows = 0
    for drafts in drafted:
        for draft in drafts:
            own = waiting.setdefault(draft.record.split, [])
            own.append(draft)
            if len(own) == WINDOW:
                yield from _pairs(own, seed, number_of_copy, windows)
                own.clear()
                windows += 1
    for own in waiting.values():
        yield from _pairs(own, seed, number_of_copy, windows)
        windows += 1


def _pairs(drafts: list[Draft], seed: int, number_of_copy: int, window: int) -> Iterator[list[Draft]]:
    order = _raw(seed, _MIX, (number_of_copy, window, 0), len(drafts)).argsort(kind="stable").tolist()
    for first, second in zip(order[0::2], order[1::2], strict=False):
        yield [drafts[first], drafts[second]]


def planned(rows: list[Row], address: tuple[int, int], spec: InterchangeSpec, seed: int) -> list[Row]:
    """A pair of ``rows`` with what each takes of the other (store.pairs).

    Args:
        address: Record and part of the first one; with the masking copy they tell its draws from all others.
    """
    one, other = rows
    record, part = address
    lengths = len(one.input_ids), len(other.input_ids)
    count = int(spec.share * min(lengths))
    raw = _raw(seed, _PLAN, (one.copy, part, record), 3 + sum(lengths))
    orders = raw[3 : 3 + lengths[0]], raw[3 + lengths[0] :]
    candidates = [np.arange(length) for length in lengths]
    if spec.positions == "masked":
        candidates = [np.flatnonzero(row.token_labels != IGNORED) for row in rows]
        count = min(count, *map(len, candidates))
    count = count if spec.most is None else min(count, spec.most)
    if spec.positions == "consecutive":
        starts = [int(raw[side] % np.uint64(lengths[side] - count + 1)) for side in (0, 1)]
        chosen = [np.arange(start, start + count) for start in starts]
    else:
        chosen = [
            np.sort(some[order[some].argsort(kind="stable")[:count]]) for some, order in zip(candidates, orders, strict=True)
        ]  # of the candidates those with the smallest numbers
    plans = [np.full(length, -1, np.int32) for length in lengths]
    plans[0][chosen[0]], plans[1][chosen[1]] = chosen[1], chosen[0]
    draw = int(raw[2] >> np.uint64(33))
    return [replace(row, interchange=plan, draw=draw) for row, plan in zip(rows, plans, strict=True)]


def _raw(seed: int, purpose: int, address: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
    raw: NDArray[np.uint64] = np.random.Philox(key=[seed, purpose], counter=[0, *address]).random_raw(count)
    return raw
