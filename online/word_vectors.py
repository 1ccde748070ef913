"""Word vectors from a text file, and which words lie nearest to one.

Shapes: W words, D numbers of a vector.
"""

import hashlib
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from store.strict import Strict, brief

_LONGEST = 1 << 20
"""Letters of a line; one of 300 numbers has about 3,000."""
_REMEMBERED = 1 << 16
"""Words whose neighbours are kept: a search goes through all vectors."""


class WordVectorsSpec(Strict):
    """A file of word vectors: on each line a word and its numbers, between single spaces, as GloVe, fastText and word2vec write them."""

    file: Path
    """Text, also compressed (.gz, .bz2, .zst); a first line of two whole numbers, as fastText's, is skipped."""
    words: int = Field(default=100_000, ge=2)
    """Read this many words; such files list frequent words first. Memory is this many vectors of float32. The authors' code
    takes 100,000."""


class WordVectors:
    """The words of a file that are letters alone, with vectors of length 1."""

    def __init__(self, words: list[str], vectors_WD: NDArray[np.float32], fingerprint: str) -> None:
        self.fingerprint = fingerprint
        """SHA-256 of the lines that were read."""
        self._words = words
        self._vectors_WD = vectors_WD
        self._numbers = {word: number for number, word in enumerate(words)}
        self._near = lru_cache(_REMEMBERED)(self._search)

    @classmethod
    def read(cls, spec: WordVectorsSpec) -> "WordVectors":
        """Read the first words of a file, line by line.

        A word that stands there twice has its first vector; one of zeros has no direction and is left out.

        Raises:
            ValueError: no such file, a line that is no word with as many finite numbers as the first, or no word at all.
        """
        words: dict[str, None] = {}
        vectors_WD = np.zeros((0, 0), np.float32)
        digest = hashlib.sha256()
        for number, line in _lines(spec):
            digest.update(line.encode())
            fields = line.rstrip().rsplit(" ", vectors_WD.shape[1] or -1)
            if not len(vectors_WD):
                vectors_WD = np.empty((spec.words, len(fields) - 1), np.float32)  # pages that nothing is written to take no memory
            vector_D = _vector(fields, vectors_WD.shape[1], f"{spec.file}, line {number}")
            length = float(np.sqrt(np.square(vector_D).sum()))
            word = fields[0]
            if word.isalpha() and word not in words and length > 0:
                vectors_WD[len(words)] = vector_D / length
                words[word] = None
        if not words:
            raise ValueError(f"expected words with vectors in {spec.file}, found none")
        return cls(list(words), vectors_WD[: len(words)], digest.hexdigest())

    def nearest(self, word: str, count: int) -> tuple[str, ...]:
        """The ``count`` words of the largest cosine to ``word``, largest first and without itself; none where it has no vector.

        A word that is not there as it is written is looked up in small letters. One search is one product of a matrix and a
        vector whatever else is asked, so that its rounding is always the same; of equal cosines the earlier word wins.
        """
        known = word if word in self._numbers else word.lower()
        return self._near(known, count) if known in self._numbers else ()

    def _search(self, word: str, count: int) -> tuple[str, ...]:
        own = self._numbers[word]
        cosines_W = self._vectors_WD @ self._vectors_WD[own]
        cosines_W[own] = -np.inf
        nearest = np.argsort(-cosines_W, kind="stable")[: min(count, len(self._words) - 1)]
        return tuple(self._words[number] for number in nearest)


def _lines(spec: WordVectorsSpec) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold words, numbered from 1."""
    try:
        with io.TextIOWrapper(pa.input_stream(str(spec.file)), encoding="utf-8") as file:
            left, number = spec.words, 0
            while left and (line := file.readline(_LONGEST)):
                number += 1
                if len(line) == _LONGEST:
                    raise ValueError(f"{spec.file}, line {number}: expected a word and its numbers, found more than {_LONGEST:,} letters")
                if number == 1 and len(fields := line.split()) == 2 and all(field.isdecimal() for field in fields):
                    continue
                left -= 1
                yield number, line
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"word vectors {spec.file} cannot be read: {error}") from None


def _vector(fields: list[str], width: int, where: str) -> NDArray[np.float64]:
    """The numbers behind a word, [D]."""
    try:
        vector_D = np.array([float(field) for field in fields[1:]])
    except ValueError:
        vector_D = np.full(width, np.nan)
    if not width or len(vector_D) != width or not np.isfinite(vector_D).all():
        numbers = f"{width} finite numbers" if width else "numbers"
        raise ValueError(f"{where}: expected a word and {numbers}, between single spaces, found {brief(' '.join(fields))}")
    return vector_D
