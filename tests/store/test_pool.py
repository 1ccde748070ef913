"""The units that training draws from: of a split and a masking copy, whole groups, in the order of their rows."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_store import Group, make

from store import Store
from store.filters import Labels, Range, Where
from store.pool import pools

GROUP = st.builds(
    Group,
    st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    st.sampled_from(["train", "dev"]),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from(["data/news-1.jsonl", "data/news-2.jsonl", "wiki/a.parquet"]),
)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(GROUP, min_size=1, max_size=14),
    copies=st.integers(1, 3),
    split=st.sampled_from([None, "train", "dev"]),
    limits=st.none() | st.tuples(st.integers(0, 20), st.integers(20, 40)),
    labels=st.none() | st.sampled_from([(0,), (1, 2), ("fine",), ("bad", 2)]),
    source=st.sampled_from([(), ("news-*",), ("wiki/*", "data/news-2.jsonl")]),
    large=st.booleans(),
    data=st.data(),
)
def test_units_are_the_whole_groups_that_meet_the_conditions(groups, copies, split, limits, labels, source, large, data) -> None:
    numbers = {"bad": 0, "fine": 1, "good": 2}

    def chosen(group: Group) -> bool:
        return (
            split in (None, group.split)
            and (limits is None or all(limits[0] <= length <= limits[1] for length in group.lengths))
            and (labels is None or group.label in [numbers.get(label, label) for label in labels])
            and (not source or (source == ("news-*",)) == ("news" in group.source) or (len(source) == 2 and "news-2" in group.source))
        )

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        rows = make(Path(folder) / "store", groups, copies)
        if large:
            patch.setattr("store.table.SMALL", 0)
            patch.setattr("store.pool.REMEMBERED", 2)
        store = Store.open(Path(folder) / "store")
        if split is not None and split not in store.rows.splits:
            with pytest.raises(ValueError, match="has no split"):
                pools(store, split)
            return
        conditions = {
            **({"length": Range(min=limits[0], max=limits[1])} if limits else {}),
            **({"label": Labels(values=labels)} if labels else {}),
            **({"source": source} if source else {}),
        }
        where = Where(**conditions) if conditions else None
        expected = [
            [
                [row for row in range(len(rows)) if (rows[row].group, rows[row].copy) == (copy * len(groups) + number, copy)]
                for number, group in enumerate(groups)
                if chosen(group)
            ]
            for copy in range(copies)
        ]
        if where is not None and not any(expected):
            with pytest.raises(ValueError, match="no row meets where"):
                pools(store, split, where)
            return
        found = pools(store, split, where)
        assert len(found) == copies
        for units, pool in zip(expected, [pickle.loads(pickle.dumps(one)) for one in found], strict=True):
            assert len(pool) == len(units) == pool.counts.sum()
            assert pool.rows == sum(map(len, units))
            assert (
                pool.counts.tolist()
                == np.bincount(store.rows.at(np.array([unit[0] for unit in units], int)).slot, minlength=store.rows.info.slots).tolist()
            )
            if not units:
                continue
            asked = np.array(data.draw(st.lists(st.integers(0, len(units) - 1), min_size=1, max_size=20)))
            assert pool.take(asked).tolist() == [row for unit in asked for row in units[unit]]
            assert pool.lengths(asked).tolist() == [max(len(rows[row].input_ids) for row in units[unit]) for unit in asked]


def test_rows_of_a_large_store_that_are_units_of_their_own_are_found_without_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "store", [Group((20,))] * 30 + [Group((20,), "dev")] * 2)
    monkeypatch.setattr("store.table.SMALL", 0)
    (pool,) = pools(Store.open(tmp_path / "store"), "train")
    assert pool.counts.tolist() == [6, 6, 6, 6, 6, 0]
    monkeypatch.setattr("store.table.RowTable.in_slot", lambda table, slot: pytest.fail("looked"))
    assert pool.take(np.array([29, 0, 13])).tolist() == [29, 0, 13]


def test_what_leaves_nothing_says_how_many_rows_each_condition_left(tmp_path: Path) -> None:
    groups = [Group((length, 9), label=length % 3, source=f"part-{length % 7}.txt") for length in range(10, 40)]
    make(tmp_path / "store", [*groups, Group((5,), "dev")])
    store = Store.open(tmp_path / "store")
    with pytest.raises(ValueError, match=r"no row meets where: split 'train' has 60 rows; length leaves 20, then label leaves 0$"):
        pools(store, "train", Where(length=Range(min=20), label=Labels(min=2.5)))
    with pytest.raises(ValueError, match=r"length leaves 20, but no group of rows that belong together is left whole"):
        pools(store, "train", Where(length=Range(min=20)))
    with pytest.raises(ValueError, match=r"it has 61 rows; source leaves 0; its sources are data/news-1.jsonl, part-0.txt, .* \.\.\.$"):
        pools(store, None, Where(source=("nowhere*",)))
    with pytest.raises(ValueError, match="has no class 'godo'; did you mean 'good'"):
        pools(store, "train", Where(label=Labels(values=("godo",))))
