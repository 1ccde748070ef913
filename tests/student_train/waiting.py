"""Waiting for a process that a test has started to come to a point."""

import subprocess
import time
from collections.abc import Callable


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until ``true``; a process that ends before, or ten minutes, fail the test."""
    deadline = time.monotonic() + 600
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
