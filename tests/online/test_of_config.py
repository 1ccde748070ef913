"""A model made of its configuration alone is described as the one with weights."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from conftest import CONFIGS
from transformers import PreTrainedModel

from online.families import FAMILIES
from online.models import LoadedModel, ModelSpec
from online.skeleton import of_config
from store.shape import Head


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("head", get_args(Head))
def test_shape_and_wiring_need_no_weights(name: str, head: Head, tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = CONFIGS[name]()
    config.num_labels = 3
    if head not in FAMILIES[config.model_type].heads:
        with pytest.raises(ValueError, match=r"Unrecognized configuration class|has no head"):
            of_config(ModelSpec(model="absent", head=head), config)
        return
    real = LoadedModel.of(tiny_model(name, head), head)
    with torch.device("meta"):
        described = of_config(ModelSpec(model="absent", head=head), config)
    assert all(weight.is_meta for weight in described.model.parameters())
    assert (described.shape, described.wiring) == (real.shape, real.wiring)
