"""What a dump would write and cost, said before any of it is done."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from online.figures import size, table
from online.replica import Replica, joined
from store.errors import FingerprintMismatch
from store.features import FeatureSpec, StoreDtype
from store.provenance import provenance
from store.reader import Store
from teacher_dump.accuracy import Live, errors, live, sample, stored_as
from teacher_dump.batch_size import batch_tokens
from teacher_dump.cost import Cost, cost_of
from teacher_dump.dump import RESERVE, requested
from teacher_dump.measured import needs, other_shardings
from teacher_dump.placement import placed
from teacher_dump.recipe import DumpRecipe
from teacher_dump.records import WordError, describe_word_errors
from teacher_dump.scratch import scratch_rows
from teacher_dump.ship import shipped_blocks, shipped_weights
from teacher_dump.teacher import TeacherPass, load_pass
from teacher_dump.timing import Timing, measure
from teacher_dump.word_errors import word_errors

_TYPES: tuple[StoreDtype, ...] = ("float32", "float16", "bfloat16", "int8", "float8")
"""Stored types that are tried beside the one that is asked for."""


@dataclass(frozen=True)
class _Findings:
    store: Store
    """The store itself, or a scratch copy of its rows."""
    teacher: TeacherPass
    cost: Cost
    pending: list[int]
    timing: Timing
    errors: dict[str, float]
    """Feature -> relative error of what is read back, or derived from it, against the live teacher."""
    words: dict[str, WordError]
    tried: dict[StoreDtype, dict[str, float] | str]
    """The same with every number in a type, or why it cannot be used."""
    present: bool
    """Whether the store has its rows."""


def plan(recipe: DumpRecipe, command: Sequence[str], ranks: int | None = None) -> str:
    """A report on what `run` would do with ``recipe``, on the first rank of a job; nothing below its store is touched.

    Args:
        ranks: Of the job that other shardings are calculated for; by default those of this one, or all that this machine has.

    Raises:
        ValueError, StoreError: what `run` would refuse.
    """
    tokenizer, requests = requested(recipe)
    recipe, made = placed(recipe), provenance(command)
    with ExitStack() as stack:
        replica = stack.enter_context(joined(recipe.sharding.size, recipe.sharding.kind != "none"))
        if replica.number > 0:  # replicas are alike
            return ""
        first = replica.ranks.on_first
        path, scratch = first(lambda: stack.enter_context(scratch_rows(recipe, tokenizer, made)))
        store = Store.open(path)
        teacher = load_pass(recipe, requests, store.rows, made, replica)
        _refuse_other_pass(recipe, store, teacher)
        teacher = teacher.batched(batch_tokens(recipe, store.manifest.passes.get(recipe.pass_name), teacher, store, replica))
        done = store.committed(recipe.pass_name)
        pending = [shard for shard in range(store.manifest.rows.slots) if shard not in done]
        timing = measure(teacher, store, pending, scratch, replica)
        statics = teacher.statics()
        shipped = shipped_weights(teacher.loaded, shipped_blocks(recipe.ship_layers, teacher.loaded.shape.layers), keep=replica.leads)
        cost = first(lambda: cost_of(store, recipe, teacher, statics, shipped, timing.answered))
        answers = live(teacher, sample(store, teacher.batch_tokens))
        found = errors(teacher, answers, teacher.specs)
        tried = {dtype: _tried(teacher, answers, dtype) for dtype in _TYPES} if teacher.plan.derived else {}
        words = word_errors(teacher, answers)
        findings = _Findings(store, teacher, cost, pending, timing, found, words, tried, path == recipe.store)
        report = "\n".join(_report(recipe, findings, replica, ranks)) if replica.leads else ""
        replica.ranks.wait()  # the first one takes its scratch folder away
        return report


def _refuse_other_pass(recipe: DumpRecipe, store: Store, teacher: TeacherPass) -> None:
    known = store.manifest.passes.get(recipe.pass_name)
    for field in ("teacher", "dtype", "intervention", "requested", "features", "shipped") if known else ():
        if getattr(known, field) != getattr(teacher.info, field):
            raise FingerprintMismatch(f"{store.path} has a pass {recipe.pass_name} with another {field}; give this one another pass_name")


def _tried(teacher: TeacherPass, answers: Sequence[Live], dtype: StoreDtype) -> dict[str, float] | str:
    """Errors if every number were stored in ``dtype``, or why that cannot be."""
    try:
        return errors(teacher, answers, stored_as(teacher, dtype))
    except ValueError as error:
        return str(error)


def _report(recipe: DumpRecipe, found: _Findings, replica: Replica, ranks: int | None) -> Iterator[str]:
    info, teacher, cost = found.store.manifest.rows, found.teacher, found.cost
    splits = ", ".join(f"{number:,} {name}" for name, number in info.splits.items())
    yield f"plan of pass {recipe.pass_name} in {recipe.store}; nothing was written"
    yield f"\nrows: {info.rows:,} ({splits}), {info.tokens:,} tokens in {info.slots:,} shards of up to {info.slot_tokens:,}"
    yield "\nstored:"
    lines = [("", "type", "one unit", "bytes/token", "in all", "rounding error", "measured")]
    for spec in teacher.specs:
        all_bytes = int(cost.features[spec.feature].sum())
        measured = f"{found.errors[spec.key]:.1e}" if spec.key in found.errors and not spec.exact else ""
        unit = f"{spec.unit_bytes:,} B a {spec.feature.unit}{' at most' if spec.compressed else ''}"
        lines.append((spec.key, spec.kept_as, unit, f"{all_bytes / info.tokens:,.1f}", size(all_bytes), _bound(spec), measured))
    lines.append(("all", "", "", f"{cost.shards() / info.tokens:,.1f}", size(cost.shards()), "", ""))
    yield table(lines, right="2346")
    if any(spec.compressed for spec in teacher.specs):
        yield "  (compressed sizes are estimated from real batches)"
    if teacher.plan.derived:
        yield "\nderived from it when read, with the relative error against the live teacher on a few rows, here and in other types:"
        yield table(_derived(found), right="234567")
        yield from (f"  {dtype}: {why}" for dtype, why in found.tried.items() if isinstance(why, str))
    if found.words:
        yield "\n" + "\n".join(describe_word_errors(found.words, teacher.specs))
    yield "\ndisk:"
    yield table(
        [
            ("features", size(cost.shards()), "checksums, shard indexes and chunk ends included"),
            ("rows", size(cost.rows), "in the store already" if found.present else "token arrays and row table"),
            ("weights", size(cost.statics), "what derivations multiply by, once"),
            ("model", size(cost.model), f"configuration, tokenizer{', blocks to start students from' if teacher.info.shipped else ''}"),
            ("records", size(cost.records), "metadata, manifest and commit log"),
            ("total", size(cost.total), f"{cost.total:,} bytes, the length of every file that this pass and its rows have in the end"),
        ],
        right="1",
    )
    yield from _needs(recipe, found, replica, ranks)


def _derived(found: _Findings) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("", "from", "this recipe", *_TYPES)]
    for key, sources in found.teacher.plan.derived.items():
        shown = [f"{found.errors[str(key)]:.1e}"]
        for tried in found.tried.values():
            shown.append("-" if isinstance(tried, str) else f"{tried[str(key)]:.1e}")
        lines.append((str(key), ", ".join(map(str, sources)), *shown))
    return lines


def _needs(recipe: DumpRecipe, found: _Findings, replica: Replica, ranks: int | None) -> Iterator[str]:
    cost, timing = found.cost, found.timing
    known = recipe.pass_name in found.store.manifest.passes
    needed = cost.shards(found.pending) if known else cost.added if found.present else cost.total
    folder = next(parent for parent in (recipe.store.absolute(), *recipe.store.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    fits = "enough" if needed + RESERVE <= free else f"NOT ENOUGH: {size(needed + RESERVE - free)} short, `run` will refuse"
    shards = found.store.manifest.rows.slots
    if known:
        yield f"\nthe store has {shards - len(found.pending):,} of {shards:,} shards of this pass; {size(needed)} are left to write"
    yield f"free disk: {size(free)}, to write: {size(needed)}; {fits}"
    if found.pending:
        written = cost.shards(found.pending)
        yield from needs(found.teacher, found.store, found.pending, timing, written, replica)
        if found.teacher.loaded.custom is None:
            yield from other_shardings(recipe, found.teacher, found.store, found.pending, timing, written, replica, ranks)


def _bound(spec: FeatureSpec) -> str:
    """The declared bound of a stored feature's error."""
    if spec.exact:
        return "exact"
    relative = [f"{spec.error:.1e} relative"] if spec.error else []
    return " + ".join([*relative, *([f"{spec.error_of_largest:.1e} of the largest"] if spec.error_of_largest else [])])
