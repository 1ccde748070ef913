"""How many tokens the teacher's batches have: as the recipe says, as the pass began, or the largest that fit and pay."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from online.batch import BUCKET
from online.collate import collate
from online.figures import read_bytes, size
from online.ranks import talking
from online.replica import Replica
from store.manifest import PassInfo
from store.reader import Store
from store.table import RowTable
from teacher_dump.batches import padded_lengths, together, whole
from teacher_dump.memory import Peak, free_memory
from teacher_dump.out_of_memory import OutOfMemory, alone
from teacher_dump.recipe import DumpRecipe
from teacher_dump.teacher import Origins, TeacherPass

SECONDS = 30.0
"""No larger batch is begun that would end later than this."""
GAIN = 1.05
"""A batch of twice the size pays if it answers at least so many times the tokens a second."""
QUICK = 0.5
"""Batches that take fewer seconds are timed twice."""
VAIN = 2
"""Doublings in a row that do not pay end the search."""


def batch_tokens(recipe: DumpRecipe, known: PassInfo | None, teacher: TeacherPass, store: Store, replica: Replica) -> int:
    """Padded tokens of a batch in this run; all ranks of the ``replica`` ask at once and get the same.

    Args:
        known: The pass of this name in the store, if there is one: it goes on with the batches that it began with, unless
            ``recipe`` says others.

    Raises:
        OutOfMemory: the longest row does not fit alone.
    """
    frozen = known.batch_tokens if known is not None else None
    if known is not None and frozen is None:  # of an older store: what its last runs have found
        said = [commit.batch_tokens or 0 for commit in store.committed(recipe.pass_name).values()]
        frozen = replica.ranks.largest([max(said, default=0)])[0] or None
    if recipe.batch_tokens == "auto":
        return frozen or largest_batch(teacher, store, replica, recipe.memory)
    if frozen not in (None, recipe.batch_tokens):
        _say(
            replica.job_rank == 0,
            f"batches of {recipe.batch_tokens:,} tokens; the pass began with {frozen:,}, which batch_tokens=auto would go on with",
        )
    return recipe.batch_tokens


class Try(NamedTuple):
    """What a batch takes."""

    tokens: int
    """Padded tokens that it is held to."""
    seconds: float
    """For each of the padded tokens that it has."""
    cost: float
    """Seconds."""
    taken: int
    """Bytes beside the weights."""


def largest_batch(teacher: TeacherPass, store: Store, replica: Replica, memory: float | str) -> int:
    """The largest batch, a power of two in padded tokens, that stays within ``memory`` and pays (GAIN).

    Batches of the longest row, repeated, are tried in doubling sizes: of all batches of a size they take the most memory. The
    ranks of a replica try them together, and go by the slowest and largest.

    Args:
        memory: As in a recipe.

    Raises:
        OutOfMemory: the longest row does not fit alone.
    """
    rows = store.rows
    row = longest_row(rows)
    length = int(padded_lengths(rows, whole(rows, np.array([row]))).max())
    try:
        _timed(teacher, store, row, 1)  # what is done once is not to be measured
        peak, limit = Peak(teacher.device), _limit(memory, teacher.device, replica)
        chosen, why = search(_tried(teacher, store, replica, row, length, peak), limit)
    except OutOfMemory:
        if replica.size > 1:  # the other ranks are in the middle of this batch
            raise
        raise alone(row, int(rows.at(np.array([row])).length[0])) from None
    _say(replica.leads, f"batches of {chosen:,} tokens from now on: {why}")
    return chosen


def _tried(teacher: TeacherPass, store: Store, replica: Replica, row: int, length: int, peak: Peak) -> Iterator[Try | None]:
    """Larger and larger batches of the ``row`` (and its partner), whose padded length it is, until no shard fills them."""

    def measured(count: int) -> tuple[float, int]:
        seconds, taken = peak.of(lambda: _timed(teacher, store, row, count))
        microseconds, taken = replica.ranks.largest([round(seconds * 1e6), taken])
        return max(1, microseconds) / 1e6, taken

    rows = store.rows
    tokens, most = 1 << (length - 1).bit_length(), int((rows.slot_tokens + rows.slot_rows * (BUCKET - 1)).max())
    least = together(rows)
    while True:
        count = max(least, tokens // length // least * least)
        try:
            seconds, taken = measured(count)
            quickest = min(seconds, measured(count)[0]) if seconds < QUICK else seconds
        except OutOfMemory:
            if count == least or replica.size > 1:
                raise
            yield None
            return
        yield Try(tokens, quickest / (count * length), seconds, taken)
        if tokens >= most:
            return
        tokens *= 2


def search(tried: Iterable[Try | None], limit: int) -> tuple[int, str]:
    """Tokens of the best of growing batches, and why they are not more.

    Args:
        tried: Lazily: each is run when it is asked for. None for one that did not fit.
        limit: Bytes that one may take.
    """
    best, chosen, vain, spent = math.inf, 0, 0, 0.0
    for one in tried:
        if one is None:
            return chosen, "twice of that does not fit into memory"
        if not chosen or (one.taken <= limit and one.seconds * GAIN <= best):
            best, chosen, vain = one.seconds, one.tokens, 0
        else:
            vain += 1
        spent += one.cost
        if 2 * one.taken > limit:
            return chosen, f"more might take over {size(limit)} of memory"
        if vain == VAIN:
            return chosen, "more are no faster"
        if spent + 2 * one.cost > SECONDS:
            return chosen, f"to try more takes over {SECONDS:.0f} s"
    return chosen, "no shard has more of one length"


def longest_row(rows: RowTable) -> int:
    """Number of the row that takes most: of the longest padded ones one with the most labelled tokens."""
    best, found = (0, 0), 0
    for slot in range(rows.info.slots):
        members = rows.rows_of(slot)
        padded, labelled = padded_lengths(rows, members), rows.at(members).labelled
        place = int(np.lexsort((labelled, padded))[-1])
        if (here := (int(padded[place]), int(labelled[place]))) > best:
            best, found = here, int(members[place])
    return found


def _timed(teacher: TeacherPass, store: Store, row: int, count: int) -> float:
    """Seconds for a batch of ``count`` rows, the ``row`` (and its partner) repeated, until its answers are on the host."""
    unit = whole(store.rows, np.array([row]))
    members = np.resize(unit, max(count, len(unit)))
    batch, sources = collate(store, members), Origins(store.rows, members)
    start = time.perf_counter()
    with talking():
        teacher.start(batch, sources).arrays()
    return time.perf_counter() - start


def _limit(memory: float | str, device: torch.device, replica: Replica) -> int:
    """Bytes that a batch may take on each rank of the replica."""
    if isinstance(memory, str):
        limit = read_bytes(memory)
        assert limit is not None  # as the recipe has checked
    else:
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", replica.job_size))
        sharers = -(-on_machine // torch.cuda.device_count()) if device.type == "cuda" else on_machine
        limit = memory * free_memory(device) / sharers
    return -replica.ranks.largest([-int(limit)])[0]


def _say(speaks: bool, text: str) -> None:
    if speaks:
        tqdm.write(text, file=sys.stderr)
