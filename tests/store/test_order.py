"""The order of rows: each unit once an epoch, the same steps for any number of ranks, from any position."""

import time
import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.order import Order, Source
from store.table import Ints


class Numbers:
    """A pool of units of one row each, numbered from ``first``; unit u has (7919 u mod 97) + 1 tokens."""

    def __init__(self, counts: Iterable[int], first: int = 0) -> None:
        self.counts = np.array(list(counts), np.int64)
        self.rows = int(self.counts.sum())
        self.offset = first

    def take(self, units: Ints) -> Ints:
        assert ((units >= 0) & (units < self.rows)).all()
        return units + self.offset

    def lengths(self, units: Ints) -> Ints:
        return units * 7919 % 97 + 1


def single(size: int, first: int = 0) -> Numbers:
    return Numbers([size], first)


SEEDS = st.integers(0, 2**64 - 1)
COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)
ORDERS = st.fixed_dictionaries(
    {"shuffle": st.sampled_from(["random", "block"]), "window": st.integers(1, 5), "by_length": st.none() | st.integers(1, 5)}
)


@settings(max_examples=250, deadline=None)
@given(seed=SEEDS, counts=COUNTS, how=ORDERS, step_units=st.integers(1, 24), epochs=st.integers(1, 4))
def test_every_unit_comes_once_an_epoch_and_epochs_share_a_step(seed, counts, how, step_units, epochs) -> None:
    order, size = Order((Source([Numbers(counts)], **how),), step_units, seed), sum(counts)
    stream = np.concatenate([order.step(step)[1] for step in range(-(-epochs * size // step_units))])
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=250, deadline=None)
@given(
    seed=SEEDS,
    counts=st.lists(COUNTS, min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 3), min_size=3, max_size=3),
    how=st.lists(ORDERS, min_size=3, max_size=3),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)),
    step=st.integers(0, 10**6),
)
def test_ranks_and_accumulation_cut_a_step_without_changing_it(seed, counts, weights, how, shape, step) -> None:
    """The same global steps for any world: a run may go on with another number of ranks."""
    world, accumulation, more = shape
    sources = tuple(Source([Numbers(slots, 1000 * number)], weights[number], **how[number]) for number, slots in enumerate(counts))
    order = Order(sources, world * accumulation + more, seed)
    source, rows = order.step(step)
    assert len(rows) == order.step_units
    assert set(rows // 1000) == {source}
    parts = [order.part(step, rank, world, slot, accumulation) for slot in range(accumulation) for rank in range(world)]
    assert {number for number, _ in parts} == {source}
    assert np.concatenate([rows for _, rows in parts]).tolist() == rows.tolist()
    assert max(len(rows) for _, rows in parts) - min(len(rows) for _, rows in parts) <= 1


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, start=st.integers(0, 200), how=ORDERS, others=st.lists(st.integers(0, 500), max_size=5))
def test_a_step_is_the_same_whatever_was_asked_for_before(seed, start, how, others) -> None:
    def order() -> Order:
        return Order((Source([Numbers([9, 3, 5])], **how), Source([Numbers([9], 100), Numbers([4, 5], 200)], 0.5, **how)), 4, seed)

    walking, jumping = order(), order()
    walked = [walking.step(step) for step in range(start + 1)]
    for other in others:
        jumping.step(other)
    for found in (order().step(start), jumping.step(start)):
        assert (found[0], found[1].tolist()) == (walked[start][0], walked[start][1].tolist())


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(4, 50), min_size=1, max_size=5), weights=st.lists(st.floats(0.2, 3), min_size=5, max_size=5))
def test_in_a_cycle_each_source_takes_the_turns_of_its_weight_and_goes_on_where_it_was(seed, sizes, weights) -> None:
    sources = tuple(Source([single(size)], weight) for size, weight in zip(sizes, weights, strict=False))
    order = Order(sources, 4, seed)
    for source, turns in zip(sources, order.turns, strict=True):
        assert turns == 1 or abs(turns * 4 - source.weight * source.units) <= 2
    taken = np.zeros(len(sources), int)
    for step in range(3 * order.steps_per_epoch):
        source, earlier = order.turn(step)
        assert earlier == taken[source]
        taken[source] += 1
        done = (step + 1) / order.steps_per_epoch
        assert np.abs(taken - done * np.array(order.turns)).max() <= len(sources) + 1  # mixed evenly all the way
    assert taken.tolist() == [3 * turns for turns in order.turns]


@pytest.mark.parametrize("how", [{}, {"shuffle": "block"}, {"by_length": 1}])
def test_epochs_seeds_and_sources_have_orders_of_their_own(how) -> None:
    order = Order((Source([Numbers([10] * 5)], **how), Source([Numbers([10] * 5)], **how)), 5, 0)
    orders = {tuple(order.stream(source, 50 * epoch, 50 * epoch + 50)) for source in (0, 1) for epoch in range(5)}
    orders |= {tuple(Order(order.sources, 5, seed).stream(0, 0, 50)) for seed in range(1, 5)}
    assert len(orders) == 14


def test_the_order_stays_the_same_from_release_to_release() -> None:
    pool = Numbers([4, 6])
    for how, expected in [
        ({}, [[7, 3, 9, 2, 6], [4, 1, 8, 5, 0]]),
        ({"shuffle": "block", "window": 1}, [[4, 5, 7, 8, 6], [9, 1, 0, 2, 3]]),
        ({"by_length": 2}, [[4, 1, 9, 6, 3], [0, 8, 5, 2, 7]]),
    ]:
        order = Order((Source([pool], **how),), 5, 7)
        assert [order.step(step)[1].tolist() for step in range(2)] == expected


