"""How figures look, and how a figure becomes SVG that follows the page from light to dark."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import matplotlib
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from student_train.report.colours import GRID, INK, MUTED, ROLES, SERIES

WIDTH = 9.6
"""Inches of a figure that takes the whole width of the page; a panel of three in a row takes a third."""

STYLE: dict[str, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK.light,
    "axes.labelcolor": INK.light,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK.light,
    "axes.edgecolor": MUTED.light,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=[colour.light for colour in SERIES]),
    "grid.color": GRID.light,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.labelcolor": MUTED.light,
    "ytick.labelcolor": MUTED.light,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "path.simplify": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Figures that are made inside are in the report's colours, with nothing said."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(rows: int, columns: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row, each ``height`` inches high; a panel that stays empty is to be made invisible."""
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [axes for row in grid for axes in row]


def legend(figure: Figure, known: Mapping[str, Artist]) -> None:
    """One legend above all panels, of what is drawn by label, in as many columns as the figure is wide."""
    for columns in range(len(known), 0, -1):
        made = figure.legend(known.values(), known.keys(), loc="outside upper left", ncols=columns)
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()


def svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element for a page: colours are CSS variables, text is text, ids are its own."""
    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = text.replace("font-family: 'DejaVu Sans', sans-serif; ", "")  # the page's own font, which is no wider
    text = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: _short(found[0]), text)
    text = _ROLE.sub(lambda found: f"var(--{_NAMES[found[0].lower()]})", text)
    return re.sub(r">\s+<", "><", text).replace("<svg ", f'<svg role="img" aria-labelledby="{name}-caption" ', 1)


def svg_file(drawn: str) -> str:
    """What ``svg`` gave as a file of its own, which knows both variants of its colours."""
    used = [role for role in ROLES if f"var(--{role})" in drawn]
    first, rest = drawn.split(">", 1)
    css = f"svg {{ {light(used)} font-family: system-ui, sans-serif; }}\n@media (prefers-color-scheme: dark) {{ svg {{ {dark(used)} }} }}"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{first}>\n<style>{css}</style>{rest}\n'


def light(roles: Iterable[str] = ROLES) -> str:
    """CSS variables of ``roles`` on a light page."""
    return " ".join(f"--{role}: {ROLES[role].light};" for role in roles)


def dark(roles: Iterable[str] = ROLES) -> str:
    """The same on a dark one."""
    return " ".join(f"--{role}: {ROLES[role].dark};" for role in roles)


def _short(attribute: str) -> str:
    """An attribute of the drawing with two decimals and single spaces."""
    return " ".join(re.sub(r"(\.\d\d)\d+", r"\1", attribute).split())


_NAMES = {colour.light: role for role, colour in ROLES.items()}
_ROLE = re.compile("|".join(_NAMES), re.IGNORECASE)
