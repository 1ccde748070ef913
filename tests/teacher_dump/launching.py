"""What tests of launchers share: processes as a user starts them, and two nodes on one machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from store.reader import Store

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
ENDS = 200.0
"""Seconds after which what should have ended hangs."""


def environment() -> dict[str, str]:
    """That of programs which find the packages, this Python's programs, and one thread."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Program:
    """A program in a session of its own, as a node of a cluster runs it."""

    process: "subprocess.Popen[bytes]"
    said: Path
    """File of all that it and its children print."""

    @classmethod
    def start(cls, command: Sequence[str], said: Path, added: dict[str, str] | None = None) -> "Program":
        with said.open("wb") as output:
            env = {**environment(), **(added or {})}
            return cls(subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True), said)

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def code(self, within: float = ENDS) -> int:
        """Its exit code once it has ended; it is killed, and an AssertionError raised, if it does not."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hangs; it said:\n{self.text}") from None

    def kill(self) -> None:
        """Kill it and everything that it has started, as when a node loses power."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [each for child in children for each in (child, *descendants(child))]


def wait_for(what: Callable[[], object], within: float = ENDS) -> None:
    """Wait until something holds; an AssertionError if it does not come to it."""
    end = time.monotonic() + within
    while not what():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)


def committed_bytes(store: Path) -> int:
    """Length of the commit logs."""
    return sum(log.stat().st_size for log in (store / "commits").glob("*.log"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def assert_close(found: Path, expected: Path, pass_name: str = "bert") -> None:
    """That two stores have the same answers, row by row, within TOLERANCE."""
    stores = [Store.open(path) for path in (found, expected)]
    rows = np.arange(len(stores[1].rows))
    for spec in stores[1].manifest.passes[pass_name].features:
        key = spec.feature.of(pass_name)
        there, here = (store.read(key, rows) for store in stores)
        for name, values in here.items():
            np.testing.assert_allclose(there[name], values, rtol=0, atol=TOLERANCE, err_msg=f"{key} {name}")


@contextlib.contextmanager
def two_networks() -> Iterator[tuple[list[list[str]], list[str], str]]:
    """Two network namespaces joined by a cable: for each the words that run a command in it, and its address; and the cable's name.

    Raises:
        OSError, subprocess.CalledProcessError: this machine lets nobody make them.
    """
    if shutil.which("ip") is None:
        raise FileNotFoundError("there is no program ip")
    names = [f"tc-{uuid4().hex[:8]}" for _ in range(2)]
    addresses = ["10.123.45.1", "10.123.45.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names], addresses, "cable"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
