"""Random numbers that follow from a text: from a row's token ids and a token's place in it, and nothing else.

So words that are drawn for a token are the same in every batch, on every rank and device and in every run, and differ between two maskings
of a text. online.seeds computes the same bits on a device. All of it is the generator SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators"): a seed, to which an odd constant is added for each number, and a mixing function.

Shapes: T tokens of a row, n tokens, C numbers of each.
"""

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""

BITS = 48
"""Of a uniform number: few enough that it stays below 1 when it is rounded to float64, or multiplied with a whole number."""

Seeds = NDArray[np.uint64]


def mixed(values: Seeds) -> Seeds:
    """64 bits, each of which depends on all of those given; one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(SECOND)
    return values ^ (values >> np.uint64(31))


def token_seeds(input_ids_T: NDArray[np.int64]) -> Seeds:
    """[T] a seed for each token of a row without padding."""
    places_T = mixed(np.arange(1, len(input_ids_T) + 1, dtype=np.uint64))
    row = mixed(places_T ^ input_ids_T.astype(np.uint64)).sum(dtype=np.uint64)
    return mixed(row ^ places_T)


def uniforms(seeds_n: Seeds, count: int) -> NDArray[np.float64]:
    """[n, C] independent numbers of each seed, C = ``count``, between 0 and 1 and never either."""
    steps_C = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    bits_nC = mixed(seeds_n[:, None] + steps_C) >> np.uint64(64 - BITS)
    return (bits_nC.astype(np.float64) + 0.5) * 2.0**-BITS
