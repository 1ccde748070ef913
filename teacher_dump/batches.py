"""Teacher batches: rows of one shard and one padded length, so that what pads a row never depends on its neighbours.

Rows in pairs (store.pairs) are padded as the longer of both, and stand in one batch.

Shapes: B rows of a batch, U packed units of a shard or batch, W width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online.batch import BUCKET
from store.features import FeatureKey, FeatureSpec
from store.shards import numpy_dtype
from store.table import Ints, RowTable

Arrays = dict[FeatureKey, dict[str, NDArray[Any]]]
"""Feature -> array name -> packed [units, width]."""


def rows_of(rows: RowTable, shard: int) -> Ints:
    """Numbers of the rows in a shard, ascending."""
    return rows.rows_of(shard)


def padded_lengths(rows: RowTable, members: Ints) -> Ints:
    """[B] tokens of each row with its padding."""
    lengths = rows.at(members).length
    if rows.info.paired and len(members):
        starts = np.flatnonzero(np.diff(members // 2, prepend=-1))
        lengths = np.repeat(np.maximum.reduceat(lengths, starts), np.diff(starts, append=len(members)))
    return -(-lengths // BUCKET) * BUCKET


def together(rows: RowTable) -> int:
    """Rows that a batch has at least: a whole pair."""
    return 2 if rows.info.paired else 1


def whole(rows: RowTable, members: Ints) -> Ints:
    """``members``, ascending, with the partners that are not among them; themselves where rows have none."""
    return np.unique(np.concatenate([members, members ^ 1])) if rows.info.paired else members


def padding(rows: RowTable, shards: Sequence[int]) -> float:
    """Padding tokens that a teacher computes for each real one of ``shards``; the same for batches of any size."""
    padded = sum(int(padded_lengths(rows, rows_of(rows, shard)).sum()) for shard in shards)
    return padded / max(1, int(rows.slot_tokens[list(shards)].sum())) - 1 if padded else 0.0


def cut(rows: RowTable, members: Ints, batch_tokens: int) -> list[Ints]:
    """``members`` cut into batches of equal padded length and at most ``batch_tokens`` padded tokens, the longest first.

    A row, or pair, longer than that is a batch of its own.
    """
    padded, least = padded_lengths(rows, members), together(rows)
    batches = []
    for length in np.unique(padded)[::-1].tolist():
        same = members[padded == length]
        at_once = max(least, batch_tokens // length // least * least)
        batches += [same[start : start + at_once] for start in range(0, len(same), at_once)]
    return batches


class ShardBuffer:
    """The arrays of one shard while its batches come in, in whatever order."""

    def __init__(self, rows: RowTable, shard: int, specs: Sequence[FeatureSpec]) -> None:
        self._rows = rows
        self.arrays: Arrays = {}
        for spec in specs:
            units = int(rows.slot_units(spec.feature.positions)[shard])
            self.arrays[spec.feature] = {array.name: np.empty((units, array.width), numpy_dtype(array)) for array in spec.arrays}

    def place(self, members: Ints, answers: Arrays) -> None:
        """Put what was captured for the rows ``members``, packed in their order, where these rows lie in the shard."""
        numbers = self._rows.at(members)
        for key, arrays in answers.items():
            units = _ranges(*numbers.units(key.positions))
            for name, values in arrays.items():
                self.arrays[key][name][units] = values


def _ranges(first: Ints, count: Ints) -> Ints:
    """The numbers from ``first`` on, ``count`` of them, for each pair in turn."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()))
