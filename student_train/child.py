"""A process that this one starts, waits for, and takes along when it is ended."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

_END_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def run_child(command: Sequence[str]) -> int:
    """Run ``command`` to its end; its exit code as shells count, which is 128 + n where signal n has killed it.

    SIGTERM is passed on and the end of the child awaited: the code is then never 0, so that nothing more is started.
    A keyboard's Ctrl-C reaches the child by itself, and is raised here once it has ended. On Linux a child is also told to end
    when this process is killed: the command that is started again must not find it at work.
    """
    told = False
    child: subprocess.Popen[bytes] | None = None

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if child is not None:
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(command, preexec_fn=ends_with_parent())
        if told:  # while it was being started
            child.terminate()
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code < 0:
        return 128 - code
    return code or (128 + signal.SIGTERM if told else 0)


def ends_with_parent() -> Callable[[], object] | None:
    """What a child calls before it becomes its program (``preexec_fn``), on Linux: it is told to end when this process is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a forked process should do as little as it can
    return lambda: prctl(_END_WITH_PARENT, signal.SIGTERM)
