"""Records as clozes: a template with one masked word, which a word for each class fills in.

Pattern and verbaliser of Schick & Schuetze, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
Inference" (PET), EACL 2021, arXiv 2001.07676, section 3: a masked language model answers a classification task with its own head.
What is too long loses tokens from the end of whichever field is longest at the time, of equal ones the last; the template stays whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from transformers import BatchEncoding, PreTrainedTokenizerBase

from online import labels
from online.batch import IGNORED
from online.corpus import Record
from online.drafts import Draft
from online.examples import BATCH_RECORDS, refuse_empty, text_of
from online.templates import Template
from store.strict import Strict

if TYPE_CHECKING:
    from online.rows_spec import RowsSpec

MASK = "mask"
"""Field of a template that stands for the masked word."""

Place = tuple[int, int, int]
"""Where the value of a field stands: segment, first character, character after the last."""


class ClozeSpec(Strict):
    """Rows whose label is a word: a template of ``text`` has a field {mask}, where one of ``words`` belongs."""

    words: tuple[str, ...] = Field(min_length=2)
    """The word of each class of the label, in their order (PET's verbaliser); one token each. Tokenizers that count the space in front
    of a word to it take " great", with the space."""


def cloze_problems(spec: "RowsSpec") -> Iterator[tuple[bool, str]]:
    """Whether something is wrong with rows that are clozes, and what."""
    assert spec.cloze is not None
    masks = sum(Template(template).fields.count(MASK) for template in spec.text)
    yield masks != 1, f"cloze: expected one field {{mask}} in the templates of text, found {masks}"
    yield spec.objective != "mlm", "cloze: a masked word is learned from rows with objective: mlm; add it"
    others = bool(spec.choices or spec.group or spec.spans or spec.phrases or spec.interchange) or spec.long != "truncate"
    yield others, "cloze: takes no choices, group, spans, phrases or interchange, and long: truncate"
    yield spec.copies > 1, "cloze: its one masked word is the same in all copies; leave copies out"
    classes = 0 if spec.label is None or spec.label.tokens else len(spec.label.classes)
    yield classes != len(spec.cloze.words), f"cloze: expected a label with {len(spec.cloze.words)} classes, one for each word"


def verbalisers(spec: ClozeSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """[C] id of each class's word.

    Raises:
        ValueError: a word is no single token, is unknown, or stands for two classes; the message has its pieces.
    """
    found: dict[int, str] = {}
    for word in spec.words:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            spaced = len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
            raise ValueError(
                f"cloze.words: one mask takes one token, but {word!r} is {pieces or 'none'}; "
                + (f"write it with the space in front of it: {f' {word}'!r}" if spaced else "choose another word")
            )
        if ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"cloze.words: the tokenizer does not know {word!r}; choose another word")
        if ids[0] in found:
            raise ValueError(f"cloze.words: {word!r} and {found[ids[0]]!r} are one token, so that their classes could not be told apart")
        found[ids[0]] = word
    return tuple(found)


def clozes(records: Iterable[Record], spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Draft]]:
    """One row for each record that is not skipped, with its class's word as the label of the masked token.

    Raises:
        ValueError: a tokenizer without a mask or without offsets, words that are no single tokens, an empty text, a label outside
            the classes, or a template that leaves no room for its text; names file and record.
    """
    builder = _Builder(spec, tokenizer)
    stream = iter(records)
    while batch := list(islice(stream, BATCH_RECORDS)):
        full = [(record, values) for record in batch if (values := builder.values(record))]
        if not full:
            continue
        encoding = builder.encode([values for _, values in full])
        for row, (record, values) in enumerate(full):
            if draft := builder.draft(record, values, encoding, row):
                yield [draft]


class _Builder:
    def __init__(self, spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> None:
        assert spec.cloze is not None
        assert spec.label is not None
        if not tokenizer.is_fast:
            raise ValueError("a cloze needs a fast tokenizer (tokenizer.json), which knows where a token lies in the text")
        if tokenizer.mask_token_id is None:
            raise ValueError("a cloze needs a mask token, and this tokenizer has none; take the tokenizer of a masked language model")
        self.spec, self.tokenizer, self.label = spec, tokenizer, spec.label
        self.text = [Template(text) for text in spec.text]
        self.separator = tokenizer.sep_token or tokenizer.eos_token or "\n"
        self.numbers = labels.class_numbers(spec.label.classes)
        self.words = verbalisers(spec.cloze, tokenizer)

    def values(self, record: Record) -> dict[str, str] | None:
        """What the fields of the templates hold; None where a template has nothing to say and such records are skipped."""
        values = {name: text_of(record, name) for template in self.text for name in template.fields if name != MASK}
        for template in self.text:
            own = [values[name] for name in template.fields if name != MASK]
            if own and not any(value.strip() for value in own):
                refuse_empty(record, self.spec)
                return None
        return {**values, MASK: str(self.tokenizer.mask_token)}

    def encode(self, values: Sequence[dict[str, str]]) -> BatchEncoding:
        """The rows, whole."""
        texts = [[template.render(own).text for template in self.text] for own in values]
        paired = len(self.text) > 1
        return self.tokenizer(
            [text[0] for text in texts],
            [self.separator.join(text[1:]) for text in texts] if paired else None,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            return_token_type_ids=paired and "token_type_ids" in self.tokenizer.model_input_names,
            return_attention_mask=False,
            verbose=False,
        )

    def draft(self, record: Record, values: dict[str, str], encoding: BatchEncoding, row: int) -> Draft | None:
        """The row; None where the tokenizer makes nothing of its text and such records are skipped."""
        class_ = labels.class_number(record.values[self.label.column], self.numbers, self.label.column, record.where)
        fields = list(self.fields(values))
        masks = [field for name, field in fields if name == MASK]
        segment, start, _ = masks[0]
        masked = encoding.char_to_token(row, start, segment)
        ids = np.array(encoding["input_ids"][row], np.int32)
        if masked is None or ids[masked] != self.tokenizer.mask_token_id:
            raise ValueError(f"{record.where}: the tokenizer does not read {values[MASK]} in the template as its mask token")
        places = [self.tokens(field, values, encoding, row) for name, field in fields if name != MASK]
        if not any(places):
            refuse_empty(record, self.spec)
            return None
        keep = np.ones(len(ids), bool)
        keep[self.dropped(places, len(ids) - self.spec.max_length, record)] = False
        token_labels = np.full(len(ids), IGNORED, np.int32)
        token_labels[masked] = self.words[class_]
        draft = Draft(record, 0, ids[keep], np.array(encoding["special_tokens_mask"][row], bool)[keep], label=float(class_))
        draft.token_labels = token_labels[keep]
        if "token_type_ids" in encoding:
            draft.segments = np.array(encoding["token_type_ids"][row], np.uint8)[keep]
        return draft

    def fields(self, values: dict[str, str]) -> Iterator[tuple[str, Place]]:
        """Every field of the templates and where its value stands."""
        length = 0
        for number, template in enumerate(self.text):
            length = length + len(self.separator) if number > 1 else 0
            for literal, name in template.parts:
                length += len(literal)
                if name is not None:
                    yield name, (int(number > 0), length, length + len(values[name]))
                    length += len(values[name])

    def tokens(self, field: Place, values: dict[str, str], encoding: BatchEncoding, row: int) -> list[int]:
        """The tokens that lie in a field, but for space in front of them."""
        segment, start, end = field
        sequences, offsets = encoding.sequence_ids(row), encoding["offset_mapping"][row]
        # tokens of some tokenizers begin with the space in front of their word
        return [
            token
            for token, (first, last) in enumerate(offsets)
            if sequences[token] == segment and last > first and start < last <= end and first >= start - 1
        ]

    def dropped(self, places: list[list[int]], excess: int, record: Record) -> list[int]:
        """The tokens that a row has too many, from the ends of its longest fields."""
        if excess >= sum(map(len, places)) and excess > 0:
            raise ValueError(
                f"{record.where}: max_length {self.spec.max_length} leaves no room for text beside the template; expected at least "
                f"{self.spec.max_length + excess - sum(map(len, places)) + 1}"
            )
        gone = []
        for _ in range(excess):
            _, longest = max(enumerate(places), key=lambda place: (len(place[1]), place[0]))
            gone.append(longest.pop())
        return gone
