"""How a teacher is to lie over the ranks of a job where its recipe leaves that open."""

import os

import torch

from online.figures import size
from online.models import HEADS, ModelSpec, load_config
from online.sharding import Sharding
from teacher_dump.recipe import DumpRecipe

ROOM = 0.7
"""Share of a GPU's memory that weights may take; answers, and what the model computes, take the rest."""


def placed(recipe: DumpRecipe) -> DumpRecipe:
    """``recipe`` with a sharding that is not ``auto``; the same on all ranks of a job whose GPUs are alike.

    Raises:
        ValueError: the GPUs of the job do not hold the weights together.
    """
    if recipe.sharding.kind != "auto":
        return recipe
    sharding = Sharding()
    if torch.cuda.is_available() and (recipe.device or "cuda").startswith("cuda"):
        memory = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()).total_memory
        sharding = fitting(weight_bytes(recipe.teacher), memory, int(os.environ.get("WORLD_SIZE", "1")))
    return recipe.model_copy(update={"sharding": sharding})


def fitting(weights: int, memory: int, ranks: int) -> Sharding:
    """No sharding where ``weights`` bytes fit in a GPU of ``memory`` bytes, else ZeRO-3 over as few of the ``ranks`` as hold them.

    Raises:
        ValueError: all of them together do not.
    """
    for count in (count for count in range(1, ranks + 1) if ranks % count == 0):
        if weights <= ROOM * memory * count:
            return Sharding() if count == 1 else Sharding(kind="zero3", size=count)
    enough = -(-weights // int(ROOM * memory))
    raise ValueError(
        f"the teacher's weights take {size(weights)}, more than {ranks} GPUs of {size(memory)} have room for; start {enough} ranks "
        f"or more, or keep the weights in main memory: sharding.kind=zero3 sharding.size={ranks} sharding.offload=cpu"
    )


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of the weights of a model in the type that it is run in, from its configuration alone."""
    config = load_config(spec.model, spec.trust_remote_code)
    if spec.labels is not None:
        config.num_labels = spec.labels
    with torch.device("meta"):
        model = HEADS[spec.head].from_config(config, trust_remote_code=spec.trust_remote_code)  # type: ignore[attr-defined]
    item: int = getattr(torch, spec.dtype).itemsize
    return item * sum(weight.numel() for weight in model.parameters())
