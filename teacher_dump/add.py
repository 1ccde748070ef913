"""More in a store that is there: rows of more texts, another teacher, more features of the same one."""

import os
import time
from collections.abc import Iterator, Sequence

from online import rows as building
from online.models import load_tokenizer
from online.rows_spec import corpus_fingerprint
from store.manifest import RowsInfo, read_manifest
from store.provenance import provenance
from store.reader import Store
from teacher_dump.dump import WAIT, check_building, dump, requested
from teacher_dump.further import Further, family, further
from teacher_dump.placement import placed
from teacher_dump.recipe import DumpRecipe
from teacher_dump.status import describe_rows
from teacher_dump.stopping import GRACE


def add_rows(recipe: DumpRecipe, command: Sequence[str]) -> str:
    """Add the rows of ``recipe`` to its store, behind those that it has; a summary.

    Raises:
        FingerprintMismatch: the store's rows were built in another way; the message names the field.
        StoreError: there is no store, or another process writes to it.
    """
    before = _rows(recipe)
    if not _lacks(recipe, before):
        return f"{recipe.store} has the rows of these texts already: {describe_rows(before)}"
    lines = [_built(recipe, command, before)]
    if passes := read_manifest(recipe.store).passes:
        lines.append(f"to be answered by {', '.join(passes)}: `teacher-dump run` with the recipe of each pass goes on with the new shards")
    return "\n".join(lines)


def add(recipe: DumpRecipe, command: Sequence[str], grace: float = GRACE) -> str:
    """Bring all that ``recipe`` describes into its store and leave what is there as it is; a summary.

    Rows of texts that the store lacks come first. Then the pass of the recipe is answered, or gone on with. Where the store
    has a pass of this name and the recipe asks for more features, these make a further pass (teacher_dump.further).

    Args:
        grace: As in :func:`teacher_dump.dump.dump`.

    Raises:
        ValueError, StoreError, Stopped: as :func:`add_rows` and :func:`teacher_dump.dump.dump`.
    """
    recipe, (_, requests) = placed(recipe), requested(recipe)
    before, lines = _rows(recipe), list[str]()
    if _lacks(recipe, before):
        if os.environ.get("RANK", "0") == "0":
            lines.append(_built(recipe, command, before))
        while _lacks(recipe, read_manifest(recipe.store).rows):  # another rank of this job builds them
            time.sleep(WAIT)
    store = Store.open(recipe.store)
    passes, slots = store.manifest.passes, store.manifest.rows.slots
    what = further(recipe, requests, store.manifest, {name: slots - len(store.committed(name)) for name in passes})
    known = family(passes, recipe.pass_name)
    todo = what.recipes[:1] if recipe.sharding.kind != "none" else what.recipes  # ranks that hold a teacher together meet once
    for part in todo:
        if known and part.pass_name not in known:
            keys, there = ", ".join(map(str, what.new)), ", ".join(known)
            lines.append(f"pass {part.pass_name} is for what is not in {there}: {keys}")
        lines.append(dump(part, command, grace, beside=recipe.pass_name if known else None))
    return "\n".join([*lines, *_rest(recipe, what, len(todo))])


def _rows(recipe: DumpRecipe) -> RowsInfo:
    """The rows of the recipe's store, which must be built as the recipe says."""
    rows = read_manifest(recipe.store).rows
    check_building(recipe, load_tokenizer(recipe.teacher), recipe.store, rows)
    return rows


def _lacks(recipe: DumpRecipe, rows: RowsInfo) -> bool:
    return corpus_fingerprint(recipe.rows) not in {origin.corpus for origin in rows.origins}


def _built(recipe: DumpRecipe, command: Sequence[str], before: RowsInfo) -> str:
    """What was added to the rows that were there ``before``."""
    rows = building.add_rows(recipe.rows, load_tokenizer(recipe.teacher), recipe.store, provenance(command))
    return (
        f"{recipe.store}: added {rows.rows - before.rows:,} rows, {rows.tokens - before.tokens:,} tokens in "
        f"{rows.slots - before.slots:,} shards\nrows now: {describe_rows(rows)}"
    )


def _rest(recipe: DumpRecipe, what: Further, done: int) -> Iterator[str]:
    """What is left, or that nothing was to be done."""
    if left := [part.pass_name for part in what.recipes[done:]]:
        yield f"left: {', '.join(left)}; the same command goes on with it"
    if what.others:
        yield f"shards are also missing in {', '.join(what.others)}: `teacher-dump run` with the recipe of each goes on with them"
    if not what.recipes:
        yield f"{recipe.store} has all features of this recipe"
