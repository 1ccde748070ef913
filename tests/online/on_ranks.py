"""Run a script in several processes that reach each other through torch.distributed's env:// rendezvous, as launchers start them.

    run_on_ranks(2, Path("zero3_ranks.py"), {"folder": "..."})

The script is a Python file with ``def main(arguments: dict) -> JSON``; it is called in every process.
"""

import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_GRACE = 10.0
"""Seconds that the others may go on after one process has failed: long enough for the same error on their side."""


def run_on_ranks(
    count: int, script: Path, arguments: Mapping[str, Any], timeout: float = 180, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """What ``main(arguments)`` of ``script`` returns in each of ``count`` processes, in the order of their ranks.

    Args:
        arguments: plain JSON.
        timeout: seconds until everything is killed.
        environment: added to that of the processes.

    Raises:
        AssertionError: a process failed, or the time was over; with the end of what every one of them printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(count)]
        answers = [Path(folder) / f"{rank}.json" for rank in range(count)]
        port, processes = _free_port(), []
        try:
            for rank in range(count):
                shared = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
                added = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                env = {**os.environ, **{name: str(value) for name, value in shared.items()}, **added, **(environment or {})}
                command = [sys.executable, __file__, str(script), json.dumps(dict(arguments)), str(answers[rank])]
                with logs[rank].open("wb") as log:
                    processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            failed = _wait(processes, timeout)
        finally:
            for process in processes:
                _kill(process)
        if failed:
            ends = (f"--- rank {rank}, exit code {processes[rank].returncode}\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
            raise AssertionError("\n".join([failed, *ends]))
        return [json.loads(answer.read_text()) for answer in answers]


def _wait(processes: list["subprocess.Popen[bytes]"], timeout: float) -> str:
    """Until all are done; what went wrong, or nothing."""
    end, failed = time.monotonic() + timeout, ""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            return failed or f"not done after {timeout:g} s"
        if not failed and any(process.returncode for process in processes):
            failed, end = "a rank failed", min(end, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return "a rank failed" if any(process.returncode for process in processes) else ""


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _main() -> None:
    script, arguments, answer = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path[0] = str(script.parent)
    spec.loader.exec_module(module)
    gc.freeze()  # DeepSpeed collects garbage over and over, and would look through all that was imported
    answer.write_text(json.dumps(module.main(arguments)))


if __name__ == "__main__":
    _main()
