"""Answers on their way to the host: what arrives is what the device had, and errors name their row."""

import numpy as np
import pytest
import torch

from online.batch import IGNORED, Batch
from online.encode import encode, encode_on_device
from online.pending import Pending
from store.codecs import feature_spec
from store.features import FeatureKey

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
HIDDEN, CHOSEN = FeatureKey("hidden", 1), FeatureKey("lm_logits", None, "labels", "select")
SPECS = [feature_spec(HIDDEN, "bfloat16", 8), feature_spec(CHOSEN, "float16", 30, (4, 2))]


def batch() -> Batch:
    mask = torch.arange(16) < torch.tensor([[3], [16], [1]])
    labels = torch.where(mask & (torch.rand(mask.shape) < 0.5), 7, IGNORED)
    labels[0, 0] = 3
    rows = torch.tensor([11, 4, 27])
    return Batch(rows, torch.randint(30, mask.shape), mask, None, None, None, labels, None, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_what_arrives_is_what_waiting_gives(device: str) -> None:
    rows = batch()
    there = rows.to(torch.device(device))
    values = {HIDDEN: torch.randn(3, 16, 8), CHOSEN: torch.randn(len(rows.scored), 30)}
    pending = Pending([encode_on_device(spec.feature, values[spec.feature].to(device), there, spec) for spec in SPECS], rows)
    found = pending.arrays()
    for spec in SPECS:
        for name, expected in encode(spec.feature, values[spec.feature], rows, spec).items():
            assert found[spec.feature][name].dtype == expected.dtype
            if name == "log_sum_exp" and device != "cpu":
                np.testing.assert_allclose(found[spec.feature][name], expected, rtol=1e-6)
            else:
                np.testing.assert_array_equal(found[spec.feature][name], expected)
    assert pending.nbytes >= sum(array.nbytes for arrays in found.values() for array in arrays.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_is_told_when_the_answers_are_asked_for(device: str) -> None:
    rows, value = batch(), torch.zeros(3, 16, 8)
    value[1, 9, 3] = torch.nan
    encoded = encode_on_device(HIDDEN, value.to(device), rows.to(torch.device(device)), SPECS[0])
    pending = Pending([encoded], rows, ["a.txt", "b.txt", "c.txt"])
    with pytest.raises(ValueError, match=r"hidden.1@all of row 4 \(b.txt\): the teacher answers NaN"):
        pending.arrays()


def test_what_is_counted_of_a_batch_agrees_with_its_masks() -> None:
    rows = batch()
    flat = torch.arange(rows.mask.numel())
    assert torch.equal(rows.real, flat[rows.mask.flatten()])
    assert torch.equal(rows.padding, flat[~rows.mask.flatten()])
    assert torch.equal(rows.scored, flat[rows.labelled.flatten()])
    moved = rows.to(torch.device("meta"))
    assert moved.real.shape == rows.real.shape
    assert moved.mask.device.type == "meta"