def test_epochs_take_the_masking_copies_in_turn_even_if_a_filter_left_them_unequal() -> None:
    order = Order((Source([single(6), single(4, 100), single(5, 200)]),), 4, 1)
    stream = np.concatenate([order.step(step)[1] for step in range(8)])[:30]
    assert (stream // 100).tolist() == [0] * 6 + [1] * 4 + [2] * 5 + [0] * 6 + [1] * 4 + [2] * 5
    for start, size in [(0, 6), (6, 4), (10, 5), (15, 6), (21, 4), (25, 5)]:
        assert sorted(stream[start : start + size] % 100) == list(range(size))
    assert order.steps_per_epoch == round(5 / 4)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, counts=COUNTS, window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_block_order_finishes_a_window_of_slots_before_the_next(seed, counts, window, epoch) -> None:
    size, filled = sum(counts), sum(map(bool, counts))
    order = Order((Source([Numbers(counts)], shuffle="block", window=window),), 1, seed)
    stream = order.stream(0, epoch * size, (epoch + 1) * size)
    slots = np.searchsorted(np.cumsum(counts), stream, "right")
    begun: list[set[int]] = [set()]
    for place, slot in enumerate(slots.tolist()):
        begun[-1].add(slot)
        if all(np.isin(np.flatnonzero(slots == each), np.arange(place + 1)).all() for each in begun[-1]) and place + 1 < size:
            begun.append(set())
    assert all(len(touched) <= window for touched in begun)
    assert sum(map(len, begun)) == filled


def test_block_order_mixes_slots_and_rows() -> None:
    counts = np.full(64, 50)
    order = Order((Source([Numbers(counts)], shuffle="block", window=8),), 32, 5)
    stream = order.stream(0, 0, 3200)
    slots = stream // 50
    windows = [set(slots[400 * number : 400 * number + 400].tolist()) for number in range(8)]
    assert all(len(window) == 8 for window in windows)
    assert set().union(*windows) == set(range(64))
    assert windows[0] != set(range(8))
    first = slots[:400]
    assert len(np.unique(first[:32])) >= 6  # the first step sees most of the window's slots
    assert np.abs(np.bincount(np.searchsorted(sorted(windows[0]), first[:200]), minlength=8) - 25).max() < 16


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    size=st.integers(60, 400),
    step_units=st.integers(2, 12),
    by_length=st.integers(1, 8),
    shuffle=st.sampled_from(["random", "block"]),
)
def test_by_length_rearranges_stretches_of_the_same_order(seed, size, step_units, by_length, shuffle) -> None:
    """Each stretch of ``by_length`` steps holds what it holds without; its whole steps are runs of the sorted lengths."""
    pool = Numbers([size // 2, size - size // 2])
    mixed, sorted_ = (
        Order((Source([pool], shuffle=shuffle, window=1, by_length=stretch),), step_units, seed) for stretch in (None, by_length)
    )
    stretch = by_length * step_units
    for begin in range(0, size - stretch + 1, stretch):
        plain, ours = mixed.stream(0, begin, begin + stretch), sorted_.stream(0, begin, begin + stretch)
        assert sorted(plain) == sorted(ours)
        steps = sorted(np.sort(pool.lengths(step)).tolist() for step in ours.reshape(-1, step_units))
        assert np.concatenate(steps).tolist() == sorted(pool.lengths(plain).tolist())


def test_by_length_saves_padding_and_mixes_steps() -> None:
    rng = np.random.default_rng(0)

    class Lognormal(Numbers):
        tokens = np.clip(rng.lognormal(4, 0.6, 20_000), 4, 512).astype(np.int64)

        def lengths(self, units: Ints) -> Ints:
            return self.tokens[units]

    pool = Lognormal([20_000])

    def padded(by_length: int | None) -> tuple[float, list[int]]:
        order = Order((Source([pool], by_length=by_length),), 32, 1)
        steps = [pool.tokens[order.step(step)[1]] for step in range(order.steps_per_epoch)]
        return sum(len(step) * step.max() for step in steps) / pool.tokens.sum(), [int(step.max()) for step in steps]

    (plain, _), (saved, longest) = padded(None), padded(64)
    assert plain > 2.5
    assert saved < 1.15
    rank = np.corrcoef(longest[:-1], longest[1:])[0, 1]
    assert abs(rank) < 0.15  # long and short steps follow one another as they come


@pytest.mark.parametrize("how", [{}, {"shuffle": "block"}, {"shuffle": "block", "by_length": 16}])
def test_a_step_of_a_billion_rows_is_found_at_once(how) -> None:
    rng = np.random.default_rng(1)
    pool = Numbers(rng.integers(0, 4000, 500_000))
    assert pool.rows > 9e8
    tracemalloc.start()
    order = Order((Source([pool], **how), Source([single(10**6)], 0.5)), 1024, 3)
    order.step(7)  # looks at every slot once an epoch
    times = []
    for step in rng.integers(0, 900_000, 9).tolist():
        begun = time.perf_counter()
        for rank in range(2):
            rows = order.part(step, rank, 8)[1]
            assert len(np.unique(rows)) == 128
        times.append((time.perf_counter() - begun) / 2)
    assert np.median(times) < 0.01
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def test_what_cannot_be_shared_or_ordered_is_refused() -> None:
    one = Source([single(3)])
    with pytest.raises(ValueError, match="4 units cannot be shared by 3 ranks with 2 accumulation steps"):
        Order((one,), 4, 0).part(0, 0, 3, 0, 2)
    for wrong in (
        lambda: Source([single(0)]),
        lambda: Source([single(3)], 0.0),
        lambda: Source([single(3)], window=0),
        lambda: Source([single(3)], by_length=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    for sources, step_units, seed in [((), 4, 0), ((one,), 0, 0), ((one,), 1, -1)]:
        with pytest.raises(ValueError, match="expected"):
            Order(sources, step_units, seed)
