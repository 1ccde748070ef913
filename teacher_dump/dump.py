"""The dump: rows first, then the teacher's answers shard after shard, written while the teacher goes on."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from online import rows as building
from online.figures import duration, size
from online.fingerprints import tokenizer_fingerprint
from online.models import load_config, load_tokenizer, model_shape
from online.replica import Replica, joined
from online.rows_spec import RowsSpec, building_fingerprint, corpus_fingerprint
from store import layout
from store.errors import FingerprintMismatch, StoreBusy, StoreError
from store.manifest import Provenance, RowsInfo, read_manifest
from store.provenance import provenance
from store.reader import Store
from store.together import check_same_teacher
from store.writer import StoreWriter
from teacher_dump.accuracy import derived_errors, live, sample
from teacher_dump.answering import Answering, Output
from teacher_dump.batch_size import batch_tokens
from teacher_dump.cost import cost_of
from teacher_dump.pipeline import Pipeline, memory_limit
from teacher_dump.placement import placed
from teacher_dump.recipe import DumpRecipe
from teacher_dump.records import describe_errors, describe_word_errors, read_errors, read_word_errors
from teacher_dump.selection import Request, check_rows, resolve
from teacher_dump.ship import ship, shipped_blocks, shipped_weights
from teacher_dump.stopping import GRACE, Stopped, Stopping
from teacher_dump.teacher import TeacherPass, load_pass
from teacher_dump.totals import Totals
from teacher_dump.watch import Watch
from teacher_dump.word_errors import word_errors, worded
from teacher_dump.work import Work

WAIT = 0.5
"""Seconds from one look to the next at what other processes have committed."""
RESERVE = 64 << 20
"""Bytes of disk that a dump leaves free: the last megabytes of a file system are slow and belong to others."""


def build_rows(recipe: DumpRecipe, command: Sequence[str]) -> str:
    """Build the rows of ``recipe`` unless its store has them; a summary of them."""
    tokenizer = load_tokenizer(recipe.teacher)
    rows = ensure_rows(recipe, tokenizer, recipe.store, provenance(command))
    splits = ", ".join(f"{number:,} {name}" for name, number in rows.splits.items())
    return (
        f"{recipe.store}: {rows.rows:,} rows ({splits}), {rows.tokens:,} tokens in {rows.slots:,} shards of up to {rows.slot_tokens:,}\n"
        f"No features yet: `teacher-dump run` with this recipe adds them; `teacher-dump show {recipe.store}` prints a few rows."
    )


def dump(recipe: DumpRecipe, command: Sequence[str], grace: float = GRACE, beside: str | None = None) -> str:
    """Make the store of ``recipe``, or go on where it was, together with the other ranks of this job; a summary of what this rank did.

    Args:
        grace: Seconds after SIGTERM in which shards may still be finished.
        beside: A pass of the store that must be of the same teacher.

    Raises:
        ValueError: the recipe asks for something that cannot be had, or the teacher answers with NaN or infinity.
        StoreError: the store is another's, busy, damaged, or does not fit on the disk; or another rank has failed.
        Stopped: SIGTERM came before the pass was complete.
    """
    made = provenance(command)
    tokenizer, requests = requested(recipe)
    recipe = placed(recipe)
    sharding = recipe.sharding
    with Stopping(grace) as stopping, joined(sharding.size, sharding.kind != "none") as replica:
        replica.ranks.on_first(lambda: ensure_rows(recipe, tokenizer, recipe.store, made))
        with StoreWriter.open(recipe.store) as writer, Watch(recipe, replica, writer.rows, made, stopping) as watch:
            teacher = load_pass(recipe, requests, writer.rows, made, replica)
            if beside is not None:
                check_same_teacher({beside: writer.manifest.passes[beside], recipe.pass_name: teacher.info})
            store = Store.open(recipe.store)
            teacher = announce(recipe, teacher, store, writer, replica)
            writes = replica.leads or not teacher.alike
            left = writer.pending(recipe.pass_name)
            watch.answering(teacher)
            stopping.take_note()
            if writes:
                done = _answer(recipe, teacher, store, writer, replica, watch, stopping)
            else:
                Answering(teacher, store, replica, None, watch, stopping).run()
            if stopping.asked:
                check_complete(recipe.store, recipe.pass_name)
    ranks = replica.job_size
    return _summary(recipe, done if ranks == 1 else left, ranks, watch.totals) if writes else ""


def _answer(
    recipe: DumpRecipe, teacher: TeacherPass, store: Store, writer: StoreWriter, replica: Replica, watch: Watch, stopping: Stopping
) -> list[int]:
    """Answer and write what this rank can get; the shards that it did."""
    with Pipeline(
        writer, recipe.pass_name, store.rows, teacher.specs, memory_limit(store.rows, teacher.specs), watch.committed
    ) as pipeline:
        watch.follow(pipeline)
        work = Work(writer, recipe.pass_name, store.rows, teacher.batch_tokens)
        if done := store.rows.info.slots - len(work.left()):
            watch.say(f"going on after {done} committed shards")
        Answering(teacher, store, replica, Output(work, pipeline), watch, stopping).run()
    return work.answered


def announce(recipe: DumpRecipe, teacher: TeacherPass, store: Store, writer: StoreWriter, replica: Replica) -> TeacherPass:
    """Put all of the pass but its shards into the store, unless it is there; the teacher with the batches that the pass is made in.

    All ranks of the replica run the teacher and gather what is sharded of it; the first one writes.
    """
    name, first = recipe.pass_name, replica.ranks.on_first
    with writer.announcing() if replica.leads else contextlib.nullcontext():
        known = first(lambda: name in writer.manifest.passes)
        teacher = teacher.batched(batch_tokens(recipe, first(lambda: writer.manifest.passes.get(name)), teacher, store, replica))
        info, statics = teacher.info, teacher.statics()
        if known:
            first(lambda: writer.add_pass(name, info, statics))  # refuses another teacher before anything of it is touched
        few = sample(store, teacher.batch_tokens)
        compressed = any(spec.compressed for spec in teacher.specs)
        answered = [teacher.answer(batch, sources) for batch, sources in few] if compressed else []
        shipped = shipped_weights(teacher.loaded, shipped_blocks(recipe.ship_layers, teacher.loaded.shape.layers), keep=replica.leads)
        cost = first(lambda: cost_of(store, recipe, teacher, statics, shipped, answered))
        first(lambda: check_disk(recipe.store, cost.shards(writer.pending(name)) if known else cost.added))
        if first(lambda: not (known and layout.model(recipe.store, name).is_dir())):
            answers = live(teacher, few) if teacher.plan.derived or worded([spec.feature for spec in teacher.specs]) else []
            errors, words = derived_errors(teacher, answers), word_errors(teacher, answers)
            first(lambda: ship(teacher.loaded, recipe, shipped, errors, words))
        if not known:
            first(lambda: writer.add_pass(name, info, statics))
    if not replica.leads:
        with writer.announcing():  # hears of the pass
            pass
    return teacher


def check_complete(store: Path, pass_name: str) -> None:
    """Raise Stopped, with what there is, unless all of a pass is committed."""
    try:
        there = Store.open(store)
        committed, shards = len(there.committed(pass_name)), there.manifest.rows.slots
    except StoreError:
        raise Stopped from None
    if committed < shards:
        raise Stopped(f"{committed:,} of {shards:,} shards of pass {pass_name} are committed in {store}")


def requested(recipe: DumpRecipe) -> tuple[PreTrainedTokenizerBase, tuple[Request, ...]]:
    """Tokenizer and features, from the teacher's configuration alone: what is wrong with a recipe shows before weights load."""
    config = load_config(recipe.teacher.model, recipe.teacher.trust_remote_code)
    tokenizer = load_tokenizer(recipe.teacher)
    shape = model_shape(config, recipe.teacher.head, recipe.teacher.modules)
    if recipe.intervention is not None:
        recipe.intervention.check(f"pass {recipe.pass_name}", shape.layers)
    requests = resolve(recipe, shape, tokenizer)
    check_rows(requests, recipe.rows)
    shipped_blocks(recipe.ship_layers, shape.layers)
    return tokenizer, requests


