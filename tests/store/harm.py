"""What tests of stores that somebody made to do harm share: a good store, harm of all kinds, and what a refusal is."""

import contextlib
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forge import Tree, read_all
from small_store import Made, make_store, spec

from store import StoreError
from store.verify import verify

MEMORY = 1 << 29
"""What reading a store of 50 kB may take beyond what a process has anyway."""

SECONDS = 10.0

ADVICE = r"mend it with|put back a copy|again|remove the|newer release|made by something else"
"""What a refusal tells people to do."""

GROUPS = [[(30, 3)], [(100, 9)], [(250, 0)], [(7, 7)], [(256, 17)]]
SPECS = (
    spec("hidden.1@all", "bfloat16"),
    spec("final@first"),
    spec("final@all", "float32", compression="zstd"),
    spec("lm_logits@labels:top3", "float16", 50),
)


def array(number: int = 0, **change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"]["features"][number]["arrays"][0].update(change)


def rows(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["rows"].update(change)


def nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fail where the code hangs, or wants much memory."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not refused within {SECONDS} s")

    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(path: Path, said: str) -> None:
    """Reading all of the store ends in an error of a few lines that says so; verifying finds something, or ends like it."""
    with limited():
        with pytest.raises(StoreError, match=said) as caught:
            read_all(path)
        assert len(str(caught.value)) < 4000
        assert re.search(ADVICE, str(caught.value))
        with contextlib.suppress(StoreError):
            assert verify(path)


INSTEAD: dict[str, Callable[[Path], object]] = {
    "a link": lambda file: file.symlink_to(file.with_name("moved")),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a pipe": os.mkfifo,
    "a folder": lambda file: file.mkdir(),
    "a terabyte of nothing": lambda file: (file.touch(), os.truncate(file, 1 << 40)),
}


def good_store(path: Path) -> Made:
    """A store of five rows that nobody has harmed."""
    made = make_store(path, GROUPS, SPECS, 256)
    read_all(made.path)
    verify(made.path)
    return made
