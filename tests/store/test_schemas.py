"""Stores of every past schema open and give what was put into them. ``schemas/<n>`` was written by the code of its time."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_store import SPECS, make_store

from store import Store, StoreError, StoreWriter
from store.manifest import SCHEMA
from store.verify import verify

KEPT = Path(__file__).parent / "schemas"
GROUPS = [[(30, 3)], [(7, 0), (9, 9)], [(128, 17)], [(20, 2)]]
"""The rows of the kept stores, as small_store makes them."""


def test_a_store_of_every_past_schema_is_kept() -> None:
    assert sorted(path.name for path in KEPT.iterdir()) == [str(version) for version in range(1, SCHEMA)]


@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_an_older_store_reads_like_one_written_today(version: int, tmp_path: Path) -> None:
    made = make_store(tmp_path / "today", GROUPS)
    old, today = Store.open(KEPT / str(version)), Store.open(made.path)
    rows = np.array([4, 0, 2, 1, 3, 0])
    for feature in SPECS:
        key = feature.feature.of("bert")
        assert old.spec(key) == today.spec(key)
        for name, values in today.read(key, rows).items():
            assert values.dtype == old.read(key, rows)[name].dtype
            assert values.tobytes() == old.read(key, rows)[name].tobytes()
    for array in today.manifest.rows.token_arrays:
        np.testing.assert_array_equal(old.tokens(array.name, rows), today.tokens(array.name, rows))
    for name, value in vars(today.rows.at(rows)).items():
        np.testing.assert_array_equal(getattr(old.rows.at(rows), name), value, name)
    np.testing.assert_array_equal(old.rows.label_at(rows), today.rows.label_at(rows))
    assert [old.rows.about(row) for row in range(5)] == [today.rows.about(row) for row in range(5)]
    assert old.rows.table.equals(today.rows.table)
    for name, weight in today.statics("bert").items():
        np.testing.assert_array_equal(old.statics("bert")[name], weight)
    assert old.manifest.rows.corpus == today.manifest.rows.corpus
    assert old.manifest.passes["bert"].batch_tokens is None
    assert verify(KEPT / str(version)) == []


@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_an_older_store_is_not_written_to(version: int, tmp_path: Path) -> None:
    shutil.copytree(KEPT / str(version), tmp_path / "old")
    with pytest.raises(StoreError, match="only read; write it as 6 with: teacher-dump copy"):
        StoreWriter.open(tmp_path / "old")
