"""Files of one store that are files of another too: hard links where the file system allows them, copies elsewhere."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from store.errors import StoreError
from store.plain import open_plain, pieces, why
from store.publish import make_folder, publish, sync_folder

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Another file system, one without links, or a file that already has as many as it may."""


class Links:
    """Puts files of other stores into a new one, and counts them. Nothing is durable before :meth:`sync`."""

    def __init__(self) -> None:
        self.linked = 0
        self.copied = 0
        self.copied_bytes = 0
        self._folders: set[Path] = set()

    def put(self, source: Path, target: Path) -> None:
        """Make ``target`` the file ``source``, whatever a killed run has left there.

        Raises:
            StoreError: ``source`` has gone, or ``target`` cannot be made.
        """
        try:
            size = source.lstat().st_size
            os.close(open_plain(source))  # whoever made that store may have put a link to somebody's file there
        except OSError as error:
            raise StoreError(f"cannot read {source}: {why(error)}; is another process changing that store? Look with verify") from None
        if target.parent not in self._folders:
            make_folder(target.parent)
            self._folders.add(target.parent)
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError:
            if not target.samefile(source):
                target.unlink()
                self.put(source, target)
                return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise StoreError(f"cannot make {target}: {error.strerror}; make room or rights and start again") from error
            publish(target, _pieces(source, size))
            self.copied += 1
            self.copied_bytes += size
            return
        self.linked += 1

    def put_folder(self, source: Path, target: Path) -> None:
        """The same for all plain files below a folder."""
        for file in sorted(source.rglob("*")):
            if file.is_file() and not file.is_symlink():
                self.put(file, target / file.relative_to(source))

    def sync(self) -> None:
        """Make all names so far durable."""
        for folder in sorted(self._folders):
            sync_folder(folder)
        self._folders.clear()


def _pieces(source: Path, size: int) -> Iterator[bytes]:
    handle = open_plain(source)
    try:
        yield from pieces(handle, size)
    finally:
        os.close(handle)
