"""Whether all ranks are about to do the same: those that do different things would wait for each other for ever."""

import json
import zlib
from collections.abc import Mapping, Sequence

from online.ranks import Ranks
from store.manifest import Json


def check_same_run(ranks: Ranks, settings: Mapping[str, Json]) -> None:
    """Compare what the run is on all ranks, once, before they share anything else.

    Raises:
        ValueError: on every rank, where they differ.
    """
    if not _alike(ranks, json.dumps(settings, sort_keys=True)):
        raise ValueError(
            f"the ranks of this launch train different runs (this is rank {ranks.number}): recipes, overrides or stores differ between "
            "nodes; start the same command with the same files on all of them"
        )


def check_agreement(ranks: Ranks, decided: Sequence[int], step: int) -> None:
    """Compare what the methods ``decided`` for ``step`` on all ranks; they all come here, or none.

    Raises:
        ValueError: on every rank, where they differ.
    """
    if not _alike(ranks, repr(list(decided))):
        raise ValueError(
            f"step {step}: a method drew different things on different ranks (this is rank {ranks.number}); start the job again with one "
            "installation of teachercache and numpy on all nodes"
        )


def _alike(ranks: Ranks, said: str) -> bool:
    if ranks.count == 1:
        return True
    digest = zlib.crc32(said.encode())
    most, least = ranks.largest([digest, -digest])
    return most == -least
