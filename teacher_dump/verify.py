"""Is a store whole, and if not, what mends it."""

from collections.abc import Iterator
from pathlib import Path

from store import layout
from store.manifest import Manifest, read_manifest
from store.reader import Store
from store.verify import Problem
from store.verify import repair as repair_store
from store.verify import verify as verify_store
from teacher_dump.figures import size
from teacher_dump.records import describe_errors, read_errors


def verify(path: Path, repair: bool) -> tuple[bool, str]:
    """Read every committed byte of the store in folder ``path`` again; whether nothing is left to mend, and a report.

    Args:
        repair: take damaged shards back, so that the next dump makes them again.

    Raises:
        StoreError: there is no store, or another process writes to it.
    """
    found = [*verify_store(path), *_models(path, read_manifest(path))]
    if not found:
        return True, "\n".join([f"{path} is whole", *_read(path)])
    mended = [problem for problem in found if problem.repairs] if repair else []
    left = [problem for problem in found if problem not in mended]
    lines = [f"{path} is damaged: {len(found):,} files"]
    if mended:
        repair_store(path)
        shards = sorted({(problem.pass_name, problem.shard) for problem in mended if problem.pass_name})
        lines += [f"  taken back: {problem.file}: {problem.what}" for problem in mended]
        lines += [f"{len(shards):,} shards will be made again by the `teacher-dump run` that made them" if shards else "mended"]
    lines += [f"  {problem}" for problem in left]
    return not left, "\n".join(lines)


def _models(path: Path, manifest: Manifest) -> Iterator[Problem]:
    for name in manifest.passes:
        folder = layout.model(path, name)
        if not (folder / "config.json").is_file():
            mend = "remove the folder, if there is one, and start the dump again: it ships it anew"
            yield Problem(folder, "the teacher's configuration and tokenizer are missing", mend, pass_name=name)


def _read(path: Path) -> Iterator[str]:
    """What was read and found as committed."""
    store = Store.open(path)
    yield f"  rows: {store.manifest.rows.rows:,} in {store.manifest.rows.slots:,} shards"
    for name in store.manifest.passes:
        commits = store.committed(name)
        written = sum(seal.size for commit in commits.values() for seal in commit.files.values())
        yield f"  pass {name}: {len(commits):,} of {store.manifest.rows.slots:,} shards, {size(written)}"
        yield from (f"    {line}" for line in describe_errors(read_errors(path, name)))
