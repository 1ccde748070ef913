"""Checkpoints that are whole or absent: written beside, listed file by file in a marker, published by one rename.

checkpoints/checkpoint-<step>/
    model.safetensors              student and methods (one name of tied weights)
    buffers_<rank>.safetensors     the methods' buffers of each rank (only where there are several)
    best.safetensors               the student's best weights so far (only where a metric picks them)
    optimizer.pt scheduler.pt scaler.pt rng_state*.pth trainer_state.json     as transformers.Trainer writes them
    optimizer_<rank>.pt            under ZeRO, instead of optimizer.pt: each rank's part
    complete.json                  the marker: every file with its size and crc32c, and the settings of the run
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from store.manifest import Json
from store.publish import file_crc32c, replace, sync_file, sync_folder

MARKER = "complete.json"
WRITING = ".writing"
_PREFIX = "checkpoint-"
_log = logging.getLogger(__name__)


def weights(module: nn.Module, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first name alone (safetensors holds no shared memory).

    ``whole`` makes of each what is handed out.
    """
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept.setdefault(id(tensor), (name, tensor))
    return {name: whole(tensor) for name, tensor in kept.values()}


def restore(module: nn.Module, saved: Mapping[str, Tensor], where: Path) -> None:
    """Copy ``saved`` into ``module`` in place, so that tied weights stay tied.

    Raises:
        ValueError: names or shapes are not those of ``module``; the message names the first.
    """
    own = weights(module)
    for name in sorted(own.keys() ^ saved.keys()):
        side = "lacks" if name in own else "holds an unknown"
        raise ValueError(f"{where} {side} {name}: it belongs to another student or other methods; give another output folder")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{where}: {name}: expected shape {list(tensor.shape)}, found {list(saved[name].shape)}")
        tensor.copy_(saved[name])


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write ``tensors`` (of any device) as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def load(file: Path) -> dict[str, Tensor]:
    """What ``save`` wrote, on the CPU."""
    loaded: dict[str, Tensor] = load_file(file)
    return loaded


def method_buffers(methods: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of the methods: each rank has its own (memory banks), parameters are the same on all."""
    parameters = {name for name, _ in methods.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in weights(methods).items() if name not in parameters}


def read(bundle: nn.Module, methods: nn.Module, folder: Path, rank: int) -> None:
    """Put what the checkpoint ``folder`` holds into ``bundle``, and the buffers of this ``rank`` into its ``methods``.

    Raises:
        ValueError: it is of another student or of other methods.
    """
    with torch.no_grad():
        restore(bundle, load(folder / "model.safetensors"), folder)
        buffers = folder / f"buffers_{rank}.safetensors"
        for name, saved in (load(buffers) if buffers.exists() else {}).items():
            method_buffers(methods)[name].copy_(saved)


def clear(folder: Path) -> None:
    """Make the hidden folder for the files of the next checkpoint; what a killed process left there is removed."""
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    (folder / WRITING).mkdir(parents=True)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """The hidden folder; that something cannot be written there becomes a ValueError."""
    try:
        yield folder / WRITING
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save has RuntimeError for a full disk
        raise ValueError(f"cannot write a checkpoint to {folder}: {error}; make room and start again, the last one is kept") from error


def publish(folder: Path, step: int, settings: Mapping[str, Json], ranks: int) -> Path:
    """Make what lies in the hidden folder the checkpoint of ``step``: files, then marker, then folder reach the disk.

    Raises:
        ValueError: the files of a rank are not there (the output folder is not shared between nodes).
    """
    hidden = folder / WRITING
    files = {file.name: _seal(file) for file in sorted(hidden.iterdir())}
    for name in files:
        sync_file(hidden / name)
    absent = [rank for rank in range(ranks) if ranks > 1 and f"rng_state_{rank}.pth" not in files]
    if absent:
        raise ValueError(f"{folder} holds nothing from rank {absent[0]}: the output must lie on a file system that all nodes share")
    replace(hidden / MARKER, json.dumps({"step": step, "settings": settings, "files": files}, indent=1).encode())
    target = folder / f"{_PREFIX}{step}"
    if target.exists():  # lacks a file, or this step would not have been trained again
        shutil.rmtree(target)
    hidden.rename(target)
    sync_folder(folder)
    return target


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint, whole or not."""
    return any(folder.glob(f"{_PREFIX}*"))


def newest(folder: Path, settings: Mapping[str, Json]) -> Path | None:
    """The newest checkpoint that is whole, or None; each one passed over is reported with what it lacks.

    Raises:
        ValueError: it was made by a run with other settings, so going on would not give that run's losses.
    """
    for path in sorted(folder.glob(f"{_PREFIX}*"), key=step_of, reverse=True):
        fault = _fault(path)
        if fault:
            _log.warning("%s is not used: %s", path, fault)
            continue
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))["settings"]
        for name in settings:
            if settings[name] != found.get(name):
                raise ValueError(
                    f"{path} was made with {name} {json.dumps(found.get(name))}, this run has {json.dumps(settings[name])}: "
                    f"give it the same, another output folder, or remove {folder}"
                )
        return path
    return None


def rotate(folder: Path, keep: int | None, step: int) -> None:
    """Of the checkpoints up to ``step`` remove all but the ``keep`` newest (None or 0 keeps all); the marker goes first."""
    known = [path for path in sorted(folder.glob(f"{_PREFIX}*"), key=step_of, reverse=True) if step_of(path) <= step]
    for path in known[keep or len(known) :]:
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def _fault(path: Path) -> str:
    """Why ``path`` is no whole checkpoint; empty if it is."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"it lacks {MARKER}"
    for name, seal in files.items():
        if not (path / name).is_file():
            return f"it lacks {name}"
        if _seal(path / name) != seal:
            return f"{name} is damaged"
    return ""


def step_of(path: Path) -> int:
    """The optimiser step after which the checkpoint ``path`` was made."""
    number = path.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1


def _seal(file: Path) -> list[int]:
    """Size and checksum."""
    return [file.stat().st_size, file_crc32c(file)]
