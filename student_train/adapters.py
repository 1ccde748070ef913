"""Students of which only low-rank adapters train (LoRA), through the package peft.

Adapters are put in place: a linear layer becomes one that holds it, under the same path, so that sites are found where they always are.
What is exported has the adapters added to the weights that they stand beside: a plain Hugging Face folder. The adapters alone lie beside
it, as peft reads them.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from online.models import LoadedModel
from store.strict import Strict, did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig

_NAME = "default"
"""What peft calls an adapter that is alone."""


class LoraSpec(Strict):
    """Low-rank adapters: W + (alpha / rank) B A beside frozen weights W (Hu et al. 2022, arXiv 2106.09685)."""

    rank: int = Field(ge=1)
    """Rows of A and columns of B."""
    alpha: float | None = Field(default=None, gt=0)
    """Factor of what the adapters add, divided by the rank; twice the rank by default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into A, while training."""
    targets: tuple[str, ...] = ()
    """Linear layers of the blocks by the end of their paths, such as [q_proj, v_proj] or [mlp.down_proj]; all of them by default."""
    train: tuple[str, ...] = ()
    """Further modules that train as a whole, by the end of their paths: norms, embeddings, lm_head."""


def adapt(student: LoadedModel, spec: LoraSpec) -> str:
    """Put adapters into ``student``, and freeze all else but what ``spec`` says; what was done, for its notices.

    A is drawn from torch's own generator and B is 0, so the student answers as before.

    Raises:
        ValueError: peft is not there, or no such layer or module.
    """
    if find_spec("peft") is None:
        raise ValueError("student.lora needs the package peft: pip install 'teachercache[lora]'")
    from peft import inject_adapter_in_model

    model = student.model
    layers = _linear(student)
    chosen = [name for name in layers if not spec.targets or any(_ends(name, target) for target in spec.targets)]
    _refuse_unknown("targets", spec.targets, layers)
    _refuse_unknown("train", spec.train, [name for name, _ in model.named_modules()])
    whole = [module for name, module in model.named_modules() if any(_ends(name, end) for end in spec.train)]
    flipped = any(isinstance(model.get_submodule(name), Conv1D) for name in chosen)
    inject_adapter_in_model(_config(spec, chosen, flipped), model, adapter_name=_NAME)
    for module in whole:
        module.requires_grad_(True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    return f"adapters of rank {spec.rank} in {len(chosen)} linear layers: {trained:,} of {total:,} weights train"


def merge(student: LoadedModel, spec: LoraSpec, folder: Path) -> None:
    """Write the adapters of ``student`` to ``folder``, then add them to its weights and leave none.

    ``folder`` is as peft writes one. Modules that trained as a whole are in the exported student alone.
    """
    model = student.model
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.model.{name.replace(f'.{_NAME}', '')}": weight.detach().contiguous().cpu()
        for name, weight in model.state_dict().items()
        if f".{_NAME}." in name and "lora_" in name
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    flipped = any(isinstance(module.base_layer, Conv1D) for module in found.values())
    config = _config(spec, sorted(found), flipped)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    with torch.no_grad():
        for name, module in found.items():
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def _config(spec: LoraSpec, targets: list[str], flipped: bool) -> "LoraConfig":
    """As peft wants it; ``flipped`` for GPT-2's layers, which keep their weights as [in, out]."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=2 * spec.rank if spec.alpha is None else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        fan_in_fan_out=flipped,
    )


def _linear(student: LoadedModel) -> list[str]:
    """Paths of the linear layers of all blocks, from the whole model."""
    blocks = {id(student.block(layer)) for layer in range(1, student.shape.layers + 1)}
    prefixes = tuple(f"{name}." for name, module in student.model.named_modules() if id(module) in blocks)
    return [name for name, module in student.model.named_modules() if name.startswith(prefixes) and isinstance(module, nn.Linear | Conv1D)]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _refuse_unknown(option: str, ends: tuple[str, ...], names: list[str]) -> None:
    for end in ends:
        if not any(_ends(name, end) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names if name})
            what = "linear layer of a block" if option == "targets" else "module"
            raise ValueError(f"student.lora.{option}: no {what} ends in {end!r}{did_you_mean(end, known)}")


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
