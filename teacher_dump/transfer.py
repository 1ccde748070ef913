"""Stores to object storage and back, with a progress bar and a line at the end."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from online.figures import size
from store import transfer
from teacher_dump.status import status


def upload(path: Path, url: str, follow: bool) -> str:
    """Upload and say what was sent.

    Raises:
        ValueError, StoreError: as store.transfer.upload.
    """
    logging.getLogger("store").setLevel(logging.INFO)
    with _bar() as tick:
        sent = transfer.upload(path, url, tick, follow)
    return f"{url} is as {path} ({size(sent)} sent)" if sent else f"{url} was as {path} already"


def download(url: str, path: Path) -> str:
    """Download and say what there is.

    Raises:
        ValueError, StoreError: as store.transfer.download.
    """
    with _bar() as tick:
        read = transfer.download(url, path, tick)
    return f"{status(path)}\n\n{size(read)} read from {url}"


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    with tqdm(unit=" files", delay=0.5) as progress:

        def tick(done: int, total: int) -> None:
            if progress.total is None or progress.n >= progress.total:
                progress.total = progress.n + total
            progress.update(done)

        yield tick
