"""What is printed of advice."""

import json
import textwrap
from collections.abc import Iterator

import yaml

from online.figures import duration, size
from store.shape import ModelShape
from student_train.break_even import Passes
from student_train.method_reads import DTYPE
from student_train.plan_report import seconds_text
from student_train.suggestion import STORE, Suggested, Suggestion

WIDTH = 140
"""Columns of a terminal that all text fits in."""
MOST_KEYS = 8
"""Features that a line names."""


def report(found: Suggested) -> Iterator[str]:
    """What is printed of advice, the recipe of the first method that can be taken at its end."""
    asked, case, text = found.asked, found.case, found.text
    yield f"teacher: {_model(case.teacher)}; student: {_model(case.student)}{', pretrained' if case.pretrained else ''}; task: {case.task}"
    yield (
        f"text: {text.rows:,.0f} rows of {text.length:,.1f} tokens, {text.tokens:,.0f} in all; {asked.students:,} "
        f"{'student' if asked.students == 1 else 'students'}, {asked.epochs:g} epochs of each phase"
    )
    yield (
        f"assumed: {asked.rates.flops / 1e12:.3g} TFLOP/s and {size(asked.rates.bandwidth)}/s of features (--flops, --bandwidth); "
        f"disk: {'any' if asked.disk is None else size(asked.disk)}, hours: {'any' if asked.hours is None else f'{asked.hours:g}'}"
    )
    yield "\nto try, in the order of docs/choosing.md; no scores are forecast:"
    for number, one in enumerate(found.found, 1):
        yield from _method(number, one, found)
    if found.refused:
        yield "\nrefused by these two models:"
        for name, why in found.refused.items():
            yield from _wrapped(f"  {name}: ", why)
    for kind, title in (("start", "where to start from"), ("features", "what to keep"), ("order", "what comes first"), ("caution", "mind")):
        rules = [rule for rule in found.rest if rule.about == kind]
        if rules:
            yield f"\n{title}:"
        for rule in rules:
            yield from _wrapped("  - ", f"{rule.advice}. [{rule.source}]")
    if best := found.best:
        yield from _recipes(best)
    else:
        yield "\nno store fits the disk: train with the teacher at work (docs/online.md)"


def plain(found: Suggested) -> dict[str, object]:
    """The advice as plain data, in bytes and seconds."""
    case = found.case
    return {
        "task": case.task,
        "teacher": case.teacher.model_dump(mode="json"),
        "student": case.student.model_dump(mode="json"),
        "rows": found.text.rows,
        "tokens": found.text.tokens,
        "methods": [_plain(one, found) for one in found.found],
        "refused": dict(found.refused),
        "advice": [{"about": rule.about, "advice": rule.advice, "source": rule.source} for rule in found.rest],
    }


def _plain(one: Suggestion, found: Suggested) -> dict[str, object]:
    passes = one.passes
    return {
        "name": one.rule.name,
        "phases": [[method["name"] for method in methods] for methods in one.rule.phases],
        "reason": one.rule.advice,
        "source": one.rule.source,
        "published_numbers": one.rule.recipe,
        "reads": [str(key) for key in one.reads],
        "stored": [str(key) for key in one.stored],
        "unit_bytes": dict(one.unit_bytes),
        "bytes": one.bytes,
        "fits_disk": one.fits(found.asked),
        "recompute": one.live,
        "passes": passes.count,
        "passes_until_a_store_has_paid": None if one.rule.online else passes.even,
        "teacher_seconds": {"one pass": passes.compute, "live": passes.live, "stored": passes.stored, "read": passes.read},
        "student_seconds": one.student_seconds,
        "least_bandwidth": passes.least_bandwidth,
        "dump": one.dump,
        "train": one.tree,
    }


def _method(number: int, one: Suggestion, found: Suggested) -> Iterator[str]:
    names = "; then ".join(" + ".join(str(method["name"]) for method in methods) for methods in one.rule.phases)
    yield f"\n{number} {one.rule.name}: {names}"
    yield from _wrapped("  why     ", f"{one.rule.advice}. [{one.rule.source}]")
    if one.rule.online:
        yield "  keeps   nothing: the teacher must be at work (docs/online.md)"
    else:
        each = ", ".join(f"{count:,} B a {unit}" for unit, count in one.unit_bytes.items())
        keys = [str(key) for key in one.stored]
        shown = " ".join(keys[:MOST_KEYS]) + (f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else "")
        room = "" if one.fits(found.asked) else _too_much(one, found.asked.disk or 0.0)
        yield from _wrapped("  keeps   ", f"{shown}: {each} in {DTYPE}; {size(one.bytes)}{room}")
        yield from _wrapped("  teacher ", _worth(one.passes, one.live))
    total = one.seconds
    over = f"; MORE THAN {found.asked.hours:g} HOURS" if found.asked.hours is not None and total > 3600 * found.asked.hours else ""
    yield f"  time    {duration(total)} with the student's own {duration(one.student_seconds)}{over}"
    yield f"  numbers as published: {one.rule.recipe}"


def _too_much(one: Suggestion, disk: float) -> str:
    return f"; MORE THAN THE DISK TAKES by {size(one.bytes - disk)}: keep it in int8, or have the teacher at work"


def _worth(passes: Passes, live: bool) -> str:
    """Cache or recompute, and why."""
    if passes.even is None:
        return (
            f"recompute: reading takes {_seconds(passes.read)} a pass, computing {_seconds(passes.compute)}; reading is faster from "
            f"{size(passes.least_bandwidth)}/s on"
        )
    said = (
        f"a pass takes {_seconds(passes.compute)} to compute and {_seconds(passes.read)} to read; {passes.count:g} passes: "
        f"{_seconds(passes.live)} live, {_seconds(passes.stored)} from a store, which has paid after {passes.even:.3g}"
    )
    return f"{'recompute' if live else 'store'}: {said}"


def _seconds(seconds: float) -> str:
    """As people read it, short times too."""
    return duration(seconds) if seconds >= 10 else seconds_text(seconds) if seconds else "nothing"


def _recipes(best: Suggestion) -> Iterator[str]:
    yield f"\n# {best.rule.name}: put your own names for {STORE} and OUTPUT. Learning rates and epochs as published: {best.rule.recipe}"
    if best.dump:
        yield f"# for the dump's recipe, beside its teacher and rows (docs/recipes.md):\n{best.dump.rstrip()}"
    else:
        yield f"# nothing to dump: `teacher-dump rows` makes {STORE}, rows alone"
    yield "# for student-train run:"
    tree = json.loads(json.dumps(best.tree))  # without anchors
    yield yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=WIDTH).rstrip()


def _model(shape: ModelShape) -> str:
    return f"{shape.family}, {shape.layers} blocks of width {shape.width:,}, {shape.heads} heads"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * min(len(head), 10), break_on_hyphens=False)
