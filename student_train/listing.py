"""The methods as people and programs read them: a table of all, a page on one, and plain data."""

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import get_args

from store.features import FeatureKey
from store.shape import ModelShape
from student_train.method_options import option_lines, schema
from student_train.method_reads import DTYPE, Pair, Reads, reads
from student_train.methods import METHODS, method_class
from student_train.methods.base import Kind, Knowledge, Method

WIDTH = 140
"""Columns of a terminal that all text fits in."""
_LEFT, _RIGHT = 53, 52
"""Columns in front of the marks and behind them."""
_KNOWLEDGE: tuple[str, ...] = get_args(Knowledge)
_KINDS: tuple[str, ...] = get_args(Kind)


def table(pair: Pair | None = None) -> str:
    """All methods: paper, what a student learns from in each of its stages, kinds, the students it takes, and for a ``pair`` of a teacher
    and a student what a dump of its features costs."""
    stage = max(len(stage) for cls in METHODS.values() for stage in cls.stages)
    behind = [_RIGHT] if pair is None else [_RIGHT // 2 - 1] * 2
    widths = [_LEFT - stage, stage, 4 * len(_KNOWLEDGE) - 1, len(_KINDS), *behind]
    heads = ["method, paper", "stage", " ".join(word[:3] for word in _KNOWLEDGE), "kinds", "accepts", f"a dump, in {DTYPE}"]
    lines = list(_rows([[head] for head in heads[: len(widths)]], widths))
    for name, cls in METHODS.items():
        paper = textwrap.wrap(cls.paper, widths[0], initial_indent="  ", subsequent_indent="  ")
        learnt = [" ".join("x  " if word in learns else ".  " for word in _KNOWLEDGE) for learns in cls.stages.values()]
        kinds = "".join(str(number) if kind in cls.kinds else "." for number, kind in enumerate(_KINDS, 1))
        texts = [cls.accepts] if pair is None else [cls.accepts, _cost(_answer(name, pair))]
        wrapped = [textwrap.wrap(text, behind[0], break_on_hyphens=False) for text in texts]
        lines += _rows([[name, *paper], list(cls.stages), learnt, [kinds], *wrapped], widths)
    return "\n".join([*lines, "", *_legend(pair)])


def page(name: str, pair: Pair | None = None) -> str:
    """One method in full: what its class says, its options, and for a ``pair`` what it reads of the teacher.

    Raises:
        ValueError: there is no such method; the message has the nearest one.
    """
    cls = method_class(name)
    facts = {
        "paper": cls.paper,
        "stages": "; ".join(f"{stage}: {', '.join(learns)}" for stage, learns in cls.stages.items()),
        "kinds": ", ".join(kind for kind in _KINDS if kind in cls.kinds) or "a loss on logits or labels",
        "accepts": cls.accepts,
        "teachers": _teachers(cls),
    }
    if pair is not None:
        answer = _answer(name, pair)
        facts["teacher"] = f"{_model(pair.teacher)}; the student: {_model(pair.student)}"
        if isinstance(answer, Reads):
            facts |= {"reads": _keys(answer.keys), "kept as": _keys(answer.stored)}
        facts["a dump"] = f"{_cost(answer)}, in {DTYPE}" if isinstance(answer, Reads) else answer
    lines = [name]
    for fact, text in facts.items():
        lines += textwrap.wrap(f"  {fact:10}{text or 'nothing'}", WIDTH, subsequent_indent=" " * 12, break_on_hyphens=False)
    options = option_lines(cls)
    lines += ["", inspect.getdoc(cls) or "", "", "options:" if options else "options: none"]
    widths = [max((len(option[column]) for option in options), default=0) for column in (0, 1)]
    for option, default, values in options:
        lines += _rows([[f"  {option}"], [default], textwrap.wrap(values, WIDTH - sum(widths) - 6)], [widths[0] + 2, widths[1], 0])
    return "\n".join(lines)


def plain(names: Sequence[str], pair: Pair | None = None) -> list[dict[str, object]]:
    """The same as plain data; ``options`` is a JSON schema.

    Raises:
        ValueError: there is no such method.
    """
    found = []
    for name in names:
        cls = method_class(name)
        one: dict[str, object] = {
            "name": name,
            "paper": cls.paper,
            "stages": {stage: list(learns) for stage, learns in cls.stages.items()},
            "kinds": [kind for kind in _KINDS if kind in cls.kinds],
            "accepts": cls.accepts,
            "teachers": _teachers(cls),
            "about": inspect.getdoc(cls),
            "options": schema(cls),
        }
        if pair is not None:
            answer = _answer(name, pair)
            if isinstance(answer, Reads):
                one |= {"reads": _keys(answer.keys).split(), "stored": _keys(answer.stored).split(), "bytes": answer.bytes}
            else:
                one["refused"] = answer
        found.append(one)
    return found


def _rows(columns: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """Lines of text in columns of so many letters."""
    for cells in zip_longest(*columns, fillvalue=""):
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _legend(pair: Pair | None) -> Iterator[str]:
    """What the marks stand for."""
    texts = [
        f"{', '.join(f'{word[:3]}: {word}' for word in _KNOWLEDGE)}: what a student learns from in each stage of the paper, by this "
        "method or by others beside it.",
        f"kinds: {', '.join(f'{number} {kind}' for number, kind in enumerate(_KINDS, 1))}.",
    ]
    if pair is not None:
        texts += [
            f"a dump: the smallest store of all that the default options read of a teacher with {_model(pair.teacher)}, for a student with "
            f"{_model(pair.student)}; where there are several teachers, of each. `student-train needs RECIPE` says what a recipe reads."
        ]
    for text in texts:
        yield from textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _model(shape: ModelShape) -> str:
    return f"{shape.layers} blocks of width {shape.width:,}, head {shape.head}"


def _teachers(cls: type[Method]) -> str:
    return "none" if not cls.needs_teacher else "several" if cls.several else "one"


def _keys(keys: frozenset[FeatureKey]) -> str:
    return " ".join(map(str, sorted(keys)))


def _answer(name: str, pair: Pair) -> Reads | str:
    """What a method reads of the pair's teacher, or why that cannot be told."""
    try:
        return reads(name, pair)
    except ValueError as error:
        return str(error)


def _cost(answer: Reads | str) -> str:
    if isinstance(answer, str):
        return answer
    return ", ".join(f"{count:,} B a {unit}" for unit, count in answer.bytes.items()) or "nothing"
