"""Jobs of `teacher-dump run`, rank by rank as a launcher starts them, but forked from this process: a start costs a tenth of a second."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from teacher_dump.cli import main

ENDS = 60.0
"""Seconds after which a rank that should have ended hangs."""


@dataclass(frozen=True)
class Rank:
    """One process of a job."""

    number: int
    process: BaseProcess
    said: Path
    """File of all it prints."""

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def state(self) -> str:
        """The letter that Linux has for what it does; T where it is stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    def kill(self) -> bool:
        """Kill it; whether it had not ended by itself before."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def code(self, within: float = ENDS) -> int:
        """Its exit code once it has ended; an AssertionError if it does not."""
        self.process.join(within)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"rank {self.number} hangs; it said:\n{self.text}")
        return self.process.exitcode


@dataclass(frozen=True)
class Job:
    """All processes that one launch has started."""

    replica: int
    """Ranks that hold one copy of the teacher."""
    ranks: tuple[Rank, ...]

    @property
    def alive(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.alive]

    def beside(self, rank: Rank) -> list[Rank]:
        """The other ranks of the same replica."""
        return [other for other in self.ranks if other is not rank and other.number // self.replica == rank.number // self.replica]

    def kill(self) -> int:
        """Kill all ranks, as when a node goes; how many had not ended before."""
        return sum(rank.kill() for rank in self.ranks)

    def codes(self, within: float = ENDS) -> list[int]:
        return [rank.code(within) for rank in self.ranks]

    def said(self) -> str:
        return "\n".join(f"--- rank {rank.number}, exit code {rank.process.exitcode}\n{rank.text}" for rank in self.ranks)


def start(
    recipe: Path, ranks: int, folder: Path, overrides: Sequence[str] = (), *, replica: int = 1, prepare: Callable[[int], None] | None = None
) -> Job:
    """Start a job over ``recipe``.

    Args:
        folder: A new folder for what the ranks print.
        replica: Ranks that hold one copy of the teacher, as the recipe and its overrides say.
        prepare: Called in each rank, with its number, before the program starts.
    """
    folder.mkdir(parents=True)
    port = _free_port()
    started = []
    for number in range(ranks):
        said = folder / f"{number}.txt"
        arguments = (number, ranks, port, ["run", str(recipe), *overrides], said, prepare)
        process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        process.start()
        started.append(Rank(number, process, said))
    return Job(replica, tuple(started))


def until(what: Callable[[], bool], within: float = ENDS) -> bool:
    """Wait until ``what`` holds; whether it does."""
    end = time.monotonic() + within
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def _run(number: int, ranks: int, port: int, arguments: list[str], said: Path, prepare: Callable[[int], None] | None) -> None:
    """In a process of its own: one rank of the program."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = said.open("a", buffering=1)
    numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(DS_ACCELERATOR="cpu")
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR1, output, all_threads=True)  # says where a rank hangs
    if prepare is not None:
        prepare(number)
    main(arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
