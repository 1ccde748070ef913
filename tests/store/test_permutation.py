"""Permutations by places: bijections for any size, and random enough that no statistic tells them from a shuffled list."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from store.permutation import ROUNDS, Permutation, Stream

WORD = st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), stream=st.builds(Stream, WORD, WORD, WORD, WORD, WORD))
def test_every_number_comes_once(size: int, stream: Stream) -> None:
    assert np.array_equal(np.sort(Permutation(size, stream)(np.arange(size))), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**12), seed=WORD, data=st.data())
def test_places_can_be_asked_for_in_any_company(size: int, seed: int, data: st.DataObject) -> None:
    size = min(size, 10**9)
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40)))
    permutation = Permutation(size, Stream(seed))
    found = permutation(places)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == len(set(places.tolist()))
    assert [int(permutation(np.array([place]))[0]) for place in places] == found.tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_numbers_are_equally_likely(size: int) -> None:
    seen = Counter(tuple(Permutation(size, Stream(1, epoch=epoch))(np.arange(size)).tolist()) for epoch in range(60 * math.factorial(size)))
    found = [seen[order] for order in itertools.permutations(range(size))]
    assert stats.chisquare(found).pvalue > 1e-3


def test_each_place_holds_each_number_equally_often() -> None:
    size, draws = 37, 3000
    table = np.zeros((size, size))
    for epoch in range(draws):
        table[np.arange(size), Permutation(size, Stream(2, epoch=epoch))(np.arange(size))] += 1
    chi2 = float(((table - draws / size) ** 2 / (draws / size)).sum())
    assert 1e-3 < stats.chi2.sf(chi2, (size - 1) ** 2) < 1 - 1e-3


@pytest.mark.parametrize("size", [10_007, 65_536, 1_000_003])
def test_long_orders_look_shuffled(size: int) -> None:
    """Number of inversions by neighbours, distance of neighbours, fixed points, spread over blocks, and serial correlation."""
    order = Permutation(size, Stream(3))(np.arange(size))
    rises = int((np.diff(order) > 0).sum())
    assert abs(rises - (size - 1) / 2) < 4 * math.sqrt((size + 1) / 12)
    for lag in (1, 2, math.isqrt(size), 2 * (math.isqrt(size) // 2 + 1)):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 4 / math.sqrt(size)
        distance = (order[lag:] - order[:-lag]) % size
        assert stats.kstest(distance / size, "uniform").pvalue > 1e-3
    assert (order == np.arange(size)).sum() < 9  # Poisson with mean 1
    blocks = np.zeros((20, 20))
    np.add.at(blocks, (np.arange(size) * 20 // size, order * 20 // size), 1)
    expected = size / 400
    assert 1e-3 < stats.chi2.sf(float(((blocks - expected) ** 2 / expected).sum()), 19**2) < 1 - 1e-3


def test_streams_are_independent() -> None:
    size = 5000
    orders = [
        Permutation(size, Stream(*words))(np.arange(size)) for words in ((4,), (5,), (4, 1), (4, 0, 1), (4, 0, 0, 1), (4, 0, 0, 0, 1))
    ]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 9
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(size)


def test_the_numbers_are_those_of_the_definition_in_every_release() -> None:
    def defined(place: int, size: int, numbers: list[int]) -> int:
        lefts = next(n for n in range(2, size + 3, 2) if n * n >= size)
        rights = -(-size // lefts)
        left, right = place // rights, place % rights
        for number in range(ROUNDS):
            left = (left + numbers[number * rights + right]) % lefts
            right = (right + numbers[ROUNDS * rights + number * lefts + left]) % rights
        found = left * rights + right
        return found if found < size else defined(found, size, numbers)

    assert Permutation(10, Stream(7))(np.arange(10)).tolist() == [7, 3, 9, 2, 6, 4, 1, 8, 5, 0]
    for size in (1, 2, 10, 99, 1000):
        philox = np.random.Philox(key=np.array([7, 1], np.uint64), counter=np.array([0, 3, 4, 2], np.uint64))
        numbers = [int(number) for number in philox.random_raw(10_000)]
        found = Permutation(size, Stream(seed=7, source=1, epoch=2, purpose=3, part=4))(np.arange(size))
        assert found.tolist() == [defined(place, size, numbers) for place in range(size)]