def ensure_rows(recipe: DumpRecipe, tokenizer: PreTrainedTokenizerBase, path: Path, made: Provenance) -> RowsInfo:
    """The rows at ``path``: built where there are none, and otherwise those that ``recipe`` would build.

    Raises:
        FingerprintMismatch: the store there has other rows; the message names the field.
        StoreError: there is something else.
    """
    if not layout.manifest(path).exists():
        next(building.iter_groups(recipe.rows, tokenizer), None)  # a wrong path or column shows before a folder is made
    while not layout.manifest(path).exists():
        try:
            return building.build_rows(recipe.rows, tokenizer, path, made)
        except StoreBusy:  # another process builds them
            time.sleep(WAIT)
        except StoreError:
            if not layout.manifest(path).exists():  # or has just built them
                raise
    rows = read_manifest(path).rows
    check_building(recipe, tokenizer, path, rows)
    found = corpus_fingerprint(recipe.rows)
    if found not in (known := [origin.corpus for origin in rows.origins]):
        raise FingerprintMismatch(
            f"{path} was made with another corpus: expected {' or '.join(known)} as stored, found {found}; "
            f"add its rows with `teacher-dump add RECIPE`, or give another store folder, as in `teacher-dump run RECIPE store={path}-2`"
        )
    return rows


