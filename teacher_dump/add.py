"""Rows of more texts in a store that has some."""

from collections.abc import Sequence

from online import rows as building
from online.models import load_tokenizer
from store.manifest import read_manifest
from store.provenance import provenance
from teacher_dump.dump import check_building
from teacher_dump.recipe import DumpRecipe
from teacher_dump.status import describe_rows


def add(recipe: DumpRecipe, command: Sequence[str]) -> str:
    """Add the rows of ``recipe`` to its store, behind those that it has; a summary.

    Raises:
        FingerprintMismatch: the store's rows were built in another way; the message names the field.
        StoreError: there is no store, or another process writes to it.
    """
    path = recipe.store
    before = read_manifest(path).rows
    tokenizer = load_tokenizer(recipe.teacher)
    check_building(recipe, tokenizer, path, before)
    if building.corpus_fingerprint(recipe.rows) in {origin.corpus for origin in before.origins}:
        return f"{path} has the rows of these texts already: {describe_rows(before)}"
    rows = building.add_rows(recipe.rows, tokenizer, path, provenance(command))
    lines = [
        f"{path}: added {rows.rows - before.rows:,} rows, {rows.tokens - before.tokens:,} tokens in {rows.slots - before.slots:,} shards",
        f"rows now: {describe_rows(rows)}",
    ]
    if passes := read_manifest(path).passes:
        lines.append(f"to be answered by {', '.join(passes)}: `teacher-dump run` with the recipe of each pass goes on with the new shards")
    return "\n".join(lines)
