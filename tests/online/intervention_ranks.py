"""What one rank finds when it writes into sharded models and mixes their blocks into a whole one; run by on_ranks."""

from typing import Any

import torch
from sharded_ranks import _batch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from online.batch import Batch, dense
from online.capture import Capture
from online.intervene import Intervene
from online.models import LoadedModel, ModelSpec, forward, load_model
from online.places import put
from online.replacement import Replaced
from online.replica import joined
from online.sharding import Sharding
from store.features import FeatureKey

SWAPS = ({1: (1, 1), 3: (2, 3)}, {2: (3, 3)}, {}, {1: (2, 3), 2: (1, 2), 3: (3, 3)})
WRITTEN = ("hidden.0", "hidden.2", "input.2", "query.2", "value.1", "attention_scores.2", "attention_probs.3", "final")
FINAL = FeatureKey("final")


def main(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Keys of ``arguments``: ``sharding``; ``models``, folders of ``student`` and ``teacher`` with their ``head``; ``together``, whether
    all ranks get the same batch.

    For each pair of models the largest differences from the whole teacher: ``written`` by site, or what refused it; ``mixed`` outputs,
    and their gradients with respect to the student's weights, by step, or what refused them; ``left``, elements of the sharded
    teacher's weights that are still gathered at the end.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined(arguments["sharding"]["size"], grouped=True) as replica:
        answers = [
            _compare(models, Sharding.model_validate(arguments["sharding"]), 0 if arguments.get("together") else replica.rank)
            for models in arguments["models"]
        ]
        dist.barrier()
    return answers


def _compare(models: dict[str, str], sharding: Sharding, seed: int) -> dict[str, Any]:
    teacher = ModelSpec.model_validate({"model": models["teacher"], "head": models["head"]})
    student = load_model(ModelSpec.model_validate({"model": models["student"], "head": models["head"]}))
    whole, split = load_model(teacher), load_model(teacher, sharding=sharding)
    for loaded in (whole, split):
        loaded.model.requires_grad_(False)
    mixed = [_mixed(student, whole, split, swaps, _batch(number * 10 + seed)) for number, swaps in enumerate(SWAPS)]
    written = {site: _written(whole, split, FeatureKey.parse(site), _batch(seed)) for site in WRITTEN}
    again = _mixed(student, whole, split, SWAPS[0], _batch(seed))
    left = sum(weight.numel() for weight in split.model.parameters() if not isinstance(weight, DTensor))
    return {"written": written, "mixed": [*mixed, again], "left": left}


def _written(whole: LoadedModel, split: LoadedModel, key: FeatureKey, batch: Batch) -> float | str:
    """The difference of what follows from noise at ``key`` in rows 0 and 2."""

    def change(x: Tensor) -> Tensor:
        return put(x, torch.linspace(-1, 1, x.shape[-1]), rows=torch.tensor([0, 2]))

    finals = []
    for loaded in (whole, split):
        try:
            with torch.no_grad(), Intervene(loaded, {key: change}), Capture(loaded, [FINAL]) as capture:
                forward(loaded, batch)
        except ValueError as error:
            return str(error)
        finals.append(dense(capture.features(batch), FINAL))
    return float((finals[0] - finals[1]).abs().max())


def _mixed(
    student: LoadedModel, whole: LoadedModel, split: LoadedModel, swaps: dict[int, tuple[int, int]], batch: Batch
) -> list[float] | str:
    """Largest difference of the outputs, and of the gradients relative to the largest gradient."""
    outputs, gradients = [], []
    for teacher in (whole, split):
        student.model.zero_grad()
        try:
            with Replaced(student, teacher, swaps, batch), Capture(student, [FINAL]) as capture:
                forward(student, batch)
        except ValueError as error:
            return str(error)
        final = dense(capture.features(batch), FINAL)
        final.square().sum().backward()
        outputs.append(final.detach())
        gradients.append({name: weight.grad.clone() for name, weight in student.model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    difference = max(float((gradient - gradients[1][name]).abs().max()) for name, gradient in gradients[0].items())
    return [float((outputs[0] - outputs[1]).abs().max()), difference / largest]
