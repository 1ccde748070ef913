"""Processes that end with the one that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PARENT = """
import sys
from student_train.child import run_child
print(run_child([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]), flush=True)
"""
WAITS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
TAKES_ITS_TIME = f"import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); {WAITS}"


@contextmanager
def started(child: str, pid: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the program ``child``, which has written its ``pid``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child, str(pid)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        until(lambda: pid.is_file() and pid.read_text() != "")
        yield parent
    finally:
        parent.kill()
        parent.communicate()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("program", "code"), [("", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("raise ValueError", 1)]
)
def test_an_exit_code_is_as_shells_count(program: str, code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PARENT, program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == code


@pytest.mark.parametrize("child", [WAITS, TAKES_ITS_TIME])
def test_sigterm_reaches_the_child_and_is_never_a_success(child: str, tmp_path: Path) -> None:
    with started(child, tmp_path / "pid") as parent:
        parent.terminate()
        said, _ = parent.communicate(timeout=30)
        assert int(said) == 143
        assert parent.returncode == 0  # it was not ended by the signal itself
        assert gone(int((tmp_path / "pid").read_text()))


def test_ctrl_c_waits_for_the_child_which_got_it_too(tmp_path: Path) -> None:
    late = f"import signal, sys, time; signal.signal(2, lambda *_: (time.sleep(1), sys.exit(0))); {WAITS}"
    with started(late, tmp_path / "pid") as parent:
        child = int((tmp_path / "pid").read_text())
        began = time.monotonic()
        os.kill(child, signal.SIGINT)
        os.kill(parent.pid, signal.SIGINT)
        parent.wait(30)
        assert time.monotonic() - began >= 0.9
        assert parent.returncode == -signal.SIGINT  # as Python ends at a KeyboardInterrupt
        assert gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems leave the child alone")
def test_a_killed_process_takes_its_child_with_it(tmp_path: Path) -> None:
    with started(WAITS, tmp_path / "pid") as parent:
        parent.kill()
        parent.wait(30)
        until(lambda: gone(int((tmp_path / "pid").read_text())))
