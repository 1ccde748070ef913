"""What two stores have in common, as a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from online.figures import table
from store.diff import Apart, Compared, Difference, diff


def compare(one: Path, other: Path, passes: Sequence[str]) -> tuple[bool, str]:
    """Whether two stores hold the same, and a report.

    Args:
        passes: ``NAME``, or ``NAME=OTHER`` where the second store has it under another name; all by default.

    Raises:
        ValueError, StoreError: as store.diff.diff.
    """
    names = {name: of or name for name, _, of in (text.partition("=") for text in passes)}
    found = diff((one, other), names or None)
    return found.equal, "\n".join([f"{one} and {other} {'hold the same' if found.equal else 'differ'}", *_lines(found)])


def _lines(found: Difference) -> Iterator[str]:
    more = "" if found.rows[0] == found.rows[1] else f" ({found.rows[0]:,} and {found.rows[1]:,} rows)"
    if found.differing:
        few = ", ".join(map(str, found.differing[:5])) + (", ..." if len(found.differing) > 5 else "")
        yield f"rows: {len(found.differing):,} of {found.compared:,} differ: {few}; their features are not compared{more}"
    else:
        yield f"rows: {found.compared:,} are the same{more}"
    for name, rows in found.shards.items():
        for store, count in zip(("first", "second"), rows, strict=True):
            if count:
                yield f"pass {name}: only the {store} store has answers for {count:,} rows"
    for store, keys in zip(("first", "second"), found.only, strict=True):
        if keys:
            yield f"only in the {store} store: {', '.join(keys)}"
    if found.features:
        lines: list[tuple[str, ...]] = [("feature", "array", "shards", "differing", "max abs", "max rel", "rms rel", "kept as")]
        lines += [line for key, compared in found.features.items() for line in _feature(key, compared)]
        yield table(lines, right="23456")


def _feature(key: str, compared: Compared) -> Iterator[tuple[str, ...]]:
    kept = " / ".join(dict.fromkeys(spec.kept_as for spec in compared.specs))
    for array, apart in sorted(compared.arrays.items()) or [("", Apart())]:
        numbers = (f"{apart.largest:.3g}", f"{apart.relative:.3g}", f"{apart.rms:.3g}") if apart.differing else ("0", "0", "0")
        yield key, array, f"{compared.shards:,}", f"{apart.differing / apart.values:.1%}" if apart.differing else "equal", *numbers, kept
