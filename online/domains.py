"""Domains of records (the genres of MNLI, the products of a review corpus): which one of a list a row is of."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pydantic import Field, field_validator

from online.corpus import Record
from online.labels import class_number, class_numbers
from store.strict import Strict


class DomainSpec(Strict):
    """Where the domain of a record is, and all that may occur. A row has the position of its domain in this list."""

    column: str
    classes: tuple[str, ...] = Field(min_length=1)
    """Names of all domains that may occur, also of those that only rows of other stores are of: stores of one list can be merged. Where no
    name is a number, a number in the data is a position."""

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or "" in value:
            raise ValueError(f"expected names that differ and are not empty, found {list(value)}")
        return value


def with_domains(records: Iterable[Record], spec: DomainSpec) -> Iterator[Record]:
    """``records`` with the number of each one's domain.

    Raises:
        ValueError: a record is of a domain that is not in the list; names file and record.
    """
    numbers = class_numbers(spec.classes)
    for record in records:
        yield replace(record, domain=class_number(record.values[spec.column], numbers, spec.column, record.where, "domain"))
