"""A store for other programs, with a progress bar and a line at the end."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from store.exports import Format, export

_READ = {
    "parquet": "read it with pyarrow, pandas or DuckDB, such as SELECT * FROM '{out}/*.parquet'",
    "safetensors": "read a file with safetensors.safe_open; its metadata says what the tensors are",
    "hidden-states": "hs_<i>.safetensors is the i-th row, as speculators reads it",
}


def export_store(
    store: Path, out: Path, kind: Format, passes: Sequence[str], features: Sequence[str], split: str | None, rows: str | None
) -> str:
    """Export and say what there is; ``rows`` is FIRST:AFTER, either of which may be left out.

    Raises:
        ValueError, StoreError: as store.exports.export.
    """
    first, after = bounds(rows)
    with tqdm(unit=" rows", unit_scale=True) as progress:

        def tick(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        made = export(store, out, kind, passes=passes, features=features, split=split, first=first, after=after, tick=tick)
    wrote = f"{made.new_files:,} files written" if made.new_files else "nothing was left to do"
    return "\n".join(
        [f"{out}: {made.rows:,} rows, {wrote}", *(f"  {key}" for key in made.features), _READ[kind].format(out=out)],
    )


def bounds(rows: str | None) -> tuple[int, int | None]:
    """FIRST:AFTER as two numbers; raises ValueError for anything else."""
    if rows is None:
        return 0, None
    first, colon, after = rows.partition(":")
    if not colon or not all(part.isascii() and (part.isdigit() or not part) for part in (first, after)):
        raise ValueError(f"--rows: expected FIRST:AFTER, such as 0:1000, found {rows!r}")
    return int(first or 0), int(after) if after else None
