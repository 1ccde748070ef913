"""What one rank writes down of a run: events as JSON lines, and a log for people.

Whatever may wait for a disk happens in one thread here, so that neither the teacher nor what is said on the screen ever waits with it.
"""

import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple, TextIO

from pydantic import JsonValue

from store.errors import StoreError

PATIENCE = 10.0
"""Seconds that a run waits in the end for its last lines to be written."""

_APART = ("transformers", "DeepSpeed")
"""Loggers of libraries that keep their messages from the root logger."""


class Regular(NamedTuple):
    """Something to do again and again, which may take a while."""

    seconds: float
    do: Callable[[], None]


class _Files(NamedTuple):
    events: TextIO
    log: TextIO


class Journal:
    """The files of one rank, and the thread that writes them.

    Args:
        folder: Where they are made, named by start and rank; None keeps none.
        regular: What that thread does beside, also once more in the end.
        broken: Is told why when a file cannot be written any more.

    Raises:
        OSError: they cannot be made.
    """

    def __init__(self, folder: Path | None, rank: int, regular: Sequence[Regular], broken: Callable[[str], None]) -> None:
        self._always: dict[str, JsonValue] = {"rank": rank, "host": platform.node(), "pid": os.getpid()}
        self._regular, self._broken = regular, broken
        self._lines: SimpleQueue[tuple[TextIO, str] | None] = SimpleQueue()
        self._files = None if folder is None else _new_files(folder, rank)
        self._handlers: list[logging.Handler] = []
        if self._files is not None:
            self._handlers.append(_Lines(partial(self._put, self._files.log)))
        self._thread = Thread(target=self._run, name="journal", daemon=True)

    def start(self, log: logging.Logger) -> None:
        """Write what ``log`` says, and the warnings of all libraries, from now on."""
        self._loggers = [log, logging.getLogger(), *(each for each in map(logging.getLogger, _APART) if not each.propagate)]
        for logger, handler in itertools.product(self._loggers, self._handlers):
            logger.addHandler(handler)
        self._thread.start()

    def event(self, kind: str, facts: Mapping[str, JsonValue]) -> None:
        """Note that something happened now."""
        if self._files is not None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"time": now, **self._always, "kind": kind, "facts": facts}
            self._put(self._files.events, json.dumps(record, default=str))

    def close(self) -> None:
        """Write what is left, do what is regular once more, and end; a disk that does not take it is not waited for."""
        for logger, handler in itertools.product(self._loggers, self._handlers):
            logger.removeHandler(handler)
        self._lines.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        due = [0.0] * len(self._regular)
        going = True
        while going:
            now = time.monotonic()
            for number, (seconds, do) in enumerate(self._regular):
                if now >= due[number]:
                    self._attempt(do)
                    due[number] = max(now + seconds, time.monotonic() + 20 * (time.monotonic() - now))  # at most a twentieth of the time
            try:
                line = self._lines.get(timeout=max(0.05, min(due, default=now + 1) - time.monotonic()))
            except Empty:
                continue
            if line is None:
                going = False
            else:
                self._attempt(partial(_write, *line))
        for _, do in self._regular:
            self._attempt(do)
        for file in self._files or ():
            self._attempt(file.close)

    def _put(self, file: TextIO, text: str) -> None:
        self._lines.put((file, text))

    def _attempt(self, do: Callable[[], None]) -> None:
        """Observation never ends a run."""
        try:
            do()
        except (OSError, StoreError) as error:
            self._broken(str(error))


class _Lines(logging.Handler):
    """Log records as lines of text."""

    def __init__(self, put: Callable[[str], None]) -> None:
        super().__init__()
        self._put = put
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._put(self.format(record))


def _write(file: TextIO, text: str) -> None:
    file.write(text + "\n")
    file.flush()


def _new_files(folder: Path, rank: int) -> _Files:
    """Empty files for events and log: two jobs may begin in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in itertools.count(1):
        name = f"{started}-rank{rank}" if number == 1 else f"{started}-rank{rank}-{number}"
        try:
            events = (folder / f"{name}.jsonl").open("x", encoding="utf-8")
        except FileExistsError:
            continue
        return _Files(events, (folder / f"{name}.log").open("w", encoding="utf-8"))
    raise AssertionError
