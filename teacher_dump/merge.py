"""Stores of different rows as one, with a progress bar and a line at the end."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from online.figures import size
from store.merge import merge
from store.provenance import provenance
from store.reader import Store
from teacher_dump.status import describe_rows


def merge_stores(new: Path, stores: Sequence[Path], command: Sequence[str]) -> str:
    """Merge and say what there is.

    Raises:
        ValueError, StoreError: as store.merge.merge.
    """
    with tqdm(unit="shard", delay=0.5) as progress:

        def tick(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        links = merge(new, stores, provenance(command), tick)
    store = Store.open(new)
    rows = store.manifest.rows
    lines = [f"{new}: {describe_rows(rows)}"]
    for name in store.manifest.passes:
        left = rows.slots - len(store.committed(name))
        more = f", {left:,} are left: `teacher-dump run` with its recipe and store={new} goes on" if left else ""
        lines.append(f"  pass {name}: {rows.slots - left:,} of {rows.slots:,} shards{more}")
    if links is None:
        lines.append("nothing was left to do")
    elif links.copied:
        lines.append(f"{links.linked:,} files linked, {links.copied:,} copied ({size(links.copied_bytes)}): links end at a file system")
    else:
        lines.append(f"{links.linked:,} files linked: they take no disk as long as the stores that they came from are kept")
    return "\n".join(lines)
