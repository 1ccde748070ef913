"""What a source of another program gives: model inputs, and what a teacher answered for each."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from store.features import FeatureKey, FeatureSpec
from store.manifest import Json

Answers = Mapping[FeatureKey, Mapping[str, NDArray[Any]]]
"""Key -> array name -> packed [units of the row, width], in its stored type (bfloat16 as uint16)."""

UNSCORED = -100
"""Token label of a token whose logits are scored against nothing."""


@dataclass(frozen=True)
class Sample:
    """One model input of n tokens."""

    file: str
    record: int
    """Number of the record in its file, from 0."""
    input_ids: NDArray[np.int32]
    """[n]"""
    documents: NDArray[np.uint16] | None = None
    """[n] number of the packed document that each token belongs to."""
    token_labels: NDArray[np.int32] | None = None
    """[n] the word that the logits at a token are scored against, UNSCORED where there is none; None: always the next word."""
    answers: Answers = field(default_factory=dict)
    part: int = 0
    """Number of the input among those of its record."""

    @property
    def labelled(self) -> int:
        """Tokens whose logits are scored: all but the last of each document, where nothing else is said."""
        if self.token_labels is not None:
            return int((self.token_labels != UNSCORED).sum())
        documents = 1 if self.documents is None else int(self.documents[-1]) + 1
        return len(self.input_ids) - documents


class Source(Protocol):
    """Records of another program's files, in a fixed order."""

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """How the answers of every record are stored."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read, in this order."""

    @property
    def options(self) -> Json:
        """What decides, beside the files, how a record is read."""

    def records(self, start: int, answers: bool) -> Iterator[list[Sample]]:
        """Records from number ``start`` (over all files) on, each as one or more inputs that are read together.

        Without ``answers`` only the inputs are read, where that is cheaper.

        Raises:
            ValueError: a record is not what it should be; the message names file and record.
            StoreError: a file is damaged or cannot be read.
        """


def natural(path: Path) -> list[str | int]:
    """Sorts ``data_10`` after ``data_9``."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", str(path)))]
