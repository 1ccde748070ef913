"""Labels of records: a class, a score, or a class for every word."""

import math
from collections.abc import Hashable
from typing import Self

from pydantic import field_validator, model_validator

from store.strict import Strict


class LabelSpec(Strict):
    """Where the label of a record is and what it may be: ``classes``, or ``score: true``; with ``tokens`` one class a word."""

    column: str
    classes: tuple[int | str, ...] = ()
    """All labels that may occur; a row is labelled with the position in this list. Where no class is a number, a number (or
    true and false) in the data is a position. For choices the default is 0, 1, 2 ..."""
    score: bool = False
    """The label is a number (regression)."""
    tokens: bool = False
    """The column holds one class for each word of the text: a list, or a string split at white space."""

    @field_validator("classes", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
            raise ValueError("put quotes around classes such as 'yes', 'no', 'true': YAML reads them as booleans")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(map(str, self.classes))) < len(self.classes):
            raise ValueError(f"a class is given twice in {list(self.classes)}")
        if self.score and (self.classes or self.tokens):
            raise ValueError("a score has neither classes nor tokens")
        if self.tokens and not self.classes:
            raise ValueError("tokens needs classes")
        return self


def class_numbers(classes: tuple[int | str, ...]) -> dict[Hashable, int]:
    """Every way to write a class in the data -> its position in ``classes``."""
    numbers: dict[Hashable, int] = {}
    for position, name in enumerate(classes):
        numbers[str(name)] = position
        if str(name).removeprefix("-").isdigit():
            numbers[int(name)] = position
    if not any(isinstance(name, int) for name in numbers):
        for position in range(len(classes)):
            numbers[position] = numbers[str(position)] = position
    return numbers


def class_number(value: object, numbers: dict[Hashable, int], column: str, where: str, kind: str = "label") -> int:
    """Position of the class ``value``; ``ValueError`` naming ``where`` if it is none of them.

    Args:
        kind: What a class is called in the message.
    """
    number = numbers.get(value) if isinstance(value, Hashable) else None
    if number is None:
        known = ", ".join(dict.fromkeys(map(str, numbers)))
        raise ValueError(f"{where}: column {column!r} holds the {kind} {value!r}; expected one of {known}")
    return number


def score(value: object, column: str, where: str) -> float:
    """``value`` as a finite number."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: column {column!r} holds the label {value!r}; expected a finite number")
    return number


def words(value: object, column: str, where: str) -> list[object]:
    """A list as it is, or a string split at white space."""
    if isinstance(value, str):
        return list(value.split())
    if isinstance(value, list):
        return value
    raise ValueError(f"{where}: column {column!r} holds {value!r}; expected a list with one item for each word")
