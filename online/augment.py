"""Copies of texts in which words are replaced by likely or similar ones (Jiao et al. 2020, TinyBERT, arXiv 1909.10351, algorithm 1).

Each replaceable word of a copy is replaced with probability p_t by one of K candidates, each as likely as the others: for words that
are one token, the K likeliest of a masked language model with the word masked; for all others the K nearest by word vectors. Without
word vectors those stay as they are, so that rare words are never replaced: that is less than the paper does.

Candidates are found once for a record, from its text as it stands. The algorithm as printed asks the model anew for every copy, with
the words in it that are replaced already; that takes N_a times as many passes, and the authors' code doesn't either. Their code shows
the model the unmasked sentence as a second segment, joins words with single spaces, and augments one sentence of a pair at a time;
here, as in the paper, the model sees the masked sentence alone, everything but the words that are replaced stays as it is written, and
each copy of a record has all its columns drawn anew.

Which words are left alone is as in the authors' code (the paper does not say): those with anything but letters, and function words.

Draws come from a counter-based generator addressed by (seed, record, column, copy, word), as masks do (online.masking).
"""

import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, islice
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from online.cloze import Cloze, Span
from online.corpus import Record
from online.word_vectors import WordVectors
from store.strict import Strict

AUGMENTING = 1
"""Version of augmentation; any change that alters copies bumps it."""

BLOCK = 256
"""Records whose words are asked for together. No option: answers of another block differ in their last bits."""

STOP_WORDS = frozenset(
    word
    for line in (
        "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself",
        "they them their theirs themselves this that these those a an the some any each few more most other such all both same own",
        "am is are was were be been being have has had having do does did doing can will should",
        "not no nor only so than too very just now then once here there again further",
        "and but if or because as until while of at by for with about against between into through during before after above below",
        "to from up down in out on off over under",
        "s t d m o y ll re ve ma don ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn",
    )
    for word in line.split()
)
"""English function words, and what is left of contractions once they are cut at the apostrophe: those that the authors' code
leaves alone. Question words are not among them."""

_STREAM = 1
"""Second half of the generator's key; masks have 0, so that one seed serves both."""


