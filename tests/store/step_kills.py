"""Kills commands, at their n-th change to the disk or at random moments: real processes, real SIGKILLs."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
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


def killed_at_random(command: Sequence[object], kills: int, within: float, seed: int) -> None:
    """Run ``command``, killing it so many times within seconds of its line "ready", until it says "done"."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    chance, killed, said = random.Random(seed), 0, ""
    while "done" not in said:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if killed < kills:
            time.sleep(chance.uniform(0, within))
            process.send_signal(signal.SIGKILL)
            killed += 1
        said, _ = process.communicate(timeout=60)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store but those that tell times and processes, and the commits, which may stand in one log or another."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(("commits/", "manifest.json", "claims/"))}
