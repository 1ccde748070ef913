"""What a store holds, for people."""

from collections.abc import Iterator
from pathlib import Path

from store.manifest import PassInfo, Provenance, RowsInfo
from store.reader import Store
from teacher_dump.figures import size, table
from teacher_dump.records import describe_errors, read_errors


def status(path: Path) -> str:
    """A report on the store in folder ``path``: rows, passes, progress, sizes.

    Raises:
        StoreError: there is no store.
    """
    store = Store.open(path)
    lines = [str(path), *_rows(store.manifest.rows)]
    for name, info in store.manifest.passes.items():
        lines += ["", *_pass(store, name, info)]
    if not store.manifest.passes:
        lines += ["no features: rows for a live teacher, or for `teacher-dump run` to add to"]
    return "\n".join(lines)


def describe_rows(rows: RowsInfo) -> str:
    """Rows, splits and shards in a line."""
    splits = ", ".join(f"{number:,} {name}" for name, number in rows.splits.items())
    return f"{rows.rows:,} ({splits}), {rows.tokens:,} tokens in {rows.slots:,} shards of up to {rows.slot_tokens:,}"


def _rows(rows: RowsInfo) -> Iterator[str]:
    task = rows.task.kind if rows.task.kind != "none" else "no task"
    classes = f" of {', '.join(rows.task.classes)}" if rows.task.classes else ""
    copies = f", {rows.copies} maskings" if rows.copies > 1 else ""
    yield f"rows: {describe_rows(rows)}; {rows.objective} objective{copies}, {task}{classes}"


def _pass(store: Store, name: str, info: PassInfo) -> Iterator[str]:
    rows, commits = store.manifest.rows, store.committed(name)
    written = sum(seal.size for commit in commits.values() for seal in commit.files.values())
    tokens = int(store.rows.slot_tokens[sorted(commits)].sum())
    far = "complete" if store.complete(name) else f"{len(commits) / rows.slots:.0%}, `teacher-dump run` goes on"
    each = f", {written / tokens:,.0f} bytes a token" if tokens else ""
    yield f"pass {name}: {len(commits):,} of {rows.slots:,} shards ({far}); {size(written)}{each}"
    shape = info.shape
    yield f"  teacher: {info.model}, run in {info.dtype}; {shape.family}, head {shape.head}, {shape.layers} blocks of width {shape.width}"
    yield f"  made: {_made(info.made)}"
    yield f"  blocks to start students from: {'shipped' if info.shipped else 'not shipped (configuration and tokenizer are)'}"
    yield "  stored:"
    lines = []
    for spec in info.features:
        types = " + ".join(dict.fromkeys(array.dtype for array in spec.arrays))
        unit = "row" if spec.feature.per_row else "token" if spec.feature.positions == "all" else "labelled token"
        lines.append((f"  {spec.key}", types, f"{spec.unit_bytes:,} B a {unit}"))
    yield table(lines)
    derived = [key for key in info.requested if key not in {spec.key for spec in info.features}]
    if derived:
        yield f"  derived when read: {', '.join(derived)}"
    yield from (f"  {line}" for line in describe_errors(read_errors(store.path, name)))


def _made(made: Provenance) -> str:
    return f"{made.created} with torch {made.versions.get('torch', '?')}, by `{' '.join(made.command)}`"
