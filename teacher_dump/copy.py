"""A store copied, whole or in part, with a progress bar and a line at the end."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from online.figures import size
from store.copies import Wanted, copy
from store.manifest import PassInfo, read_manifest
from store.provenance import provenance
from store.reader import Store
from store.recode import Keeping
from teacher_dump.coverage import forget_errors, settle
from teacher_dump.export import bounds
from teacher_dump.status import describe_rows


def copy_store(
    path: Path,
    new: Path,
    passes: tuple[str, ...],
    features: tuple[str, ...],
    split: str | None,
    rows: str | None,
    keeping: Keeping,
    command: Sequence[str],
) -> str:
    """Copy and say what there is; ``rows`` is FIRST:AFTER, either of which may be left out.

    Raises:
        ValueError, StoreError: as store.copies.copy.
    """
    lost: list[str] = []

    def settled(name: str, info: PassInfo) -> PassInfo:
        info, uncovered = settle(info)
        lost.extend(f"{name}/{key}" for key in uncovered)
        return info

    with tqdm(unit="shard", delay=0.5) as progress:

        def tick(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        wanted = Wanted(passes, features, split, bounds(rows) if rows is not None else None, keeping)
        did = copy(path, new, wanted, provenance(command), settled, tick)
    store = Store.open(new)
    forget_errors(new, read_manifest(path).passes, store.manifest.passes)
    lines = [f"{new}: {describe_rows(store.manifest.rows)}"]
    for name, info in store.manifest.passes.items():
        kept = ", ".join(f"{spec.key} in {spec.kept_as}" for spec in info.features)
        lines.append(f"  pass {name}: {len(store.committed(name)):,} of {store.manifest.rows.slots:,} shards; {kept}")
    lines += [f"no more derived from what is kept: {', '.join(lost)}"] if lost else []
    if did.pending:
        lines.append(f"{did.pending:,} shards wait for {path}, which has not all of them yet: the same command goes on")
    if not did.shards and not did.links.linked:
        return "\n".join([*lines, "nothing was left to do"])
    copied = did.written + did.links.copied_bytes
    return "\n".join([*lines, f"{did.links.linked:,} files linked, {size(copied)} of features written"])
