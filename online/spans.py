"""Marked stretches of text (the word of WiC, the mentions of WSC) as spans of tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import model_validator

from store.strict import Strict


class SpanSpec(Strict):
    """A stretch of one text field; its end is given by a column, or by a column that repeats the marked text."""

    field: str
    """Column of the text, which a template must use."""
    start: str
    """Column with the first character or word, counted from 0 in the field."""
    end: str | None = None
    """Column with the character or word after the last."""
    text: str | None = None
    """Column with the marked text, from whose length the end follows."""
    unit: Literal["characters", "words"] = "characters"
    """Words are what white space separates."""

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if (self.end is None) == (self.text is None):
            raise ValueError("a span needs either end or text")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.start, self.end, self.text) if column is not None)


def characters(spec: SpanSpec, field: str, values: Mapping[str, object], where: str) -> tuple[int, int]:
    """Half-open character range of the span in the text ``field``.

    Raises:
        ValueError: the range is empty or leaves the text.
    """
    start = _number(values[spec.start], spec.start, where)
    if spec.text is not None:
        marked = str(values[spec.text])
        end = start + (len(marked) if spec.unit == "characters" else len(marked.split()))
    else:
        end = _number(values[spec.end], spec.end, where) if spec.end is not None else start
    places = [match.span() for match in re.finditer(r"\S+", field)] if spec.unit == "words" else None
    limit = len(field) if places is None else len(places)
    if not 0 <= start < end <= limit:
        raise ValueError(f"{where}: span {start} to {end} of {spec.field!r} is empty or leaves the text of {limit} {spec.unit}")
    return (start, end) if places is None else (places[start][0], places[end - 1][1])


def tokens(
    offsets: Sequence[tuple[int, int]], segments: Sequence[int | None], segment: int, start: int, end: int
) -> tuple[int, int] | None:
    """Half-open range of the tokens of ``segment`` that overlap characters [start, end); None where all were cut off."""
    inside = [
        token
        for token, ((first, after), of) in enumerate(zip(offsets, segments, strict=True))
        if of == segment and first < end and after > start
    ]
    return (inside[0], inside[-1] + 1) if inside else None


def first_tokens(offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> list[int | None]:
    """The first token of each word (character ranges, ascending); None where the word was cut off or has no token."""
    found: list[int | None] = []
    token = 0
    for start, end in words:
        while token < len(offsets) and (offsets[token][1] <= start or offsets[token][0] == offsets[token][1]):
            token += 1
        found.append(token if token < len(offsets) and offsets[token][0] < end else None)
    return found


def _number(value: object, column: str, where: str) -> int:
    try:
        return int(value) if isinstance(value, str | int) else int(str(value))
    except ValueError:
        raise ValueError(f"{where}: column {column!r} holds {value!r}; expected a whole number") from None
