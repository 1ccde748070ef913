"""Records as model inputs of one or two segments: classification, regression, choice, token classification, marked spans.

The first template is the first segment; all others, and after them a choice, are the second, joined by the tokenizer's separator
token (its end-of-text token, or a line break, where it has none). What is too long loses tokens from the end of whichever
segment is longer at the time, one by one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase

from online import labels, spans
from online.batch import IGNORED
from online.corpus import Record
from online.drafts import Draft
from online.phrases import Phrases, Ranges, numbered
from online.templates import Rendered, Template

if TYPE_CHECKING:
    from online.rows_spec import RowsSpec

BATCH_RECORDS = 512
"""Records that are tokenised in one call."""


@dataclass(slots=True)
class _Input:
    """One row as text."""

    segments: list[str]
    label: float | None = None
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    """Segment, first character, character after the last."""
    words: list[tuple[int, int]] = field(default_factory=list)
    """Character ranges of the words that ``classes`` belong to."""
    classes: list[int] = field(default_factory=list)
    response: tuple[int, int] | None = None
    """Character of the text at which the response begins, and the one behind its last that is not white space."""
    phrases: tuple[int, Ranges] = (0, [])
    """Segment of the first text field, and the ranges of it that are phrases, where a column says so."""


def examples(records: Iterable[Record], spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Draft]]:
    """The rows of each record, or of consecutive records with one value of the group column.

    Raises:
        ValueError: an empty text, a label outside the classes, or a span outside its text; names file and record.
    """
    builder = _Builder(spec, tokenizer)
    group: list[Draft] = []
    for record, drafts in builder.rows(records):
        if group and (spec.group is None or _group_of(record, spec.group) != _group_of(group[0].record, spec.group)):
            yield group
            group = []
        group += drafts
    if group:
        yield group


def _group_of(record: Record, column: str) -> tuple[object, int]:
    return record.values[column], record.source


class _Builder:
    def __init__(self, spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.text = [Template(text) for text in spec.text]
        self.choices = [Template(choice) for choice in spec.choices]
        self.paired = len(self.text) + bool(self.choices) > 1
        self.separator = tokenizer.sep_token or tokenizer.eos_token or "\n"
        self.ending = tokenizer.eos_token_id if spec.objective == "causal" else None
        self.by_word = spec.label is not None and spec.label.tokens
        self.numbers = labels.class_numbers(spec.label.classes or tuple(range(len(self.choices)))) if spec.label else {}
        self.phrases = Phrases(spec.phrases, tokenizer) if spec.phrases else None
        self.offsets = bool(spec.spans) or self.by_word or self.phrases is not None or spec.response is not None
        if self.offsets and not tokenizer.is_fast:
            raise ValueError(
                "spans, responses and token labels need a fast tokenizer (tokenizer.json), which knows where a token lies in the text"
            )
        if spec.max_length < (needed := tokenizer.num_special_tokens_to_add(pair=self.paired) + 1 + self.paired):
            raise ValueError(f"max_length {spec.max_length} leaves no room for text: expected at least {needed}")

    def rows(self, records: Iterable[Record]) -> Iterator[tuple[Record, list[Draft]]]:
        """Each record that is not skipped, with its rows (one, or one for each choice)."""
        stream = iter(records)
        while batch := list(islice(stream, BATCH_RECORDS)):
            full = [(record, inputs) for record in batch if (inputs := self.inputs(record))]
            if not full:
                continue
            encoding = self.encode([item for _, inputs in full for item in inputs])
            position = 0
            for record, inputs in full:
                drafts = [self.draft(record, number, item, encoding, position + number) for number, item in enumerate(inputs)]
                position += len(inputs)
                if any(draft.added.all() for draft in drafts):
                    refuse_empty(record, self.spec)
                else:
                    yield record, drafts

    def encode(self, inputs: Sequence[_Input]) -> BatchEncoding:
        return self.tokenizer(
            [item.segments[0] for item in inputs],
            [item.segments[1] for item in inputs] if self.paired else None,
            truncation="longest_first",
            max_length=self.spec.max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=self.offsets,
            return_token_type_ids=self.paired and "token_type_ids" in self.tokenizer.model_input_names,
            return_attention_mask=False,
            verbose=False,
        )

    def inputs(self, record: Record) -> list[_Input]:
        """The rows of a record as text; none where it is empty and skipped."""
        spec = self.spec
        first = _Input([])
        if self.by_word:
            values = {self.text[0].fields[0]: self.word_labels(record, first)}
        else:
            values = {name: text_of(record, name) for template in self.text + self.choices for name in template.fields}
        rendered = [template.render(values) for template in self.text]
        choices = [template.render(values) for template in self.choices]
        if any(item.empty for item in rendered + choices):
            refuse_empty(record, spec)
            return []
        for span in spec.spans:
            segment, shift = self.place(span.field, rendered)
            start, end = spans.characters(span, values[span.field], record.values, record.where)
            first.spans.append((segment, shift + start, shift + end))
        if spec.response is not None:
            start = rendered[0].starts[spec.response]
            first.response = start, len(rendered[0].text.rstrip())
        if self.phrases is not None:
            name = next(name for template in self.text for name in template.fields)
            segment, shift = self.place(name, rendered)
            first.phrases = segment, self.phrases.ranges(record, len(values[name]), shift)
        texts = [item.text for item in rendered]
        if not choices:
            first.segments = self.segments(texts)
            first.label = self.label(record)
            return [first]
        right = self.label(record)
        return [
            replace(first, segments=self.segments([*texts, choice.text]), label=None if right is None else float(number == right))
            for number, choice in enumerate(choices)
        ]

    def place(self, field: str, rendered: Sequence[Rendered]) -> tuple[int, int]:
        """Segment of a text field, and the character of it at which the field begins."""
        number = next(number for number, item in enumerate(rendered) if field in item.starts)
        return int(number > 0), rendered[number].starts[field] + sum(len(item.text) + len(self.separator) for item in rendered[1:number])

    def segments(self, texts: list[str]) -> list[str]:
        return [texts[0], self.separator.join(texts[1:])] if self.paired else texts

    def label(self, record: Record) -> float | None:
        spec = self.spec.label
        if spec is None or spec.tokens:
            return None
        value = record.values[spec.column]
        if spec.score:
            return labels.score(value, spec.column, record.where)
        return float(labels.class_number(value, self.numbers, spec.column, record.where))

    def word_labels(self, record: Record, item: _Input) -> str:
        """Fill in words and classes of ``item``; returns the words joined by spaces."""
        assert self.spec.label is not None
        column, of_label = self.text[0].fields[0], self.spec.label.column
        words = [str(word) for word in labels.words(record.values[column], column, record.where)]
        classes = labels.words(record.values[of_label], of_label, record.where)
        if len(words) != len(classes):
            raise ValueError(f"{record.where}: {len(words)} words in column {column!r}, {len(classes)} labels in {of_label!r}")
        item.classes = [labels.class_number(value, self.numbers, of_label, record.where) for value in classes]
        start = 0
        for word in words:
            item.words.append((start, start + len(word)))
            start += len(word) + 1
        return " ".join(words)

    def draft(self, record: Record, part: int, item: _Input, encoding: BatchEncoding, row: int) -> Draft:
        tokens, added = encoding["input_ids"][row], encoding["special_tokens_mask"][row]
        if self.ending is not None and len(tokens) < self.spec.max_length and tokens[-1:] != [self.ending]:
            tokens, added = [*tokens, self.ending], [*added, 0]
        ids = np.array(tokens, np.int32)
        draft = Draft(record, part, ids, np.array(added, bool), label=item.label)
        if "token_type_ids" in encoding:
            draft.segments = np.array(encoding["token_type_ids"][row], np.uint8)
        if self.phrases is not None:
            found = self.phrases(item.segments, encoding, row, *item.phrases)
            draft.phrases = numbered(np.pad(found, (0, len(ids) - len(found))))
        if self.offsets:
            offsets, segments = encoding["offset_mapping"][row], encoding.sequence_ids(row)
            for segment, start, end in item.spans:
                marked = spans.tokens(offsets, segments, segment, start, end)
                if marked is None:
                    raise ValueError(
                        f"{record.where}: a span lies beyond max_length {self.spec.max_length}; raise it, or leave the record out"
                    )
                draft.spans.append(marked)
            if item.response is not None:
                draft.token_labels = _followers(ids, _response(offsets, segments, *item.response))
            if self.by_word:
                draft.token_labels = np.full(len(ids), IGNORED, np.int32)
                for token, number in zip(spans.first_tokens(offsets, item.words), item.classes, strict=True):
                    if token is not None:
                        draft.token_labels[token] = number
        return draft


def _response(offsets: Sequence[tuple[int, int]], segments: Sequence[int | None], start: int, end: int) -> int | None:
    """The first token of the response at characters [start, end), of an empty one that behind the text; None where all were cut off."""
    if start < end:
        found = spans.tokens(offsets, segments, 0, start, end)
        return None if found is None else found[0]
    return 1 + max(token for token, segment in enumerate(segments) if segment == 0)


def _followers(ids: NDArray[np.int32], first: int | None) -> NDArray[np.int32]:
    """[n] the next token where that is the token ``first`` or a later one."""
    labels = np.full(len(ids), IGNORED, np.int32)
    if first is not None:
        first = max(first, 1)
        labels[first - 1 : -1] = ids[first:]
    return labels


def refuse_empty(record: Record, spec: "RowsSpec") -> None:
    """Raise for a text that is white space or yields no token, unless such records are skipped."""
    if spec.empty == "error":
        raise ValueError(f"{record.where}: empty text; set rows.empty=skip to leave such records out")


def text_of(record: Record, column: str) -> str:
    """The value of a text field; numbers as Python writes them, nothing for null."""
    value = record.values[column]
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    raise ValueError(f"{record.where}: column {column!r} holds a {type(value).__name__}; expected text")
