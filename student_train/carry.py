"""What a phase's methods have learned, kept beside its student for later phases that carry it on."""

from pathlib import Path

import torch
from torch import Tensor, nn

from store.publish import file_crc32c
from student_train import checkpoint
from student_train.bundle import Bundle, method_names
from student_train.methods.base import Method
from student_train.outline import Outline
from student_train.output import phase_folder
from student_train.recipe import TrainRecipe

FILE = "methods.safetensors"
"""In a phase's folder: the parameters of its methods, and their learned buffers, ``<method>.<parameter>``; absent where they have none."""


def keep(bundle: Bundle, folder: Path) -> int | None:
    """Write the parameters of the methods to ``folder``; the file's checksum, None where there are none."""
    own = {f"{of}.{name}": weight.detach() for of, method in bundle.methods.items() for name, weight in _learned(method).items()}
    if not own:
        return None
    checkpoint.save(own, folder / FILE)
    return file_crc32c(folder / FILE)


def carry(bundle: Bundle, recipe: TrainRecipe) -> dict[str, str]:
    """Give the methods the parameters that their recipes carry on from earlier phases; method -> phase.

    Raises:
        ValueError: an earlier phase left no parameters, or others.
    """
    carried = {}
    for name, spec in bundle.specs.items():
        if spec.carry is None:
            continue
        file = phase_folder(recipe, spec.carry) / FILE
        if not file.is_file():
            raise ValueError(f"{name} carries its parameters from phase {spec.carry!r}, which left none at {file}: train that phase first")
        kept = {key.removeprefix(f"{name}."): value for key, value in checkpoint.load(file).items() if key.startswith(f"{name}.")}
        method = bundle.methods[name]
        problem = _difference(_sizes(method), {key: value.shape for key, value in kept.items()})
        if problem:
            raise ValueError(f"{name} cannot carry on what {file} holds: {problem}")
        with torch.no_grad():
            for key, weight in _learned(method).items():
                weight.copy_(kept[key])
        carried[name] = spec.carry
    return carried


def check_carried(one: Outline, earlier: Outline) -> None:
    """Refuse methods of ``one`` that carry from the phase ``earlier`` what a method there does not have.

    Raises:
        ValueError: no such method there, none of its parameters, or other sizes.
    """
    there = dict(zip(method_names([spec for spec, _ in earlier.methods]), earlier.methods, strict=True))
    for name, (spec, method) in zip(method_names([spec for spec, _ in one.methods]), one.methods, strict=True):
        if spec.carry != earlier.phase.name:
            continue
        where = f"phase {one.phase.name!r}: {name} carries from {spec.carry!r}"
        if name not in there:
            raise ValueError(f"{where}, which has no method {name}; it has {', '.join(there)}")
        if not _sizes(method):
            raise ValueError(f"{where}, but has no parameters to carry; leave carry out")
        if problem := _difference(_sizes(method), _sizes(there[name][1])):
            raise ValueError(f"{where}, where its parameters are others: {problem}")


def dropped(bundle: Bundle) -> list[str]:
    """Methods whose parameters do not reach the exported student."""
    return [name for name, method in bundle.methods.items() if _learned(method)]


def _learned(method: nn.Module) -> dict[str, Tensor]:
    """All that a method learns, by name."""
    assert isinstance(method, Method)
    return dict(method.named_parameters()) | {name: method.get_buffer(name) for name in method.learned_buffers}


def _sizes(method: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in _learned(method).items()}


def _difference(own: dict[str, torch.Size], other: dict[str, torch.Size]) -> str:
    for name in sorted(own.keys() | other.keys()):
        if own.get(name) != other.get(name):
            found = [list(sizes[name]) if name in sizes else "absent" for sizes in (own, other)]
            return f"{name}: expected {found[0]}, found {found[1]}"
    return ""