class AugmentSpec(Strict):
    """How copies are drawn."""

    columns: tuple[str, ...] = Field(min_length=1)
    """Text columns whose words are replaced, such as both sentences of a pair; all others are repeated. Places of words or
    characters that other columns count are not moved."""
    copies: int = Field(default=20, ge=1, le=1000)
    """N_a, copies of each record beside itself. The paper's 20 is unverified; the authors' code takes 20 for SST-2 and QNLI, 30 for
    CoLA, MRPC, STS-B and RTE, 10 for MNLI and QQP."""
    candidates: int = Field(default=15, ge=1)
    """K, words that a replacement is drawn from; as in the authors' code."""
    probability: float = Field(default=0.4, gt=0, le=1)
    """p_t, chance of a word to be replaced; as in the authors' code. A candidate may be the word itself."""
    repeats: Literal["keep", "drop"] = "keep"
    """keep: as many copies as were asked for, as in the paper; drop: without those that equal the record or an earlier copy of it, as
    in the authors' code. Short texts have many."""
    max_length: int = Field(default=128, ge=3)
    """Tokens of a text that the masked language model sees, special tokens included; words behind them stay as they are."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)


class Copy(NamedTuple):
    """A record, or a copy of it."""

    original: int
    """Number of the record in the corpus, from 0."""
    copy: int
    """0 for the record itself, copies from 1."""
    values: dict[str, object]
    """Column -> value."""


class _Text(NamedTuple):
    """A text, its replaceable words, and what they may be replaced by."""

    text: str
    spans: list[tuple[int, Span]]
    """Number of the word in the text, and where it stands."""
    candidates: list[tuple[str, ...]]


def augmented(records: Iterable[Record], spec: AugmentSpec, cloze: Cloze, vectors: WordVectors | None) -> Iterator[Copy]:
    """Each record, and behind it its copies.

    Raises:
        ValueError: a value that is no text in one of the columns; names file and record.
    """
    records = iter(records)
    while block := list(islice(records, BLOCK)):
        texts = iter(_texts([_text(record, column) for record in block for column in spec.columns], spec, cloze, vectors))
        for record in block:
            yield from _copies(record, dict(zip(spec.columns, texts, strict=False)), spec)


def words_of(text: str) -> list[Span]:
    """Where the words of a text stand: what lies between white space and punctuation."""
    spans, start = [], 0
    for inside, characters in groupby(text, _in_word):
        end = start + sum(1 for _ in characters)
        if inside:
            spans.append((start, end))
        start = end
    return spans


def is_replaceable(word: str) -> bool:
    """Whether a word is of letters alone and no function word, in large letters or small."""
    return word.isalpha() and word.lower() not in STOP_WORDS


def draw(words: int, *, seed: int, address: tuple[int, int, int]) -> tuple[NDArray[np.float64], NDArray[np.uint64]]:
    """What decides on each of so many words: [n] a number in [0, 1) to be below p_t, and [n] one whose rest by K chooses a candidate.

    Args:
        address: Record, column and copy; draws of different addresses are independent, and a word's don't depend on those behind it.
    """
    record, column, copy = address
    raw = np.random.Philox(key=[seed, _STREAM], counter=[0, copy, column, record]).random_raw(2 * words).reshape(-1, 2)
    return (raw[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53, raw[:, 1]


def _text(record: Record, column: str) -> str:
    value = record.values[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{record.where}: column {column!r} holds a {type(value).__name__}; expected text")
    return value


def _texts(texts: Sequence[str], spec: AugmentSpec, cloze: Cloze, vectors: WordVectors | None) -> list[_Text]:
    """The texts with their replaceable words and candidates for each."""
    replaceable = [[(number, span) for number, span in enumerate(words_of(text)) if is_replaceable(text[slice(*span)])] for text in texts]
    found = cloze.answers(texts, [[span for _, span in spans] for spans in replaceable], spec.candidates)
    made = []
    for text, spans, answers in zip(texts, replaceable, found, strict=True):
        candidates = []
        for (_, span), answer in zip(spans, answers, strict=True):
            if answer is None:
                answer = () if vectors is None else vectors.nearest(text[slice(*span)], spec.candidates)
            candidates.append(answer)
        made.append(_Text(text, spans, candidates))
    return made


def _copies(record: Record, texts: dict[str, _Text], spec: AugmentSpec) -> Iterator[Copy]:
    """The record and its copies."""
    yield Copy(record.ordinal, 0, record.values)
    seen = {tuple(text.text for text in texts.values())}
    for copy in range(1, spec.copies + 1):
        drawn = {
            column: _replaced(text, spec, (record.ordinal, number, copy)) if text.spans else text.text
            for number, (column, text) in enumerate(texts.items())
        }
        if spec.repeats == "keep" or tuple(drawn.values()) not in seen:
            seen.add(tuple(drawn.values()))
            present = {column: text for column, text in drawn.items() if record.values[column] is not None}
            yield Copy(record.ordinal, copy, record.values | present)


def _replaced(text: _Text, spec: AugmentSpec, address: tuple[int, int, int]) -> str:
    """A copy of ``text`` with words drawn for it."""
    chances, choices = draw(text.spans[-1][0] + 1, seed=spec.seed, address=address)
    parts, done = [], 0
    for (number, (start, end)), candidates in zip(text.spans, text.candidates, strict=True):
        if candidates and chances[number] < spec.probability:
            word = candidates[int(choices[number]) % len(candidates)]
            if text.text[start:end].istitle():
                word = word[0].upper() + word[1:]
            parts += [text.text[done:start], word]
            done = end
    return "".join([*parts, text.text[done:]])


@lru_cache(1 << 16)
def _in_word(character: str) -> bool:
    if character.isspace() or character in string.punctuation:
        return False
    return not unicodedata.category(character).startswith("P")
