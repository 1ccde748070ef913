"""Sharded models, written into and mixed with a whole one on two processes, do as whole models do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import run_on_ranks
from transformers import PreTrainedModel

from store.shape import Head

Build = Callable[..., PreTrainedModel]
TOLERANCE = 1e-5
MODELS: dict[str, Head] = {"bert": "masked_lm", "modernbert": "masked_lm", "gpt2": "causal_lm", "llama": "causal_lm"}
SPLIT = ("query.2", "value.1", "attention_scores.2", "attention_probs.3")

pytestmark = pytest.mark.slow


def answers(kind: str, names: list[str], tiny_model: Build, root: Path) -> list[Any]:
    """Of each rank: what intervention_ranks.main returns for ``names``."""
    models = []
    for name in names:
        model = tiny_model(name, MODELS[name], "sdpa")
        model.save_pretrained(root / f"{name} student")
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(root / f"{name} teacher")
        models.append({"student": str(root / f"{name} student"), "teacher": str(root / f"{name} teacher"), "head": MODELS[name]})
    arguments = {"sharding": {"kind": kind, "size": 2}, "models": models, "together": kind == "tp"}
    return run_on_ranks(2, Path(__file__).with_name("intervention_ranks.py"), arguments)


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_sharded_models_are_written_and_mixed_as_whole_ones_with_gradients_through_their_frozen_blocks(
    kind: str, tiny_model: Build, tmp_path: Path
) -> None:
    for answer in answers(kind, list(MODELS), tiny_model, tmp_path):
        for found in answer:
            assert max(found["written"].values()) <= TOLERANCE, found["written"]
            for output, gradient in found["mixed"]:
                assert output <= TOLERANCE
                assert gradient <= TOLERANCE
            assert found["left"] == 0


def test_tensor_parallelism_is_written_where_it_is_whole_and_refused_elsewhere(tiny_model: Build, tmp_path: Path) -> None:
    for answer in answers("tp", ["bert", "llama"], tiny_model, tmp_path):
        for found in answer:
            for site, difference in found["written"].items():
                if site in SPLIT:
                    assert "tensor parallelism splits it over the ranks" in difference
                else:
                    assert difference <= TOLERANCE
            assert all("a model split by tensor parallelism cannot be mixed" in refused for refused in found["mixed"])
