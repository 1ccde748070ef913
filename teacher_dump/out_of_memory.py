"""Memory that does not suffice for a batch, whatever ran out of it."""

import contextlib
from collections.abc import Iterator

import torch

_CPU = "can't allocate memory"
"""What torch's allocator for main memory says; it raises no type of its own."""
_MEND = "shard the teacher, or build shorter rows (rows.max_length)"


class OutOfMemory(ValueError):
    """A batch does not fit; a smaller one may."""


@contextlib.contextmanager
def out_of_memory(device: torch.device, rows: int, tokens: int) -> Iterator[None]:
    """Raise OutOfMemory where a batch of ``rows`` rows padded to ``tokens`` tokens did not fit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _named(device, rows, tokens) from error
    except RuntimeError as error:
        if _CPU not in str(error):
            raise
        raise _named(device, rows, tokens) from error


def alone(row: int, tokens: int) -> OutOfMemory:
    """That the ``row`` of so many tokens is too much by itself."""
    return OutOfMemory(f"out of memory with row {row} of {tokens} tokens alone; {_MEND}")


def _named(device: torch.device, rows: int, tokens: int) -> OutOfMemory:
    if rows == 1:
        return OutOfMemory(f"out of memory on {device} with one row of {tokens} tokens; {_MEND}")
    smaller = rows // 2 * tokens
    return OutOfMemory(f"out of memory on {device} with {rows} rows of {tokens} tokens; lower batch_tokens, as in batch_tokens={smaller}")
