"""Disks that fill up and file systems that fail, for programs that are really run."""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from jobs import until

_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_RECURSIVE, _PRIVATE = 0x4000, 0x40000


Point = tuple[object, str, int]
"""A call, counted from 0, of a function with that name in a module or class."""


def before(points: Sequence[Point], act: Callable[[], None]) -> None:
    """From now on, in this process: ``act`` once, just before the last of ``points``; each is looked for after the one before it."""
    (module, name, call), *later = points
    function, left = getattr(module, name), iter(range(call + 1))

    def called(*arguments: object, **options: object) -> object:
        if next(left, None) == call:
            before(later, act) if later else act()
        return function(*arguments, **options)

    setattr(module, name, called)


def on_small_disk(folder: Path, size: int, body: Callable[[Path], None]) -> None:
    """Call ``body`` with a file system of so many bytes at ``folder``, in a process that alone sees it.

    What it raises comes as an AssertionError. Skips the test where this machine gives nobody a file system of his own.
    """
    folder.mkdir()
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_on_small_disk, args=(folder, size, body, its))
    process.start()
    its.close()
    try:
        said = mine.recv()
    except EOFError:
        said = "it ended without a word"
    process.join()
    if isinstance(said, OSError):
        pytest.skip(f"no small file system can be mounted here: {said}")
    assert said is None, said


def fill(disk: Path, leave: int = 0) -> None:
    """Take the room that a disk has, but for so many bytes."""
    with (disk / "ballast").open("wb") as file:
        about = os.statvfs(disk)
        if (free := about.f_bavail * about.f_frsize - leave) > 0:
            os.posix_fallocate(file.fileno(), 0, free)


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()


@contextlib.contextmanager
def injected(pid: int, calls: str, fault: str, paths: Sequence[Path] = ()) -> Iterator[None]:
    """Let system calls of a process fail or stall while inside, by strace: ``injected(pid, "fsync", "error=EIO:when=1")``.

    Args:
        calls: Their names, separated by commas.
        fault: As strace's ``inject`` takes it.
        paths: Only calls that are about one of these.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    only = [word for path in paths for word in ("-P", str(path))]
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}", *only, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        try:
            until(lambda: _traced(pid) or tracer.poll() is not None, 10)
            if tracer.poll() is not None and _alive(pid):
                pytest.skip(f"this machine does not let processes be traced: {tracer.stderr.read()[:200]}")
            yield
        finally:
            tracer.terminate()


class Gate:
    """Holds a forked process back until it is told to go on."""

    def __init__(self) -> None:
        self._reached, self._open = os.pipe(), os.pipe()

    def hold(self) -> None:
        """In the forked process."""
        os.write(self._reached[1], b".")
        os.read(self._open[0], 1)

    def reached(self) -> None:
        """Wait until the process is held back."""
        os.read(self._reached[0], 1)

    def open(self) -> None:
        os.write(self._open[1], b".")


def _traced(pid: int) -> bool:
    """Whether every thread of a process has a tracer."""
    with contextlib.suppress(FileNotFoundError):
        states = [status.read_text() for status in Path(f"/proc/{pid}/task").glob("*/status")]
        return all("TracerPid:\t0\n" not in state for state in states)
    return False


def _alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def _on_small_disk(folder: Path, size: int, body: Callable[[Path], None], said: Connection) -> None:
    try:
        _mount(folder, size)
    except OSError as error:
        said.send(error)
        return
    try:
        body(folder)
    except BaseException:
        said.send(traceback.format_exc())
    else:
        said.send(None)


def _mount(folder: Path, size: int) -> None:
    """Mount a file system in memory for this process and its children alone."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if system.unshare(_NEW_MOUNTS):
        _worked(system.unshare(_NEW_MOUNTS | _NEW_USER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _worked(system.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    _worked(system.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % size))


def _worked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"mount or unshare: {os.strerror(number)}")
