"""Numbers and tables as people read them."""

import re
from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes in decimal units: ``1.53 GB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 1000 * scale else f"{number / scale:,.0f} {unit}"
    return f"{number:.0f} B"


def read_bytes(text: str) -> float | None:
    """``40GB``, ``1.5 TB`` or ``512MiB`` as bytes; None where it is no number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B", text.strip().upper())
    if found is None or not float(found[1]):
        return None
    return float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2]))


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3.5 h`` or ``2.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def table(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Lines of aligned columns, indented; column i is aligned to the right where ``right`` holds its number."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if str(column) in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)
