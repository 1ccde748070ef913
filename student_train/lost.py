"""A job that loses one of its ranks: the others end with one line that says what to do, and what is saved stays resumable."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from online.ranks import RankLost, talking


@contextmanager
def ending_together(ranks: int) -> Iterator[None]:
    """Inside, a rank that is gone or silent is a RankLost on all others; so is SIGTERM, which launchers send them then.

    Nothing changes in a job of one rank.
    """
    if ranks == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def told(_number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a loader process, forked from here
            raise SystemExit(128 + signal.SIGTERM)
        raise RankLost(
            "this rank was told to end (SIGTERM), as launchers do where another one has died; start the same command again: "
            "it goes on from the newest whole checkpoint"
        )

    before = signal.signal(signal.SIGTERM, told)
    try:
        with talking():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
