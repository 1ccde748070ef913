"""What a sweep tries for each key of its ``search``: a list of values, alternatives by name, or a range of numbers.

A choice has a label for each key: a value as JSON text, the name of an alternative, or the number itself. Labels are what a study keeps:
they are plain, and the same whenever what they stand for is.
"""

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import product
from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from store.strict import MEMBER, Strict

_DIGITS = 4
"""Significant digits of proposed numbers: what is set, written and named is the same short number."""

Number = int | float
Values = Annotated[tuple[object, ...], Field(min_length=1)]
Alternatives = Annotated[dict[str, Annotated[dict[str, object], Field(min_length=1)]], Field(min_length=1)]
Choice = dict[str, str | int | float]
"""Key of ``search`` -> label."""


class NumberRange(Strict):
    """Numbers from ``low`` to ``high``, both included; whole ones where ``low``, ``high`` and ``step`` are whole."""

    low: Number
    high: Number
    log: bool = False
    """Propose as many numbers between 1 and 10 as between 10 and 100."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Only ``low`` and every further ``step``."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "NumberRange":
        if not self.low < self.high:
            raise ValueError(f"expected low below high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected low above 0, since log is true, found {self.low}")
        if self.log and self.step is not None:
            raise ValueError("expected log or step, found both")
        if self.step is not None and (_exact(self.high) - _exact(self.low)) % _exact(self.step):
            raise ValueError(f"expected high to be some steps above low, found {self.low}, {self.high} and the step {self.step}")
        return self

    def __str__(self) -> str:
        return f"{self.low} to {self.high}{', in orders of magnitude' if self.log else f' in steps of {self.step}' if self.step else ''}"

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def number(self, proposed: float) -> int | float:
        """The number of the range that ``proposed`` stands for: rounded to its steps, or to four significant digits."""
        if self.step is not None:
            steps = round((proposed - self.low) / self.step)
            stepped = _exact(self.low) + steps * _exact(self.step)
            return int(stepped) if self.whole else float(stepped)
        if self.whole:
            return int(proposed)
        return min(max(float(f"{proposed:.{_DIGITS}g}"), float(self.low)), float(self.high))

    def holds(self, number: object) -> bool:
        """Whether ``number`` is one of its numbers."""
        if isinstance(number, bool) or not isinstance(number, int if self.whole else int | float):
            return False
        return self.low <= number <= self.high and (self.step is None or self.number(number) == number)


def _tried(value: object) -> object:
    if not isinstance(value, list | tuple | dict | NumberRange):
        raise ValueError("expected a list of values, alternatives by name, or a range with low and high")
    return value


def _kind(value: object) -> str:
    """The member of the union that is meant: what gives ``low`` or ``high`` a number is a range, and no alternatives of these names."""
    if not isinstance(value, dict):
        return f"{MEMBER}{'range' if isinstance(value, NumberRange) else 'values'}"
    ends = [value[name] for name in ("low", "high") if name in value]
    return f"{MEMBER}{'range' if any(not isinstance(end, dict) for end in ends) else 'alternatives'}"


Tried = Annotated[
    Annotated[Values, Tag(f"{MEMBER}values")]
    | Annotated[Alternatives, Tag(f"{MEMBER}alternatives")]
    | Annotated[NumberRange, Tag(f"{MEMBER}range")],
    Discriminator(_kind),
    BeforeValidator(_tried),
]
Search = Mapping[str, tuple[object, ...] | dict[str, dict[str, object]] | NumberRange]


def labels(tried: tuple[object, ...] | dict[str, dict[str, object]]) -> dict[str, object]:
    """Label -> the value or alternative that it stands for."""
    return dict(tried) if isinstance(tried, dict) else {text(value): value for value in tried}


def parameters(search: Search, choice: Choice) -> dict[str, object]:
    """Key of ``search`` -> its value, the name of the alternative, or its number."""
    return {key: labels(tried)[str(choice[key])] if isinstance(tried, tuple) else choice[key] for key, tried in search.items()}


def settings(search: Search, choice: Choice) -> list[tuple[str, object]]:
    """What ``choice`` sets: keys of the recipe with their values, in the order of ``search``."""
    found: list[tuple[str, object]] = []
    for key, value in parameters(search, choice).items():
        tried = search[key]
        found += list(tried[str(value)].items()) if isinstance(tried, dict) else [(key, value)]
    return found


def set_keys(search: Search) -> set[str]:
    """All keys of the recipe that choices set."""
    return {
        key
        for name, tried in search.items()
        for key in ({key for one in tried.values() for key in one} if isinstance(tried, dict) else {name})
    }


def grid(search: Search) -> Iterator[Choice]:
    """All combinations of lists and alternatives, in the order of the file."""
    each = [list(labels(tried)) for tried in search.values() if not isinstance(tried, NumberRange)]
    assert len(each) == len(search)
    for combined in product(*each):
        yield dict(zip(search, combined, strict=True))


def corners(search: Search) -> list[Choice]:
    """Choices that tell beforehand what would fail: with all combinations of alternatives, each other key at its first value or low end,
    then each other value and high end by itself."""
    named = {key: tried for key, tried in search.items() if isinstance(tried, dict)}
    rest: dict[str, list[str | int | float]] = {
        key: [tried.low, tried.high] if isinstance(tried, NumberRange) else list(labels(tried))
        for key, tried in search.items()
        if not isinstance(tried, dict)
    }
    first: Choice = {key: ends[0] for key, ends in rest.items()}
    varied: list[Choice] = [first, *({**first, key: end} for key, ends in rest.items() for end in ends[1:])]
    combined = [dict(zip(named, names, strict=True)) for names in product(*named.values())]
    return [{key: {**names, **others}[key] for key in search} for names in combined for others in varied]


def fits(search: Search, choice: Mapping[str, object]) -> bool:
    """Whether ``search`` could propose ``choice``."""
    return choice.keys() == search.keys() and all(
        tried.holds(choice[key]) if isinstance(tried, NumberRange) else choice[key] in labels(tried) for key, tried in search.items()
    )


def text(value: object) -> str:
    """Plain data as text that is the same whenever the data is."""
    return json.dumps(value, sort_keys=True, default=str)


def _exact(number: float) -> Decimal:
    """The decimal number that was written."""
    return Decimal(str(number))
