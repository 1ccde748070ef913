"""SIGTERM: what schedulers and launchers send some time before they kill, when a job is to end or to move."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

EXIT = 143
"""Exit code of a run that SIGTERM has stopped: 128 + 15, as shells count."""

GRACE = 20.0
"""Seconds from SIGTERM on in which shards may be finished. torchrun and deepspeed kill after 30, SLURM's default is 30 as well."""


class Stopped(BaseException):
    """SIGTERM has stopped this run before its end; no Exception, so that nothing on the way takes it for a failure.

    Args:
        kept: What the run has got done, for its message.
    """

    def __init__(self, kept: str = "what is committed is kept") -> None:
        super().__init__(f"stopped by SIGTERM; {kept}. The same command goes on where this one was.")


class Stopping:
    """Takes SIGTERM while it is entered, in the main thread: raises Stopped at once, or only notes it after :meth:`take_note`.

    Args:
        grace: Seconds from the first signal to ``overdue``. A second signal means: now.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._since: float | None = None
        self._noting = False

    @property
    def asked(self) -> bool:
        """Whether this run is to end."""
        return self._since is not None

    @property
    def overdue(self) -> bool:
        """Whether it is to end without finishing anything more."""
        return self._since is not None and time.monotonic() >= self._since + self._grace

    def ask(self) -> None:
        """Tell this run to end, as a signal would."""
        if self._since is None:
            self._since = time.monotonic()

    def take_note(self) -> None:
        """Interrupt nothing from now on: the caller looks at ``asked`` and ``overdue`` between its steps, and closes what it has open."""
        self._noting = True

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        if not self._noting:
            raise Stopped
        if self.asked:
            self._grace = 0.0
        self.ask()

    def __enter__(self) -> Self:
        self._mine = threading.current_thread() is threading.main_thread()  # Python lets no other thread take signals
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)
