"""A Python program on two ranks, started as torchrun starts them: without torchrun, which takes three seconds to import torch and watch."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

GRACE = 20.0
"""Seconds that a rank may go on after the other has failed: long enough for the same error on its side."""


def launched(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS...`` on both ranks; the first exit code that is not 0, and what the ranks said, one after the other.

    Raises:
        subprocess.TimeoutExpired: they were not done in so many seconds; none is left.
    """
    command = [sys.executable, *arguments]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        logs = [[Path(folder) / f"{rank}.{name}" for rank in range(2)] for name in ("out", "err")]
        processes = [_start(rank, port, command, logs[0][rank], logs[1][rank]) for rank in range(2)]
        try:
            _wait(processes, command, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes if process.returncode]
        said = ["".join(log.read_text(encoding="utf-8", errors="replace") for log in each) for each in logs]
        return subprocess.CompletedProcess(command, codes[0] if codes else 0, *said)


def _start(rank: int, port: str, command: Sequence[str], out: Path, err: Path) -> "subprocess.Popen[bytes]":
    of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        return subprocess.Popen(command, env={**os.environ, **of_rank, **meeting}, stdout=stdout, stderr=stderr)


def _wait(processes: Sequence["subprocess.Popen[bytes]"], command: Sequence[str], timeout: float) -> None:
    end, failed = time.monotonic() + timeout, False
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            if failed:
                return
            raise subprocess.TimeoutExpired(command, timeout)
        if not failed and any(process.returncode for process in processes):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.02)
