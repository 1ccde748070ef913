"""Pairs of rows that take hidden states of one another: what is frozen of it with the rows (Geiger et al. 2021, interchange intervention).

The two rows of a group of a paired store are partners. ``interchange`` says for each token which token of the partner takes its place
in an intervention, -1 for none; each row is the source of the other, so the two arrays are each other's inverse. ``draw`` is a random
number from 0 on, the same for both: alternative ``draw % n`` of n holds for the pair.

Shapes: B rows, U tokens of all of them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]


def stand_in_pairs(rows_B: Ints, groups_B: Ints) -> bool:
    """Whether rows 0 and 1, 2 and 3 and so on are partners: different rows of one group."""
    one, other = slice(0, None, 2), slice(1, None, 2)
    even = len(rows_B) % 2 == 0
    return even and bool((groups_B[one] == groups_B[other]).all() and (rows_B[one] != rows_B[other]).all())


def sound(interchange_U: Ints, lengths_B: Ints, draws_B: Ints) -> bool:
    """Whether this is what rows that stand in pairs can have: every token that is taken takes the token that takes it."""
    if (draws_B < 0).any() or (draws_B[0::2] != draws_B[1::2]).any() or (interchange_U < -1).any():
        return False
    lengths_B = lengths_B.astype(np.int64)
    starts_B = np.cumsum(lengths_B) - lengths_B
    row_U = np.repeat(np.arange(len(lengths_B)), lengths_B)
    taking = np.flatnonzero(interchange_U >= 0)
    partner, index = row_U[taking] ^ 1, interchange_U[taking].astype(np.int64)
    if (index >= lengths_B[partner]).any():
        return False
    return np.array_equal(interchange_U[starts_B[partner] + index], taking - starts_B[row_U[taking]])
