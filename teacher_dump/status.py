"""What a store holds, for people."""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from online.figures import size, table
from store import layout
from store.commits import Commit
from store.features import FeatureSpec
from store.manifest import Manifest, PassInfo, Provenance, RowsInfo
from store.reader import Store
from store.remote import url_of
from store.strays import strays, weigh
from teacher_dump.records import describe_errors, read_errors


def status(path: Path) -> str:
    """A report on the store in folder ``path``: rows, passes, progress, sizes.

    Raises:
        StoreError: there is no store.
    """
    store = Store.open(path)
    lines = [str(store.where), *_rows(store.manifest.rows), *_history(store.manifest)]
    for name, info in store.manifest.passes.items():
        lines += ["", *_pass(store, name, info)]
    if url_of(path) is None and (left := weigh(strays(path))).files:
        mend = "`teacher-dump verify --repair` frees it where no dump is running"
        lines += ["", f"not in use: {size(left.freed)} that killed commands or dropped features have left; {mend}"]
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
    if rows.domains:
        yield f"  domains: {', '.join(rows.domains)}"
    if rows.paired:
        yield "  in pairs, with what each row takes of the other in an intervention"
    taken = dict.fromkeys(origin.taken for origin in rows.origins if origin.taken)
    if len(rows.origins) > 1 or taken:
        some = f", of which only some were taken: {'; '.join(taken)}" if taken else ""
        yield f"  built from {len(rows.origins):,} {'corpus' if len(rows.origins) == 1 else 'corpora'}{some}"


def _history(manifest: Manifest) -> Iterator[str]:
    """What was done to the store as a whole since its first rows were built."""
    if manifest.history:
        made = [*manifest.history, manifest.made]
        yield f"  made by {len(made):,} commands, the last at {manifest.made.created}: `{' '.join(manifest.made.command)}`"


def _pass(store: Store, name: str, info: PassInfo) -> Iterator[str]:
    rows, commits = store.manifest.rows, store.committed(name)
    written = sum(seal.size for commit in commits.values() for seal in commit.files.values())
    tokens = int(store.rows.slot_tokens[sorted(commits)].sum())
    far = "complete" if store.complete(name) else f"{len(commits) / rows.slots:.0%}, `teacher-dump run` goes on"
    each = f", {written / tokens:,.0f} bytes a token" if tokens else ""
    yield f"pass {name}: {len(commits):,} of {rows.slots:,} shards ({far}); {size(written)}{each}"
    shape = info.shape
    yield f"  teacher: {info.model}, run in {info.dtype}; {shape.family}, head {shape.head}, {shape.layers} blocks of width {shape.width}"
    if info.intervention is not None:
        alternatives = " or ".join(", ".join(map(str, blocks)) for blocks in info.intervention.layers)
        yield f"  answered with the partner's hidden states written over the output of blocks {alternatives}"
    yield f"  made: {_made(info.made)}"
    yield from _batches(info, commits.values())
    missing = "none, the answers were imported" if info.imported else "not shipped (configuration and tokenizer are)"
    yield f"  blocks to start students from: {'shipped' if info.shipped else missing}"
    yield "  stored:"
    lines = []
    for spec in info.features:
        unit = "row" if spec.feature.per_row else "token" if spec.feature.positions == "all" else "labelled token"
        names = [layout.array_name(spec.feature, array.name) for array in spec.arrays]
        files = sum(seal.size for commit in commits.values() for name, seal in commit.files.items() if name in names)
        units = int(store.rows.slot_units(spec.feature.positions)[sorted(commits)].sum())
        now = f", {files / units:,.0f} B with compression" if spec.compressed and units else ""
        lines.append((f"  {spec.key}", _types(spec), f"{spec.unit_bytes:,} B a {unit}{now}"))
    yield table(lines)
    derived = [key for key in info.requested if key not in {spec.key for spec in info.features}]
    if derived:
        yield f"  derived when read: {', '.join(derived)}"
    yield from (f"  {line}" for line in describe_errors(read_errors(store.path, name)))


def _batches(info: PassInfo, commits: Collection[Commit]) -> Iterator[str]:
    """In which batches the teacher answered, where that is known."""
    others = Counter(commit.batch_tokens for commit in commits if commit.batch_tokens is not None)
    known = [f"batches of {info.batch_tokens:,} tokens"] if info.batch_tokens is not None else []
    known += [f"{_shards(number)} with {tokens:,}" for tokens, number in sorted(others.items(), reverse=True)]
    if known:
        yield f"  {'; '.join(known)}"


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"


def _types(spec: FeatureSpec) -> str:
    """The types of its arrays, and what was done to them."""
    types = [f"{array.dtype} of {array.keep_bits} bits" if array.keep_bits else array.dtype for array in spec.arrays]
    return " + ".join(dict.fromkeys(types)) + (", zstd" if spec.compressed else "")


def _made(made: Provenance) -> str:
    return f"{made.created} with torch {made.versions.get('torch', '?')}, by `{' '.join(made.command)}`"
