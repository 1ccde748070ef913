"""Long documents as rows: cut into parts, or packed so that rows are full.

A document is its text's tokens (for causal rows followed by the end-of-text token, where the tokenizer has one). Every piece
of it gets the special tokens that the tokenizer puts around a text, so that a model never starts in the middle of nothing.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from online.corpus import Record
from online.drafts import Draft
from online.examples import BATCH_RECORDS, refuse_empty, text_of
from online.phrases import Numbers, Phrases, joined, spread
from online.templates import Template

if TYPE_CHECKING:
    from online.rows_spec import RowsSpec

Ids = NDArray[np.int32]


class Wrapping(NamedTuple):
    """The special tokens around one text."""

    prefix: Ids
    suffix: Ids

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def wrap(self, content: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """[n] ids with special tokens, and [n] which of them are special."""
        added = np.ones(self.length + len(content), bool)
        added[len(self.prefix) : len(self.prefix) + len(content)] = False
        return np.concatenate([self.prefix, content, self.suffix]), added


def split(record: Record, content: Ids, wrapping: Wrapping, max_length: int, phrases: Numbers | None = None) -> Iterator[Draft]:
    """Cut ``content`` and its ``phrases`` every ``max_length`` minus special tokens; the last part holds what is left."""
    room = max_length - wrapping.length
    for part, start in enumerate(range(0, len(content), room)):
        ids, added = wrapping.wrap(content[start : start + room])
        yield Draft(record, part, ids, added, phrases=None if phrases is None else spread(phrases[start : start + room], added))


class Packer:
    """Fills rows of ``max_length`` tokens with documents, cutting a document where a row ends.

    Tokens of a row carry the number of the piece they belong to; a piece sees only itself. A row ends early only where
    special tokens and one token of text would not fit, and at the end of the corpus.
    """

    def __init__(self, wrapping: Wrapping, max_length: int) -> None:
        self.wrapping, self.max_length = wrapping, max_length
        self._pieces: list[tuple[Ids, NDArray[np.bool_]]] = []
        self._phrases: list[NDArray[np.uint16]] = []
        self._used = 0
        self._first: tuple[Record, int] | None = None

    def add(self, record: Record, content: Ids, phrases: Numbers | None = None) -> Iterator[Draft]:
        """Pack one document, with the phrases of its tokens; yields the rows that it fills."""
        start = part = 0
        while start < len(content):
            room = self.max_length - self._used - self.wrapping.length
            if room < 1:
                yield from self.flush()
                continue
            if self._first is None:
                self._first = (record, part)
                part += 1
            ids, added = self.wrapping.wrap(content[start : start + room])
            self._pieces.append((ids, added))
            if phrases is not None:
                self._phrases.append(spread(phrases[start : start + room], added))
            self._used += len(ids)
            start += room
        if self._used == self.max_length:
            yield from self.flush()

    def flush(self) -> Iterator[Draft]:
        """Yield the unfinished row, if there is one."""
        if self._first is None:
            return
        ids, added = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        documents = np.repeat(np.arange(len(self._pieces), dtype=np.uint16), [len(piece) for piece, _ in self._pieces])
        record, part = self._first
        yield Draft(record, part, ids, added, documents=documents, phrases=joined(self._phrases) if self._phrases else None)
        self._pieces, self._phrases, self._used, self._first = [], [], 0, None


def documents(records: Iterable[Record], spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Draft]]:
    """The rows of all documents, each a group of its own. Splits and domains are packed apart.

    Raises:
        ValueError: an empty text; names file and record.
    """
    wrapping = wrapping_of(tokenizer)
    if spec.max_length <= wrapping.length:
        raise ValueError(f"max_length {spec.max_length} leaves no room for text: expected at least {wrapping.length + 1}")
    packers: dict[tuple[str, int | None], Packer] = {}
    for record, content, phrases in _contents(records, spec, tokenizer, wrapping):
        if spec.long == "split":
            drafts = split(record, content, wrapping, spec.max_length, phrases)
        else:
            packer = packers.setdefault((record.split, record.domain), Packer(wrapping, spec.max_length))
            drafts = packer.add(record, content, phrases)
        yield from ([draft] for draft in drafts)
    for packer in packers.values():
        yield from ([draft] for draft in packer.flush())


def _contents(
    records: Iterable[Record], spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase, wrapping: Wrapping
) -> Iterator[tuple[Record, Ids, Numbers | None]]:
    """Each document that is not skipped, as tokens without special tokens around it, and which phrase each belongs to."""
    template = Template(spec.text[0])
    phrases = Phrases(spec.phrases, tokenizer) if spec.phrases else None
    ending = tokenizer.eos_token_id if spec.objective == "causal" else None
    if ending in wrapping.suffix:
        ending = None
    stream = iter(records)
    while batch := list(islice(stream, BATCH_RECORDS)):
        rendered = [template.render({name: text_of(record, name) for name in template.fields}) for record in batch]
        encoding = tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=phrases is not None,
            verbose=False,
        )
        for row, (record, item, ids) in enumerate(zip(batch, rendered, encoding["input_ids"], strict=True)):
            if item.empty or not ids:
                refuse_empty(record, spec)
                continue
            ids = ids if ending is None else [*ids, ending]
            found = None
            if phrases is not None:
                name = template.fields[0]
                of_column = phrases.ranges(record, len(text_of(record, name)), item.starts[name])
                numbers = phrases([item.text], encoding, row, 0, of_column)
                found = np.pad(numbers, (0, len(ids) - len(numbers)))
            yield record, np.array(ids, np.int32), found


def wrapping_of(tokenizer: PreTrainedTokenizerBase) -> Wrapping:
    """What the tokenizer puts around one text, seen on the first word that it knows."""
    for word in ("a", *sorted(tokenizer.get_vocab())):
        probe = tokenizer(word, return_special_tokens_mask=True)
        ids, added = np.array(probe["input_ids"], np.int32), np.array(probe["special_tokens_mask"], bool)
        if (text := np.flatnonzero(~added)).size:
            return Wrapping(ids[: text[0]], ids[text[-1] + 1 :])
    raise ValueError("this tokenizer turns no word of its vocabulary into a token")
