"""Where a teacher goes when its recipe leaves that open."""

import pytest
from tiny_dump import World
from transformers import AutoModelForMaskedLM

from online.models import ModelSpec
from online.sharding import Sharding
from teacher_dump.placement import fitting, weight_bytes

GB = 10**9


def test_a_teacher_that_fits_is_not_sharded() -> None:
    assert fitting(14 * GB, memory=40 * GB, ranks=8) == Sharding()


def test_a_larger_one_is_spread_over_as_few_ranks_as_hold_it_and_divide_the_job() -> None:
    assert fitting(70 * GB, memory=40 * GB, ranks=8) == Sharding(kind="zero3", size=4)
    assert fitting(70 * GB, memory=40 * GB, ranks=6) == Sharding(kind="zero3", size=3)
    assert fitting(200 * GB, memory=40 * GB, ranks=8) == Sharding(kind="zero3", size=8)


def test_one_that_the_job_cannot_hold_is_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"take 200 GB, more than 2 GPUs of 40 GB have room for; start 8 ranks or more, or .*offload=cpu"):
        fitting(200 * GB, memory=40 * GB, ranks=2)


def test_weights_are_counted_from_the_configuration(world: World) -> None:
    model = AutoModelForMaskedLM.from_pretrained(world.masked)
    counted = sum(weight.numel() for weight in model.parameters())
    assert weight_bytes(ModelSpec(model=world.masked, head="masked_lm")) == 4 * counted
    assert weight_bytes(ModelSpec(model=world.masked, head="masked_lm", dtype="bfloat16")) == 2 * counted
