"""Text templates with named fields, such as ``"question: {question}"``. A doubled brace stands for itself."""

import string
from collections.abc import Mapping
from typing import NamedTuple


class Rendered(NamedTuple):
    """A filled template."""

    text: str
    starts: dict[str, int]
    """Field -> character of ``text`` at which its value first begins."""
    empty: bool
    """Whether nothing but white space was filled in (for a template without fields: whether it is white space itself)."""


class Template:
    """A template whose fields are columns of the corpus.

    Raises:
        ValueError: unbalanced braces, or a field that is more than a name.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"template {text!r}: {error}; write {{{{ and }}}} for braces") from None
        for _, field, layout, conversion in parts:
            if field is not None and (not field or layout or conversion):
                raise ValueError(
                    f"template {text!r}: expected a column name between braces, found {field or ''!r}; write {{{{ and }}}} for braces"
                )
        self.parts = tuple((literal, field) for literal, field, _, _ in parts)

    @property
    def fields(self) -> tuple[str, ...]:
        """Column names in order of appearance."""
        return tuple(field for _, field in self.parts if field is not None)

    def render(self, values: Mapping[str, str]) -> Rendered:
        """Fill in ``values``; every field must be among them."""
        pieces: list[str] = []
        starts: dict[str, int] = {}
        length, empty = 0, True
        for literal, field in self.parts:
            pieces.append(literal)
            length += len(literal)
            if field is not None:
                value = values[field]
                starts.setdefault(field, length)
                pieces.append(value)
                length += len(value)
                empty = empty and not value.strip()
        text = "".join(pieces)
        return Rendered(text, starts, empty if starts else not text.strip())
