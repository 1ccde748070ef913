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
from store.errors import FingerprintMismatch, StoreError
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
        name = recipe.pass_name
        teacher = load_pass(recipe, requests, writer.rows, made)
        store = Store.open(recipe.store)
        _announce(recipe, teacher, store, writer)
        before = writer.pending(name)
        start = time.perf_counter()
        answer_all(teacher, store, writer, recipe)
    return _summary(recipe, before, time.perf_counter() - start)


def _announce(recipe: DumpRecipe, teacher: TeacherPass, store: Store, writer: StoreWriter) -> None:
    """Put all of the pass but its shards into the store, unless it is there."""
    name, statics = recipe.pass_name, teacher.statics()
    cost = cost_of(store, recipe, teacher, statics)
    known = name in writer.manifest.passes
    check_disk(recipe.store, cost.shards(writer.pending(name)) if known else cost.added)
    if known:
        writer.add_pass(name, teacher.info, statics)  # refuses another teacher before anything of it is touched
    if not layout.model(recipe.store, name).is_dir() or not known:
        ship(teacher.loaded, recipe, derived_errors(teacher, sample(store, recipe.batch_tokens)))
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
        return building.build_rows(recipe.rows, tokenizer, path, made)
    rows = read_manifest(path).rows
    _compare(path, "tokenizer", rows.tokenizer, tokenizer_fingerprint(tokenizer))
    for name, found in recipe.rows.model_dump(mode="json").items():
        if name != "sources":
            _compare(path, f"rows.{name}", rows.origins[0].options.get(name), found)
    _compare(path, "row building version", rows.building, building.building_fingerprint(recipe.rows))
    _compare(path, "corpus", rows.corpus, building.corpus_fingerprint(recipe.rows))
    return rows


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


def answer_all(teacher: TeacherPass, store: Store, writer: StoreWriter, recipe: DumpRecipe) -> None:
    """Answer and commit every pending shard. A shard that cannot be written stops the run before the next batch."""
    rows, pending = store.rows, writer.pending(recipe.pass_name)
    tokens = int(rows.slot_tokens[pending].sum())
    done = len(rows.slot_tokens) - len(pending)
    if done and pending:
        tqdm.write(f"going on after {done} committed shards", file=sys.stderr)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with ThreadPoolExecutor(1, "writer") as pool, tqdm(total=tokens, unit=" tokens", unit_scale=True, mininterval=interval) as progress:
        writing: deque[Future[None]] = deque()
        try:
            for shard in pending:
                progress.set_description(f"shard {shard + 1} of {len(rows.slot_tokens)}", refresh=False)
                buffer = ShardBuffer(rows, shard, teacher.specs)
                for members in cut(rows, rows_of(rows, shard), recipe.batch_tokens):
                    while writing and writing[0].done():
                        writing.popleft().result()
                    buffer.place(members, teacher.answer(collate(store, members), Origins(rows, members)))
                    progress.update(int(rows.at(members).length.sum()))
                writing.append(pool.submit(writer.commit, recipe.pass_name, shard, buffer.arrays))
                while len(writing) > 1 + AHEAD:
                    writing.popleft().result()
            for future in writing:
                future.result()
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise


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
