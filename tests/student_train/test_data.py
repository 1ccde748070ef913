"""What loader processes hand over: the items of the training process, in memory that is shared and used again."""

import gc
import multiprocessing
import os
import pickle
import shutil
from operator import itemgetter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from store.features import FeatureKey
from store.filters import Range, Sureness, Where
from store.reader import Store
from student_train import lending
from student_train.data import Failed, MicroBatches, Source
from student_train.evaluate import held_out_rows
from student_train.micro_batch import MicroBatch
from student_train.recipe import DataSpec, PhaseSpec
from student_train.teacher import StoredTeacher

HIDDEN, LOGITS = FeatureKey("hidden", 2), FeatureKey("task_logits", positions="row")
STEPS = 8


def micro_batches(
    path: Path, wanted: tuple[FeatureKey, ...] = (HIDDEN, LOGITS), rank: int = 0, world: int = 1, **rows: object
) -> MicroBatches:
    store = Store.open(path)
    source = Source(store, StoredTeacher(store, "bert", wanted) if wanted else None, pass_name="bert", **rows)
    return MicroBatches([source], batch_rows=8, accumulation=2, steps=STEPS, epochs=None, seed=3, rank=rank, world=world)


def assert_same(found: MicroBatch | Failed, expected: MicroBatch | Failed) -> None:
    assert isinstance(found, MicroBatch)
    assert isinstance(expected, MicroBatch)
    for name, value in vars(expected.batch).items():
        other = getattr(found.batch, name)
        assert (value is None) == (other is None)
        if value is not None:
            assert value.dtype == other.dtype
            assert torch.equal(value, other), name
    assert found.fetched.keys() == expected.fetched.keys()
    for key, arrays in expected.fetched.items():
        for name, array in arrays.items():
            assert found.fetched[key][name].dtype == array.dtype
            np.testing.assert_array_equal(found.fetched[key][name], array)


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"shuffle": "block", "window": 2, "by_length": 2, "where": Where(length=Range(min=5))},
        {"where": Where(entropy=Sureness(min=0.01)), "by_length": 3},
    ],
)
def test_forked_loader_processes_give_the_same_items_epoch_after_epoch(taught: Path, rows: dict[str, object]) -> None:
    data = micro_batches(taught, **rows)
    loader = DataLoader(data, collate_fn=itemgetter(0), num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for _ in range(2):
        found = list(loader)
        assert len(found) == 2 * STEPS
        for number, item in enumerate(found):
            assert_same(item, data[number])


@pytest.mark.slow
def test_spawned_loader_processes_give_the_same_items(taught: Path) -> None:
    data = micro_batches(taught, shuffle="block", window=1, where=Where(length=Range(min=5)))
    loader = DataLoader(data, collate_fn=itemgetter(0), num_workers=1, multiprocessing_context="spawn")
    for number, item in enumerate(loader):
        assert_same(item, data[number])


@pytest.mark.parametrize("wanted", [(HIDDEN, LOGITS), ()])
def test_an_item_arrives_in_one_piece_that_goes_back_when_all_of_it_is_gone(taught: Path, wanted: tuple[FeatureKey, ...]) -> None:
    data = micro_batches(taught, wanted)
    loader = DataLoader(data, collate_fn=itemgetter(0), num_workers=1, prefetch_factor=1, multiprocessing_context="fork")
    kept = []
    places = set()
    for number, item in enumerate(loader):
        memory = item.parcel.memory
        places.add(memory.ctypes.data)
        start, stop = memory.ctypes.data, memory.ctypes.data + len(memory)
        arrays = [value.numpy() for value in vars(item.batch).values() if value is not None]
        arrays += [array for value in item.fetched.values() for array in value.values()]
        assert all(start <= array.ctypes.data < stop and array.ctypes.data % 64 == 0 for array in arrays)
        assert memory[0] == 1
        if number in (1, 5):
            kept.append((number, item.batch.input_ids[:1], {key: dict(value) for key, value in item.fetched.items()}))
        del item, arrays, memory
    assert len(places) <= 5  # two in the making, and those that are kept
    for number, ids, fetched in kept:
        expected = data[number]
        assert torch.equal(ids, expected.batch.input_ids[:1])
        for key, value in fetched.items():
            for name, array in value.items():
                np.testing.assert_array_equal(array, expected.fetched[key][name])


def test_a_piece_is_lent_again_only_after_its_last_view() -> None:
    piece = lending.lend(1000)
    assert lending.lend(1000) is not piece
    view = lending.borrowed(piece)
    part = torch.from_numpy(view[64:128].view(np.float32).reshape(4, 4))[1:]
    del view
    gc.collect()
    assert piece[0] == 1
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        del part  # a forked process has no say
        os._exit(0 if piece[0] == 1 else 1)
    assert piece[0] == 1
    del part
    gc.collect()
    assert piece[0] == 0
    assert lending.lend(900) is piece
    lending.borrowed(piece)
    assert lending.lend(10 << 20) is not piece  # too small: it is let go
    lending.forget()


def test_only_the_features_that_are_wanted_are_touched(taught: Path, tmp_path: Path) -> None:
    path = shutil.copytree(taught, tmp_path / "store")
    shutil.rmtree(path / "bert" / "hidden.2")
    for item in (data := micro_batches(path, (LOGITS,))):
        assert list(item.fetched) == [LOGITS]
        if item.batch.rows.equal(data[len(data) - 1].batch.rows):
            break
    assert isinstance(micro_batches(path, (HIDDEN,))[0], Failed)


def test_two_ranks_in_two_processes_read_one_store(taught: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as ranks:
        found = [ranks.apply_async(_read, (str(taught), rank)) for rank in range(2)]
        shares = [share.get(60) for share in found]
    whole = micro_batches(taught, by_length=2)
    for step in range(STEPS):
        rows = [row for slot in range(2) for rank in range(2) for row in shares[rank][2 * step + slot][0]]
        assert rows == [row for slot in range(2) for row in whole[2 * step + slot].batch.rows.tolist()]
        most = max(shares[rank][2 * step + slot][1] for slot in range(2) for rank in range(2))
        assert most == max(float(whole[2 * step + slot].fetched[HIDDEN][""].max()) for slot in range(2))


def _read(path: str, rank: int) -> list[tuple[list[int], float]]:
    data = micro_batches(Path(path), rank=rank, world=2, by_length=2)
    return [(data[item].batch.rows.tolist(), float(data[item].fetched[HIDDEN][""].max())) for item in range(len(data))]


def test_an_item_that_was_made_here_travels_by_value(taught: Path) -> None:
    item = micro_batches(taught)[0]
    assert item.parcel is None
    assert_same(pickle.loads(pickle.dumps(item)), item)


def test_rows_of_like_length_pad_less(tiny: ModuleType, tmp_path: Path) -> None:
    store = tiny.write_rows(tmp_path / "store", rows=96)

    def padding(by_length: int | None) -> int:
        data = MicroBatches([Source(store, None, by_length=by_length)], batch_rows=8, accumulation=1, steps=12, epochs=None, seed=0)
        return sum(int((~data[item].batch.mask).sum()) for item in range(12))

    assert padding(12) < 0.7 * padding(None)


def test_what_where_leaves_is_what_is_trained_and_measured_on(taught: Path) -> None:
    store = Store.open(taught)
    where = Where(length=Range(min=8, max=12))
    wanted = [row for row in range(48) if 8 <= store.rows.columns.length[row] <= 12]
    data = MicroBatches([Source(store, None, where=where)], batch_rows=4, accumulation=1, steps=None, epochs=3, seed=0)
    seen = np.concatenate([data[item].batch.rows.numpy() for item in range(len(data))])
    assert set(seen.tolist()) == set(wanted)
    assert held_out_rows(store, "train", None, where).tolist() == wanted
    assert held_out_rows(store, "train", 3, where).tolist() == wanted[:3]


@pytest.mark.parametrize(
    ("data", "evaluate", "message"),
    [
        ({"window": 4}, {}, "window goes with shuffle: block"),
        ({"shuffle": "blocks"}, {}, "'random' or 'block'"),
        ({"where": {"entropy": {"max": 1}}, "pass_name": None}, {}, "entropy and confidence are those of a teacher: give its pass_name"),
        ({"where": {"leng": {"max": 1}}}, {}, "leng"),
        ({}, {"shuffle": "block"}, "evaluate reads rows in their order: leave out shuffle, window and by_length"),
        ({}, {"by_length": 50}, "evaluate reads rows in their order"),
    ],
)
def test_options_that_say_nothing_are_refused(data: dict[str, object], evaluate: dict[str, object], message: str) -> None:
    rest = {"name": "a", "student": {"random": {}}, "methods": [{"name": "kd"}], "steps": 1}
    with pytest.raises(ValueError, match=message):
        PhaseSpec.model_validate(
            {**rest, "data": [{"store": "s", "pass_name": "bert", **data}], "evaluate": [{"store": "s", **evaluate}], "teacher": "store"}
        )


def test_a_source_is_what_the_recipe_says(taught: Path) -> None:
    where = {"length": {"max": 12}, "entropy": {"min": 0.1}}
    spec = DataSpec.model_validate({"store": taught, "pass_name": "bert", "where": where, "shuffle": "block", "window": 3, "by_length": 9})
    ordered = Source.of(spec, Store.open(taught), None).ordered()
    assert (ordered.shuffle, ordered.window, ordered.by_length) == ("block", 3, 9)
    assert 0 < len(ordered.copies[0]) < 48
