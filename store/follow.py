"""Waiting for shards that a dump has not committed yet, so that students can begin to learn while it goes on."""

import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from store.errors import MissingFeature

if TYPE_CHECKING:
    from store.reader import Store

_log = logging.getLogger(__name__)

SAY_SECONDS = 60.0
"""How often it says what it waits for."""
_FIRST, _LONGEST = 0.1, 10.0
"""Seconds between two looks, from the first on."""


def wait(store: "Store", pass_name: str, shards: Collection[int], patience: float) -> None:
    """Look at ``store`` again and again until ``shards`` of a pass are committed.

    Raises:
        MissingFeature: nothing of the pass was committed for ``patience`` seconds.
        StoreError: the store cannot be read any more.
    """
    since = time.monotonic()
    told, pause, done = since - SAY_SECONDS, _FIRST, -1
    while missing := sorted(set(shards) - store.committed(pass_name).keys()):
        have, of, now = len(store.committed(pass_name)), store.manifest.rows.slots, time.monotonic()
        if have != done:
            since, done = now, have
        if now - since >= patience:
            raise MissingFeature(
                f"{store.where}: pass {pass_name} has {have} of {of} shards, not {missing[:5]}, and none came for {patience:g} s; "
                "look whether its dump still runs, and start it again to go on"
            )
        if now - told >= SAY_SECONDS:
            _log.warning("waiting for shards %s of pass %s of %s: %d of %d are there", missing[:5], pass_name, store.where, have, of)
            told = now
        time.sleep(min(pause, max(0.0, patience - (now - since))))
        pause = min(1.5 * pause, _LONGEST)
        store.refresh()
