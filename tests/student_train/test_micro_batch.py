"""A batch comes out of a loader process as it went in."""

import dataclasses
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from online.batch import Batch
from online.collate import collate
from student_train.micro_batch import MicroBatch


def assert_same(found: Batch, wanted: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert (one is None) == (other is None), field.name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), field.name


def test_domains_and_phrases_reach_the_training_process(tmp_path: Path, tiny: ModuleType) -> None:
    plain = collate(tiny.write_rows(tmp_path / "store", rows=12), np.arange(5))
    numbers = torch.arange(plain.mask.numel()).view_as(plain.mask) * plain.mask
    batch = dataclasses.replace(plain, domains=torch.tensor([2, 0, 1, 1, 0]), phrases=numbers)
    for each in (plain, batch):
        assert_same(MicroBatch.lent(0, False, each, lambda allocate: {}).batch, each)
        assert_same(pickle.loads(pickle.dumps(MicroBatch(0, False, each, {}))).batch, each)
