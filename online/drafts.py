"""A row on its way from text to store: encoded, not yet masked or numbered."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from online.corpus import Record


@dataclass(slots=True)
class Draft:
    """A row of n tokens before masking."""

    record: Record
    """Where it came from; of several packed documents the first."""
    part: int
    """Number of the row among those of the record (its choices, its parts); of packed rows among those that begin in it."""
    ids: NDArray[np.int32]
    """[n]"""
    added: NDArray[np.bool_]
    """[n] True on special tokens that the tokenizer put around the text."""
    segments: NDArray[np.uint8] | None = None
    documents: NDArray[np.uint16] | None = None
    token_labels: NDArray[np.int32] | None = None
    """[n] class of each word's first token, for token classification."""
    phrases: NDArray[np.uint16] | None = None
    label: float | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
