"""Random permutations that are asked for a few places at a time: a keyed bijection instead of a shuffled list.

A number below a * b is a pair (left, right); in each round one half moves by a random function of the other: left by
F(right) modulo a, right by G(left) modulo b. Every round can be undone, so that together they are a bijection, whatever the
functions are (a Feistel network; J. Black and P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002). Results
beyond the wanted size go through it again until they are below ("cycle walking"). The functions are tables of raw Philox
numbers: set-up and memory are O(sqrt(size)), and the order is the same in every release of NumPy.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ROUNDS = 6
"""Rounds of each half, with functions of their own; statistics see no pattern from three on."""


class Stream(NamedTuple):
    """Which random numbers: those of different streams are independent. All from 0 to 2**64 - 1."""

    seed: int
    source: int = 0
    epoch: int = 0
    purpose: int = 0
    part: int = 0

    def numbers(self, count: int) -> NDArray[np.uint64]:
        """The first ``count`` numbers of the stream, 64 random bits each."""
        key, counter = (self.seed, self.source), (0, self.purpose, self.part, self.epoch)
        raw: NDArray[np.uint64] = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)).random_raw(count)
        return raw


class Permutation:
    """A random order of the numbers below ``size`` (at most 2**62): ``permutation(places)`` are the numbers at these places."""

    def __init__(self, size: int, stream: Stream) -> None:
        self.size = size
        # an even half, since rounds that move odd numbers of values in odd cycles give even permutations alone
        self._left = 2 * math.ceil((math.isqrt(max(size, 1) - 1) + 1) / 2)
        self._right = -(-size // self._left)
        numbers = stream.numbers(ROUNDS * (self._left + self._right))
        cut = ROUNDS * self._right
        self._lefts = (numbers[:cut] % np.uint64(self._left)).astype(np.int64).reshape(ROUNDS, self._right)
        self._rights = (numbers[cut:] % np.uint64(max(self._right, 1))).astype(np.int64).reshape(ROUNDS, self._left)

    def __call__(self, places: Ints) -> Ints:
        numbers = self._once(places)
        while len(beyond := np.flatnonzero(numbers >= self.size)):
            numbers[beyond] = self._once(numbers[beyond])
        return numbers

    def _once(self, numbers: Ints) -> Ints:
        left, right = np.divmod(numbers, self._right)
        for lefts, rights in zip(self._lefts, self._rights, strict=True):
            left += lefts[right]
            left %= self._left
            right += rights[left]
            right %= self._right
        left *= self._right
        left += right
        return left


@lru_cache(maxsize=32)
def permutation(size: int, stream: Stream) -> Permutation:
    """The same, remembered for a while."""
    return Permutation(size, stream)
