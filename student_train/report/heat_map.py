"""Heat maps of coefficients between -1 and 1."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from student_train.report.colours import INK, MUTED, diverging_map

Cells = Mapping[tuple[str, str], float | None]
"""(row, column) -> coefficient; None where there is a quantity that has none, for it never changed. Others have no cell."""

PRINTED = 13
"""Columns of a panel at most, of which a number fits into each cell."""
CROWDED = 9
"""Columns of a panel that names of layers fit under in the common size."""
ROW = 0.24
"""Inches."""


def draw(axes: Axes, cells: Cells, rows: Sequence[str], columns: Sequence[str], title: str) -> QuadMesh:
    """Cells from blue (-1) over the page's colour (0) to red (+1), the first row at the top."""
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        if value is not None:
            values[rows.index(row), columns.index(column)] = value
    mesh: QuadMesh = axes.pcolormesh(values, cmap=diverging_map(), vmin=-1, vmax=1)
    if len(columns) <= PRINTED:
        for (row, column), value in cells.items():
            place = columns.index(column) + 0.5, rows.index(row) + 0.5
            colour = MUTED.light if value is None else INK.light
            axes.text(*place, printed(value), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    if len(columns) > CROWDED:
        axes.tick_params(axis="x", labelsize=6.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    axes.invert_yaxis()
    return mesh


def printed(value: float | None) -> str:
    """Two decimals without the zero before them: ``.87``, ``−.30``, ``1``; a dash for None."""
    if value is None:
        return "–"
    text = f"{abs(value):.2f}"
    text = "1" if text == "1.00" else text.removeprefix("0")
    return f"−{text}" if value < 0 and text != ".00" else text
