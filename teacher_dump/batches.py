"""Teacher batches: rows of one shard and one padded length, so that what pads a row never depends on its neighbours.

Shapes: B rows of a batch, U packed units of a shard or batch, W width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online.batch import BUCKET
from store.features import FeatureKey, FeatureSpec
from store.rows import Ints, RowTable
from store.shards import numpy_dtype

Arrays = dict[FeatureKey, dict[str, NDArray[Any]]]
"""Feature -> array name -> packed [units, width]."""


def rows_of(rows: RowTable, shard: int) -> Ints:
    """Numbers of the rows in a shard, ascending."""
    first, after = np.searchsorted(rows.slot, [shard, shard + 1])
    return np.arange(first, after)


def padded_lengths(rows: RowTable, members: Ints) -> Ints:
    """[B] tokens of each row with its padding."""
    return -(-rows.length[members] // BUCKET) * BUCKET


def cut(rows: RowTable, members: Ints, batch_tokens: int) -> list[Ints]:
    """``members`` cut into batches of equal padded length and at most ``batch_tokens`` padded tokens, the longest first.

    A row longer than that is a batch of its own.
    """
    padded = padded_lengths(rows, members)
    batches = []
    for length in np.unique(padded)[::-1].tolist():
        same = members[padded == length]
        at_once = max(1, batch_tokens // length)
        batches += [same[start : start + at_once] for start in range(0, len(same), at_once)]
    return batches


class ShardBuffer:
    """The arrays of one shard while its batches come in, in whatever order."""

    def __init__(self, rows: RowTable, shard: int, specs: Sequence[FeatureSpec]) -> None:
        self._rows = rows
        self.arrays: Arrays = {}
        for spec in specs:
            units = int(rows.units(spec.feature.positions)[2][shard])
            self.arrays[spec.feature] = {array.name: np.empty((units, array.width), numpy_dtype(array)) for array in spec.arrays}

    def place(self, members: Ints, answers: Arrays) -> None:
        """Put what was captured for the rows ``members``, packed in their order, where these rows lie in the shard."""
        for key, arrays in answers.items():
            first, count, _ = self._rows.units(key.positions)
            units = _ranges(first[members], count[members])
            for name, values in arrays.items():
                self.arrays[key][name][units] = values


def _ranges(first: Ints, count: Ints) -> Ints:
    """The numbers from ``first`` on, ``count`` of them, for each pair in turn."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()))
