"""The dump: rows first, then the teacher's answers shard after shard, written while the teacher goes on."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from online import rows as building
from online.collate import collate
from online.fingerprints import tokenizer_fingerprint
from online.models import load_config, load_tokenizer, model_shape
from store import layout
from store.errors import FingerprintMismatch, StoreBusy, StoreError
from store.manifest import Provenance, RowsInfo, read_manifest
from store.provenance import provenance
from store.reader import Store
from store.writer import StoreWriter
from teacher_dump.accuracy import derived_errors, sample
from teacher_dump.batches import ShardBuffer, cut, rows_of
from teacher_dump.cost import cost_of
from teacher_dump.figures import duration, size
from teacher_dump.recipe import DumpRecipe
from teacher_dump.records import describe_errors, read_errors
from teacher_dump.selection import Request, check_rows, resolve
from teacher_dump.ship import ship, shipped_blocks
from teacher_dump.teacher import Origins, TeacherPass, load_pass

AHEAD = 1
"""Finished shards that may wait for the writer while the teacher fills the next one."""
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


def dump(recipe: DumpRecipe, command: Sequence[str]) -> str:
    """Make the store of ``recipe``, or go on where it was; a summary of what this run did.

    Raises:
        ValueError: the recipe asks for something that cannot be had, or the teacher answers with NaN or infinity.
        StoreError: the store is another's, busy, damaged, or does not fit on the disk.
    """
    made = provenance(command)
    tokenizer, requests = requested(recipe)
    ensure_rows(recipe, tokenizer, recipe.store, made)
    with StoreWriter.open(recipe.store) as writer:
        teacher = load_pass(recipe, requests, writer.rows, made)
        store = Store.open(recipe.store)
        with writer.announcing():
            _announce(recipe, teacher, store, writer)
        start = time.perf_counter()
        done = answer_all(teacher, store, writer, recipe)
        seconds = time.perf_counter() - start
    return _summary(recipe, done, seconds)


def _announce(recipe: DumpRecipe, teacher: TeacherPass, store: Store, writer: StoreWriter) -> None:
    """Put all of the pass but its shards into the store, unless it is there."""
    name, statics = recipe.pass_name, teacher.statics()
    few = sample(store, recipe.batch_tokens)
    compressed = any(spec.compressed for spec in teacher.specs)
    answered = [teacher.answer(batch, sources) for batch, sources in few] if compressed else []
    cost = cost_of(store, recipe, teacher, statics, answered)
    known = name in writer.manifest.passes
    check_disk(recipe.store, cost.shards(writer.pending(name)) if known else cost.added)
    if known:
        writer.add_pass(name, teacher.info, statics)  # refuses another teacher before anything of it is touched
    if not layout.model(recipe.store, name).is_dir() or not known:
        ship(teacher.loaded, recipe, derived_errors(teacher, few))
    if not known:
        writer.add_pass(name, teacher.info, statics)


def requested(recipe: DumpRecipe) -> tuple[PreTrainedTokenizerBase, tuple[Request, ...]]:
    """Tokenizer and features, from the teacher's configuration alone: what is wrong with a recipe shows before weights load."""
    config = load_config(recipe.teacher.model, recipe.teacher.trust_remote_code)
    tokenizer = load_tokenizer(recipe.teacher)
    shape = model_shape(config, recipe.teacher.head, recipe.teacher.modules)
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
    found = building.corpus_fingerprint(recipe.rows)
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
        if name != "sources":
            _compare(path, f"rows.{name}", rows.origins[0].options.get(name), found)
    _compare(path, "row building version", rows.building, building.building_fingerprint(recipe.rows))


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


def answer_all(teacher: TeacherPass, store: Store, writer: StoreWriter, recipe: DumpRecipe) -> list[int]:
    """Answer and commit pending shards until none is left, beside other processes that do the same; the shards that this one did.

    A shard that cannot be written stops the run before the next batch. Up to AHEAD + 2 shards are in memory.
    """
    rows, name, made = store.rows, recipe.pass_name, list[int]()
    pending = writer.pending(name)
    if pending and len(pending) < rows.info.slots:
        tqdm.write(f"going on after {rows.info.slots - len(pending)} committed shards", file=sys.stderr)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    waiting = False
    with ThreadPoolExecutor(1, "writer") as pool, tqdm(total=0, unit=" tokens", unit_scale=True, mininterval=interval) as progress:
        writing: deque[Future[None]] = deque()
        try:
            while pending := writer.pending(name):
                progress.total = progress.n + int(rows.slot_tokens[pending].sum())
                for shard in writer.shards(name):
                    progress.set_description(f"shard {shard + 1} of {rows.info.slots}", refresh=False)
                    buffer = ShardBuffer(rows, shard, teacher.specs)
                    for members in cut(rows, rows_of(rows, shard), recipe.batch_tokens):
                        while writing and writing[0].done():
                            writing.popleft().result()
                        buffer.place(members, teacher.answer(collate(store, members), Origins(rows, members)))
                        progress.update(int(rows.at(members).length.sum()))
                    writing.append(pool.submit(writer.commit, name, shard, buffer.arrays))
                    made.append(shard)
                    while len(writing) > 1 + AHEAD:
                        writing.popleft().result()
                while writing:
                    writing.popleft().result()
                if left := writer.pending(name):
                    if not waiting:
                        tqdm.write(f"waiting for {len(left)} shards that others work on: {', '.join(writer.others())}", file=sys.stderr)
                    waiting = True
                    time.sleep(WAIT)
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
    return made


def _summary(recipe: DumpRecipe, made: Sequence[int], seconds: float) -> str:
    """What the run did for the shards ``made``, and what the store now holds of the pass."""
    store = Store.open(recipe.store)
    tokens = int(store.rows.slot_tokens[list(made)].sum())
    commits = store.committed(recipe.pass_name)
    written = sum(seal.size for shard in made for seal in commits[shard].files.values())
    lines = [f"{recipe.store}: pass {recipe.pass_name} is complete, {len(commits):,} shards of {store.manifest.rows.rows:,} rows"]
    if tokens:
        lines.append(
            f"this run: {tokens:,} tokens in {duration(seconds)} ({tokens / seconds:,.0f} tokens/s), "
            f"{size(written)} of features ({written / tokens:,.0f} bytes a token)"
        )
    else:
        lines.append("this run: nothing was left to do")
    lines += describe_errors(read_errors(recipe.store, recipe.pass_name))
    return "\n".join(lines)
