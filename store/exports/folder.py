"""The folder an export writes: files that appear whole, a plan while it is unfinished, a record when it is done."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from store import layout
from store.errors import StoreBusy, StoreError
from store.manifest import Json
from store.publish import make_folder, replace, sync_folder

PLAN = ".export.json"
"""What an unfinished export is of; hidden, like its temporary files, from readers that take all files of a folder."""
RECORD = "_export.json"
"""The same when all files are there; readers of Parquet folders skip names that begin so."""


class ExportFolder:
    """Folder ``path`` while this process fills it; get one from :func:`open_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = 0
        """Files that this run wrote."""

    def has(self, name: str) -> bool:
        """Whether ``name`` was written, whole, before."""
        return (self.path / name).exists()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Where to write ``name``, with all of it synced; it gets its name when the block ends without an error."""
        temporary = layout.temporary(self.path / name)
        try:
            yield temporary
            temporary.replace(self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"cannot write {self.path / name}: {error.strerror or error}; make room or rights and start again") from error
        self.files += 1

    def finish(self) -> None:
        """Say that all files are there."""
        sync_folder(self.path)
        if self.has(PLAN):
            (self.path / PLAN).replace(self.path / RECORD)
            sync_folder(self.path)


@contextlib.contextmanager
def open_folder(path: Path, plan: Json) -> Iterator[ExportFolder]:
    """Hold ``path``, new or empty or left by an export of the same ``plan``.

    Raises:
        StoreBusy: another process exports to it.
        StoreError: it holds something else; nothing in it was touched.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"expected a folder for the export, found a file: {path}")
    try:
        make_folder(path)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"cannot write to {path}: {error.strerror}; give a folder that can be written") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusy(f"another process exports to {path}; wait for it to end") from None
        _claim(path, plan)
        yield ExportFolder(path)
    finally:
        os.close(handle)


def _claim(path: Path, plan: Json) -> None:
    """Put ``plan`` in the folder, unless it is there."""
    for name in (RECORD, PLAN):
        if (path / name).exists():
            try:
                found = json.loads((path / name).read_bytes())
            except (OSError, ValueError) as error:
                raise StoreError(f"{path / name} cannot be read ({error}); remove the folder and export again") from None
            if differing := [field for field in plan if not isinstance(found, dict) or found.get(field) != plan[field]]:
                what = "a finished export" if name == RECORD else "an unfinished export"
                raise StoreError(
                    f"{path} holds {what} with another {', '.join(differing)}; give another folder, or remove this one to export anew"
                )
            return
    leftover = re.escape(layout.temporary(path / PLAN).name)
    if strangers := sorted(entry.name for entry in path.iterdir() if not re.fullmatch(leftover, entry.name)):
        raise StoreError(f"expected an empty or new folder for the export, but {path} holds {strangers[0]}; nothing was touched")
    replace(path / PLAN, json.dumps(plan, indent=1).encode())
