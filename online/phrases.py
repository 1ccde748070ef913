"""Phrases: which tokens of a row belong together, fixed with the rows for methods that compare spans (MGSKD).

They are what a chunker found, as ranges of characters, or stretches of whole words. n tokens of a row, or of a document that
becomes rows.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from transformers import BatchEncoding, PreTrainedTokenizerBase

from online.corpus import Record
from store.strict import Strict, brief

Numbers = NDArray[np.int32]
"""[n] number of the phrase that a token belongs to; 0 for none."""
Ranges = list[tuple[int, int]]
"""Half-open ranges of characters, ascending and apart."""

_INSIDE = re.compile(r"(?<=\w)['’‐-](?=\w)|(?<=\d)[.,](?=\d)")
"""Punctuation that belongs to its word: don't, well-known, 3.14."""


class PhraseSpec(Strict):
    """What a phrase is: one of ``words`` and ``column``."""

    words: int | None = Field(default=None, ge=1)
    """Stretches of up to so many whole words, broken at punctuation and line ends, which belong to none. A word is what the tokenizer takes
    for one before it looks for subwords, and ends at white space at the latest."""
    column: str | None = None
    """Column that holds a list of [start, end] for each record: characters of the only text field, counted from 0, the end not included;
    ascending and apart. Whoever has a chunker brings what it found."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.words is None) == (self.column is None):
            raise ValueError("expected one of words and column")
        return self


class Tokens(NamedTuple):
    """Where n tokens of a text, or of a pair of texts, come from."""

    texts: Sequence[str]
    offsets: Sequence[tuple[int, int]]
    """[n] characters of its text."""
    segments: Sequence[int | None]
    """[n] place of its text; None for those that the tokenizer added."""
    words: Sequence[int | None]
    """[n] number of its word, as the tokenizer counts them."""
    special: Sequence[bool]
    """[n] True on special tokens that stand in the text itself."""


class Phrases:
    """The phrases of texts as ``tokenizer`` cuts them.

    Raises:
        ValueError: the tokenizer does not know where a token lies in the text.
    """

    def __init__(self, spec: PhraseSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError("phrases need a fast tokenizer (tokenizer.json), which knows where a token lies in the text")
        self.spec = spec
        self.special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def ranges(self, record: Record, length: int, shift: int) -> Ranges:
        """What the column says of a record's text field: ``length`` characters, of which the first is character ``shift`` of its segment.

        Nothing where phrases are words.

        Raises:
            ValueError: the column holds something else; names file and record.
        """
        if self.spec.column is None:
            return []
        found = ranges(record.values[self.spec.column], length, self.spec.column, record.where)
        return [(shift + start, shift + end) for start, end in found]

    def __call__(self, texts: Sequence[str], encoding: BatchEncoding, row: int, segment: int, ranges: Ranges) -> Numbers:
        """[n] those of row ``row`` of an encoding of ``texts`` that has offsets.

        Args:
            segment: The text that ``ranges`` (as the method gives them) are about.
        """
        special = [token in self.special for token in encoding["input_ids"][row]]
        tokens = Tokens(texts, encoding["offset_mapping"][row], encoding.sequence_ids(row), encoding.word_ids(row), special)
        return by_ranges(tokens, segment, ranges) if self.spec.words is None else by_words(tokens, self.spec.words)


def by_words(tokens: Tokens, most: int) -> Numbers:
    """Stretches of up to ``most`` words. White space that is a token of its own goes with the word after it; a token of several is one."""
    numbers = np.zeros(len(tokens.offsets), np.int32)
    inside = [{match.start() for match in _INSIDE.finditer(text)} for text in tokens.texts]
    phrase = words = blank = edge = 0  # blank: tokens of white space that wait for their word; edge: where the token before them ends
    segment: int | None = None
    before: int | None = None  # word of that token
    going = False  # whether its phrase may go on
    for token, ((start, end), of, word, special) in enumerate(zip(*tokens[1:], strict=True)):
        if of != segment:
            segment, going, blank, edge = of, False, 0, 0
        if segment is None:
            continue
        text = tokens.texts[segment]
        piece = text[start:end]
        if not piece.strip() and not special:
            blank += 1
            continue
        first, after = end - len(piece.lstrip()), start + len(piece.rstrip())
        gap, marks = text[edge:first], inside[segment]
        if special or (_mute(piece) and first not in marks):
            going, blank, edge = False, 0, end
            continue
        if "\n" in gap:
            going, blank = False, 0
        if not going:
            phrase, words = phrase + 1, 1
        elif (any(map(str.isspace, gap)) or word != before) and not {first, edge - 1} & marks:
            phrase, words = (phrase, words + 1) if words < most else (phrase + 1, 1)
        numbers[token - blank : token + 1] = phrase
        going, before, blank, edge = True, word, 0, after
    return numbers


def by_ranges(tokens: Tokens, segment: int, ranges: Ranges) -> Numbers:
    """A phrase for each of ``ranges`` in the text ``segment``: the tokens that have a character there. One in two belongs to the first."""
    numbers = np.zeros(len(tokens.offsets), np.int32)
    ends = [end for _, end in ranges]
    for token, ((start, end), of) in enumerate(zip(tokens.offsets, tokens.segments, strict=True)):
        if of == segment:
            piece = tokens.texts[segment][start:end]
            first, after = (end - len(piece.lstrip()), start + len(piece.rstrip())) if piece.strip() else (start, end)
            found = int(np.searchsorted(ends, first, "right"))
            if found < len(ranges) and ranges[found][0] < after:
                numbers[token] = found + 1
    return numbers


def ranges(value: object, length: int, column: str, where: str) -> Ranges:
    """What the ``column`` of a record holds about a text of ``length`` characters.

    Raises:
        ValueError: it is no list of ranges in the text that ascend and do not overlap; names ``where``.
    """
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: column {column!r} holds {brief(value)}; expected a list of [start, end], empty for a text without phrases"
        )
    found: Ranges = []
    for item in value:
        least = found[-1][1] if found else 0
        pair = item if isinstance(item, list) and len(item) == 2 and all(type(number) is int for number in item) else None
        if pair is None or not least <= pair[0] < pair[1] <= length:
            raise ValueError(
                f"{where}: column {column!r} holds {brief(item)}; expected [start, end] with {least} <= start < end <= {length}, "
                "ascending and apart, in the characters of the text"
            )
        found.append((pair[0], pair[1]))
    return found


def spread(numbers: Numbers, added: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """[n] phrases of a row whose tokens of text have ``numbers``; those that were ``added`` [n] belong to none."""
    whole = np.zeros(len(added), np.int32)
    whole[~added] = numbers
    return numbered(whole)


def joined(parts: Sequence[NDArray[np.uint16]]) -> NDArray[np.uint16]:
    """[n] phrases of texts that follow one another in a row."""
    before = np.cumsum([0, *(int(part.max(initial=0)) for part in parts)])
    return np.concatenate([np.where(part > 0, part + before[number], 0) for number, part in enumerate(parts)]).astype(np.uint16)


def numbered(numbers: Numbers) -> NDArray[np.uint16]:
    """[n] the same phrases, numbered from 1 on in the order of a row's tokens; a phrase that is interrupted becomes two."""
    starts = (numbers != 0) & (np.diff(numbers, prepend=0) != 0)
    return np.where(numbers != 0, np.cumsum(starts), 0).astype(np.uint16)


@lru_cache(maxsize=1 << 16)
def _mute(piece: str) -> bool:
    """Whether text is nothing but punctuation and white space."""
    return all(letter.isspace() or unicodedata.category(letter).startswith("P") for letter in piece)