def check_building(recipe: DumpRecipe, tokenizer: PreTrainedTokenizerBase, path: Path, rows: RowsInfo) -> None:
    """Refuse a recipe that builds rows in another way than the ``rows`` of the store at ``path``; raises FingerprintMismatch."""
    _compare(path, "tokenizer", rows.tokenizer, tokenizer_fingerprint(tokenizer))
    for name, found in recipe.rows.model_dump(mode="json").items():
        usual = RowsSpec.model_fields[name].get_default(call_default_factory=True)  # of an option that is younger than the store
        stored = rows.origins[0].options.get(name, usual)
        moved = name == "vocabulary" and stored is not None and found is not None  # the fingerprint below says whether it is the same map
        if name != "sources" and not moved:
            _compare(path, f"rows.{name}", stored, found)
    _compare(path, "row building version", rows.building, building_fingerprint(recipe.rows))


def _compare(path: Path, field: str, stored: object, found: object) -> None:
    if stored != found:
        raise FingerprintMismatch(
            f"{path} was made with another {field}: expected {stored} as stored, found {found}; "
            f"give another store folder, as in `teacher-dump run RECIPE store={path}-2`, or the {field} it was made with"
        )


def check_disk(path: Path, needed: int) -> None:
    """Refuse what does not fit; raises StoreError."""
    free = shutil.disk_usage(path).free
    if needed + RESERVE > free:
        raise StoreError(
            f"the dump needs {size(needed)} more below {path} and leaves {size(RESERVE)} free, but the disk has {size(free)}; make room, "
            "or ask for fewer features, a 16-bit dtype or fewer rows (`teacher-dump plan` shows what each costs)"
        )


def _summary(recipe: DumpRecipe, made: Sequence[int], ranks: int, totals: Totals) -> str:
    """What the run did, and what the store now holds of the pass.

    Args:
        made: The shards that this process answered, or that the job of so many ``ranks`` found to be done.
        totals: Of this process.
    """
    who, seconds = ("this run" if ranks == 1 else f"meanwhile, {ranks} ranks and any other jobs"), totals.seconds
    store = Store.open(recipe.store)
    tokens = int(store.rows.slot_tokens[list(made)].sum())
    commits = store.committed(recipe.pass_name)
    written = sum(seal.size for shard in made for seal in commits[shard].files.values())
    lines = [f"{recipe.store}: pass {recipe.pass_name} is complete, {len(commits):,} shards of {store.manifest.rows.rows:,} rows"]
    if tokens:
        lines.append(
            f"{who}: {tokens:,} tokens in {duration(seconds)} ({tokens / seconds:,.0f} tokens/s), "
            f"{size(written)} of features ({written / tokens:,.0f} bytes a token)"
        )
        lines.append(totals.efficiency if ranks == 1 else f"rank 0: {totals.efficiency}")
    else:
        lines.append(f"{who}: nothing was left to do")
    lines += describe_errors(read_errors(recipe.store, recipe.pass_name))
    lines += describe_word_errors(read_word_errors(recipe.store, recipe.pass_name), store.manifest.passes[recipe.pass_name].features)
    return "\n".join(lines)
