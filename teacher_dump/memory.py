"""Memory of a device: how much of it is free, and the most that a stretch of work takes.

On Linux the kernel's high-water mark of resident memory is set back before the work. Elsewhere, and where that is not
allowed, it is the growth of the process's largest size so far: nothing for work that stays below what came before.
"""

import contextlib
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_PROC = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still get: of a GPU, of main memory, or of what its control groups let it have.

    Where the system does not say, half of all main memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    if available is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([int(available[1]) * 1024, *_left_in_groups()])


class Peak:
    """Measures the memory of pieces of work against what is taken when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _now(device)

    def of(self, work: Callable[[], T]) -> tuple[T, int]:
        """What ``work`` returns, and the most bytes that were taken meanwhile beside those at the beginning."""
        _set_back(self._device)
        done = work()
        return done, max(0, _most(self._device) - self._before)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _set_back(device)
    return _most(device)


def _set_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def _most(device: torch.device) -> int:
    """The most bytes taken since the last :func:`_set_back`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", (_PROC / "status").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _left_in_groups() -> list[int]:
    """What the control groups of this process have left, each; page cache that is not in use counts as left."""
    left = []
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = _GROUPS / kinds
        most, now = ("memory.max", "memory.current") if not kinds else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
                limit, used = int((folder / most).read_text()), int((folder / now).read_text())
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                left.append(max(0, limit - used + (int(cached[1]) if cached else 0)))
            if folder == root:
                break
    return left
