"""Is a store whole, and if not, what mends it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from online.figures import size
from store import layout
from store.manifest import read_manifest
from store.reader import Store
from store.shipped import shipped_problem
from store.strays import Freed
from store.verify import Problem, Progress, Repaired
from store.verify import repair as repair_store
from store.verify import verify as verify_store
from teacher_dump.records import WordError, describe_errors, describe_word_errors, read_errors, read_word_errors


def verify(path: Path, repair: bool, full: bool = True) -> tuple[bool, str]:
    """Look at every committed file of the store in folder ``path`` again; whether nothing is left to mend, and a report.

    Args:
        repair: Take damaged shards back, so that the next dump makes them again, and remove what nothing refers to.
        full: Read every byte, and not only what says what a file is.

    Raises:
        StoreError: there is no store, or another process writes to it.
    """
    with _bar() as progress:
        done = repair_store(path, full, progress) if repair else Repaired([], verify_store(path, full, progress), 0, Freed(0, 0, 0))
    done = done._replace(left=[*done.left, *_models(path)])
    found = len(done.mended) + len(done.left)
    how = "" if full else ", as far as sizes and indexes tell (every byte is read without --fast)"
    lines = [f"{path} is damaged: {found:,} files"] if found else [f"{path} is whole{how}", *_read(path)]
    lines += [f"  taken back: {problem.file}: {problem.what}" for problem in done.mended]
    if done.mended:
        again = f"{done.dropped:,} shards will be made again by the `teacher-dump run` that made them"
        lines.append(again if done.dropped else "mended")
    lines += [f"  {problem}" for problem in done.left]
    if done.freed.files:
        shared = f"; {size(done.freed.shared)} stay, other stores have the same files" if done.freed.shared else ""
        lines.append(f"freed {size(done.freed.freed)}: {done.freed.files:,} files that nothing refers to{shared}")
    return not done.left, "\n".join(lines)


def _models(path: Path) -> Iterator[Problem]:
    for name, info in read_manifest(path).passes.items():
        if what := shipped_problem(path, name, configured=not info.imported):
            mend = "remove the folder, if there is one, and start the dump again: it ships it anew"
            yield Problem(layout.model(path, name), what, mend, pass_name=name)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar for what takes longer than a few seconds."""
    with tqdm(desc="verify", unit="B", unit_scale=True, delay=3, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield progress


def _read(path: Path) -> Iterator[str]:
    """What was looked at and found as committed."""
    store = Store.open(path)
    yield f"  rows: {store.manifest.rows.rows:,} in {store.manifest.rows.slots:,} shards"
    for name in store.manifest.passes:
        commits = store.committed(name)
        written = sum(seal.size for commit in commits.values() for seal in commit.files.values())
        yield f"  pass {name}: {len(commits):,} of {store.manifest.rows.slots:,} shards, {size(written)}"
        yield from (f"    {line}" for line in describe_errors(read_errors(path, name)))
        yield from (f"    {line}" for line in _words(store, name))


def _words(store: Store, name: str) -> Iterator[str]:
    """How near the kept words come to whole predictions: measured again where these follow from the store, else as the dump found it."""
    recorded, features = read_word_errors(store.path, name), store.manifest.passes[name].features
    again: dict[str, WordError] = {}
    if store.complete(name) and recorded.keys() - {spec.key for spec in features}:
        from teacher_dump.word_errors import measured_again  # torch takes a second, and most stores have nothing to derive

        again = measured_again(store, name)
    yield from describe_word_errors(recorded | again, features)
    if left := [key for key in recorded if key not in again]:
        yield (
            f"  {', '.join(left)}: as measured when the pass began; measuring again takes head_input of the same tokens, with its "
            "head, in a complete pass"
        )
