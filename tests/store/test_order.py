"""The order of rows: each unit once an epoch, the same steps for any number of ranks, from any position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import GROUPS, make_store

from store import Store
from store.order import Order, Source, Units, source_of, units_of


def single(size: int, first: int = 0) -> Units:
    """Units of one row each, numbered from ``first``."""
    return Units(np.arange(first, first + size), np.arange(size + 1))


SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 60), step_units=st.integers(1, 24), epochs=st.integers(1, 4))
def test_every_unit_comes_once_an_epoch_and_epochs_share_a_step(seed: int, size: int, step_units: int, epochs: int) -> None:
    order = Order((Source((single(size),)),), step_units, seed)
    stream = np.concatenate([order.step(step)[1] for step in range(-(-epochs * size // step_units))])
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=120, deadline=None)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 3), min_size=3, max_size=3),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)),
    step=st.integers(0, 10**6),
)
def test_ranks_and_accumulation_cut_a_step_without_changing_it(seed, sizes, weights, shape, step) -> None:
    world, accumulation, more = shape
    sources = tuple(
        Source((single(size, 100 * number),), weight) for number, (size, weight) in enumerate(zip(sizes, weights, strict=False))
    )
    order = Order(sources, world * accumulation + more, seed)
    source, rows = order.step(step)
    assert len(rows) == order.step_units
    assert set(rows // 100) == {source}
    parts = [order.part(step, rank, world, slot, accumulation) for slot in range(accumulation) for rank in range(world)]
    assert {number for number, _ in parts} == {source}
    assert np.concatenate([rows for _, rows in parts]).tolist() == rows.tolist()
    assert max(len(rows) for _, rows in parts) - min(len(rows) for _, rows in parts) <= 1


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, start=st.integers(0, 200))
def test_a_step_is_the_same_whether_or_not_earlier_ones_were_asked_for(seed: int, start: int) -> None:
    def order() -> Order:
        return Order((Source((single(17),)), Source((single(9, 100), single(9, 200)), 0.5)), 4, seed)

    walked = [order().step(step) for step in range(start + 3)]
    for step in (start, start + 2):
        source, rows = order().step(step)
        assert (source, rows.tolist()) == (walked[step][0], walked[step][1].tolist())


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(4, 50), min_size=1, max_size=4), weights=st.lists(st.floats(0.2, 3), min_size=4, max_size=4))
def test_in_a_cycle_each_source_takes_the_turns_of_its_weight_and_goes_on_where_it_was(seed, sizes, weights) -> None:
    sources = tuple(Source((single(size),), weight) for size, weight in zip(sizes, weights, strict=False))
    order = Order(sources, 4, seed)
    for source, turns in zip(sources, order.turns, strict=True):
        assert turns == 1 or abs(turns * 4 - source.weight * len(source)) <= 2
    taken = [0] * len(sources)
    for step in range(3 * order.steps_per_epoch):
        source, earlier = order.turn(step)
        assert earlier == taken[source]
        taken[source] += 1
    assert taken == [3 * turns for turns in order.turns]


def test_epochs_seeds_and_sources_have_orders_of_their_own() -> None:
    order = Order((Source((single(50),)), Source((single(50),))), 50, 0)
    orders = {tuple(order.stream(source, 50 * epoch, 50 * epoch + 50)) for source in (0, 1) for epoch in range(5)}
    orders |= {tuple(Order(order.sources, 50, seed).stream(0, 0, 50)) for seed in range(1, 5)}
    assert len(orders) == 14


def test_the_order_stays_the_same_from_release_to_release() -> None:
    order = Order((Source((single(10),)),), 5, 7)
    assert [order.step(step)[1].tolist() for step in range(2)] == [[8, 4, 1, 6, 3], [2, 7, 5, 9, 0]]


def test_epochs_take_the_masking_copies_in_turn() -> None:
    order = Order((Source((single(6), single(6, 100), single(6, 200))),), 4, 1)
    stream = np.concatenate([order.step(step)[1] for step in range(9)])
    assert (stream // 100).tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [0] * 6 + [1] * 6 + [2] * 6
    for epoch in range(6):
        assert sorted(stream[6 * epoch : 6 * epoch + 6] % 100) == list(range(6))


def test_rows_of_a_unit_stay_together_in_their_order() -> None:
    rows, groups = np.array([3, 4, 5, 8, 9, 20]), np.array([7, 7, 7, 2, 2, 9])
    units = units_of(rows, groups)
    assert units.starts.tolist() == [0, 3, 5, 6]
    assert units.take(np.array([1, 0, 1])).tolist() == [8, 9, 3, 4, 5, 8, 9]
    stream = Order((Source((units,)),), 3, 0).step(0)[1].tolist()
    whole = {3: [3, 4, 5], 8: [8, 9], 20: [20]}
    while stream:
        unit = whole.pop(stream[0])
        assert stream[: len(unit)] == unit
        stream = stream[len(unit) :]
    assert not whole


def test_a_split_of_a_store_is_a_source(tmp_path) -> None:
    made = make_store(tmp_path / "store", GROUPS)
    train = source_of(Store.open(made.path).rows, "train", 2.0)
    assert [train.copies[0].take(np.array([unit])).tolist() for unit in range(len(train))] == [[0], [1, 2], [3], [5], [6], [7]]
    assert train.weight == 2.0


def test_what_cannot_be_shared_or_ordered_is_refused() -> None:
    one = Source((single(3),))
    with pytest.raises(ValueError, match="4 units cannot be shared by 3 ranks with 2 accumulation steps"):
        Order((one,), 4, 0).part(0, 0, 3, 0, 2)
    for wrong in (
        lambda: Source((single(3), single(4))),
        lambda: Source((single(0),)),
        lambda: Source(()),
        lambda: Source((single(3),), 0.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    for sources, step_units, seed in [((), 4, 0), ((one,), 0, 0), ((one,), 1, -1)]:
        with pytest.raises(ValueError, match="expected"):
            Order(sources, step_units, seed)
