"""Kills a command at its n-th change to the disk: a real process, a real SIGKILL, every moment in turn."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

CHANGES = ("fsync", "link", "unlink", "rename", "replace", "rmdir", "mkdir")


def _run(step: int, call: Callable[[], object]) -> None:
    left = iter(range(step))

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object, **options: object) -> object:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    call()


def killed_at(step: int, call: Callable[[], object]) -> bool:
    """Run ``call`` in a process that is killed before its change number ``step``; whether it came that far."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(step, call))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store but those that tell times and processes, and the commits, which may stand in one log or another."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(("commits/", "manifest.json", "claims/"))}
