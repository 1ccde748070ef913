"""Whether all ranks are about to take the same step."""

import zlib
from collections.abc import Sequence

from online.ranks import Ranks


def check_agreement(ranks: Ranks, decided: Sequence[int], step: int) -> None:
    """Compare what the methods ``decided`` for ``step`` on all ranks; they all come here, or none.

    Raises:
        ValueError: on every rank, where they differ: ranks that run different modules would wait for each other for ever.
    """
    if ranks.count == 1:
        return
    drawn = zlib.crc32(repr(list(decided)).encode())
    most, least = ranks.largest([drawn, -drawn])
    if most != -least:
        raise ValueError(
            f"step {step}: a method drew different things on different ranks (this is rank {ranks.number}); all ranks must run the same "
            "code, seed and recipe: start the job again with one installation on all nodes"
        )
