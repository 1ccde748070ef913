"""Which rows a student is measured on, and in which batches."""

from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from student_train.evaluate import HeldOut, held_out_rows
from student_train.evaluate import batches as measured_in


def test_held_out_rows_are_the_first_of_a_split_and_never_cut_a_group(tiny: ModuleType, tmp_path: Path) -> None:
    store = tiny.write_rows(tmp_path / "store", rows=12)
    assert held_out_rows(store, "train", 5).tolist() == [0, 1, 2, 3, 4]
    assert len(held_out_rows(store, "train", None)) == 12
    store = tiny.write_rows(tmp_path / "threes", rows=12, group=3)
    assert held_out_rows(store, "train", 4).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="no split 'dev'"):
        held_out_rows(store, "dev", None)


def test_batches_to_measure_on_never_cut_a_group(tiny: ModuleType, tmp_path: Path) -> None:
    for size in (1, 3, 40):
        store = tiny.write_rows(tmp_path / f"store-{size}", rows=90, group=size)
        groups = np.arange(90) // size
        batches = [rows.tolist() for rows in measured_in(HeldOut(store, np.arange(90), None, False, ""))]
        assert [row for batch in batches for row in batch] == list(range(90))
        assert all(len(batch) <= max(32, size) for batch in batches)
        assert not any(groups[one[-1]] == groups[other[0]] for one, other in pairwise(batches))
