"""Where ZeRO-3 keeps the parts of a model that is larger than its GPUs: in the memory of the machine, or on its NVMe disks."""

import atexit
import fcntl
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from online.sharding import Sharding, ShardingError
from online.skeleton import largest_parameter

_SMALLEST = 2**20
"""Bytes of the smallest part that DeepSpeed swaps to a disk; smaller ones stay in memory."""
_BUFFERS = 6
"""Parts that may be in memory at once on their way from the disk: two modules with weight and bias, and some to read ahead."""
_OPERATORS = ("pin_memory", "async_io")
_STALE = 60.0
"""Seconds after which the lock of a build that has a result cannot be that of a process which only looks whether it is up to date."""
_BUILD = "MAX_JOBS=1 python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'"
_folders: dict[Path, int] = {}
"""This process's own folders, and the models that have parts in each. Their open locks go with the process."""


def prepare_offload(sharding: Sharding, skeleton: nn.Module, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's ``offload_param`` for ``sharding``.

    Raises:
        ShardingError: for NVMe, the operator is not built, or another process of this machine uses the folder.
    """
    if sharding.offload == "cpu":
        return {"device": "cpu", "pin_memory": device.type == "cuda"}
    assert sharding.offload_folder is not None
    check_operators()
    largest_part = -(-largest_parameter(skeleton) // sharding.size)
    return {
        "device": "nvme",
        "nvme_path": str(_own_folder(sharding.offload_folder)),
        "buffer_count": _BUFFERS,
        "buffer_size": largest_part,
        "pin_memory": device.type == "cuda",
    }


def check_offloaded(model: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Refuse an offload that has kept everything where it was, which DeepSpeed does not say.

    Raises:
        ShardingError: no part is where ``sharding`` wants it.
    """
    parts: list[Any] = [weight.ds_tensor for weight in model.parameters()]  # type: ignore[attr-defined]
    if sharding.offload == "cpu" and device.type != "cpu":
        inside = [part for part in parts if part.device.type != "cpu"]
        if inside:
            raise ShardingError(f"offload: cpu left {len(inside)} of {len(parts)} parts on {device}")
    if sharding.offload == "nvme":
        swapped, files, _ = swapped_parts(model)
        if not swapped or files != swapped:
            largest = max(part.ds_numel for part in parts) * parts[0].element_size()
            raise ShardingError(
                f"offload: nvme swapped {swapped} of {len(parts)} parts to {sharding.offload_folder} ({files} files): parts below "
                f"{_SMALLEST:,} bytes stay in memory, and this rank's largest has {largest:,}; expected fewer ranks or offload: cpu"
            )


def swapped_parts(model: nn.Module) -> tuple[int, int, int]:
    """Parts of this rank that lie on the disk, their files, and the bytes of these."""
    weights: list[Any] = list(model.parameters())
    paths = {
        Path(weight.nvme_swapper.get_path(weight)) for weight in weights if getattr(weight.ds_tensor.final_location, "value", "") == "nvme"
    }
    files = [path for path in paths if path.is_file()]
    return len(paths), len(files), sum(path.stat().st_size for path in files)


def check_operators() -> None:
    """Refuse to start where DeepSpeed would first have to compile its disk operator, for many minutes.

    Raises:
        ShardingError: it is not built, or a build of it was killed.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if shutil.which("ninja") is None:  # comes with DeepSpeed, beside the interpreter
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name in _OPERATORS:
        if installed_ops.get(name):
            continue
        folder = Path(_get_build_directory(name, verbose=False))
        built, lock = (folder / f"{name}.so").is_file(), folder / "lock"
        if lock.exists() and not (built and time.time() - lock.stat().st_mtime < _STALE):
            raise ShardingError(
                f"offload: nvme: DeepSpeed's operator {name} is being built, or its build was killed: {lock} exists; wait, or if no "
                f"compiler runs remove that file and build it in one process: {_BUILD}"
            )
        if not built:
            raise ShardingError(
                f"offload: nvme needs DeepSpeed's operator {name}, expected at {folder}; build it ahead in one process, which takes 5 to "
                f"15 minutes and needs a C++ compiler and the headers of libaio (libaio-dev, libaio-devel): {_BUILD}"
            )


def _own_folder(folder: Path) -> Path:
    """A place in ``folder`` for one more model of this rank, removed at the end; what a killed run has left is removed first."""
    own = folder / f"{socket.gethostname()}-{os.environ['LOCAL_RANK']}"
    if own not in _folders:
        own.mkdir(parents=True, exist_ok=True)
        lock = os.open(own / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ShardingError(
                f"offload_folder: another process keeps weights in {own}; give each job of a machine a folder of its own"
            ) from error
        for left in own.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        _folders[own] = 0
    _folders[own] += 1
    return own / str(_folders[own])
