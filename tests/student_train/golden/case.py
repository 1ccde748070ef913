"""What the tests of all methods need of one: its formula, and models, rows and runs to try it on.

A method's cases are one file in ``golden/methods``, found by its place. It defines

- ``CASES``: name -> Case. Every term and parameter of the method appears in one.
- ``CHANGES``: (case, changed options) for every option of the method, each of which changes the answer.
- ``ELSEWHERE``: (method, option) of those that act before the method sees its rows; tests of its own file try them.
- ``MODELS``: (options, family, head) of small real models: bert or llama, with a head.
- ``LIVE``: (setting, options): stores and live teachers that it is compared on; settings are those of tests/test_stored_equals_live.py.
- ``SAME_WIDTH``: [(method,)] where it takes only students as wide as their teacher.
- ``RUNS`` (for methods that change as training goes, have state or compare rows): (options) of runs that are resumed in
  the middle, and on two ranks.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from given import BASE, BERT, SMALL_BERT, Reference

from student_train.methods.base import Method
from student_train.moment import START, Moment

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method with options on fixed random features, and what its terms are there."""

    method: str
    options: Options
    reference: Reference
    head: tuple[str, int] = BASE
    """Head and number of labels of both models."""
    sizes: tuple[dict[str, object], dict[str, object]] = (SMALL_BERT, BERT)
    """Student and teacher; of methods with several teachers the first."""
    labels: str = ""
    """Kind of the batch's labels: classes, scores, choices or tokens."""
    others: Mapping[str, dict[str, object]] = field(default_factory=dict)
    """Further teachers by name, for methods that take several; the first is called ``first``."""
    moment: Moment = START
    coupled: frozenset[str] = frozenset()
    """Terms that compare the rows of a batch, so that those of two halves don't add up to those of the whole."""
    zero: bool = True
    """Whether a student equal to its teacher has no loss but that of labels."""
    fixed: frozenset[str] = frozenset()
    """Parameters that the loss does not train here, or that it is not differentiated in."""
    unread: frozenset[str] = frozenset()
    """The student's features, by site and layer, that take no part at this moment."""
    set_up: Callable[[Method], None] | None = None
    """Done to the method before it is called, its state for instance."""


@cache
def modules() -> dict[str, ModuleType]:
    """File name -> the cases of one or more methods."""
    found = {}
    for path in sorted((Path(__file__).parent / "methods").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = found[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return found


def all_cases() -> dict[str, Case]:
    return {name: case for module in modules().values() for name, case in module.CASES.items()}


def all_of(table: str) -> list[tuple[str, *tuple[Any, ...]]]:  # type: ignore[misc]
    """The entries of ``MODELS``, ``LIVE`` or ``RUNS`` of all files, each with the method's name in front."""
    return [entry for module in modules().values() for entry in getattr(module, table, ())]
