"""Named colours of a report, each in a light and a dark variant.

Figures are drawn in the light variant. Their SVG then names the roles as CSS variables (``var(--series-0)``), so that one drawing reads
well on a light and on a dark page; so no two roles share a light variant. Cells of a heat map stay pale on a light page and deep on a dark
one: text in the colour ``ink`` is readable on all of them.

The categorical palette is Okabe and Ito's (2008) in tones that stand out on both pages: colour-blind readers tell its members apart.
"""

from dataclasses import dataclass

from matplotlib.colors import Colormap, ListedColormap, to_rgb


@dataclass(frozen=True)
class Colour:
    """One role in both pages, as ``#rrggbb``."""

    light: str
    dark: str


INK = Colour("#1c2024", "#e6e8ea")
"""Text."""
MUTED = Colour("#5c646c", "#9aa3ab")
"""Text and lines of second rank: ticks, axes."""
GRID = Colour("#e3e6e9", "#30363c")
PAPER = Colour("#ffffff", "#16191c")
"""The page itself, behind a figure."""

SERIES = (
    Colour("#0067a5", "#56aee8"),
    Colour("#c65102", "#f08a3c"),
    Colour("#00795b", "#2fbf98"),
    Colour("#b4488a", "#e08cbf"),
    Colour("#8a6d00", "#e0c341"),
    Colour("#5b4fb3", "#a79df0"),
    Colour("#a3282a", "#ee7d7e"),
    Colour("#4d5b66", "#a9b8c4"),
)
"""Categories in their order; a ninth begins again with another line style."""

STEPS = 21
"""Tones of a map; odd, so that the middle of the diverging one is the page's own colour."""


def _mixed(begin: str, end: str, share: float) -> str:
    """``share`` of the way from one colour to another."""
    channels = (round(255 * (a + (b - a) * share)) for a, b in zip(to_rgb(begin), to_rgb(end), strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _tones(low: Colour, middle: Colour, high: Colour) -> tuple[Colour, ...]:
    half = STEPS // 2
    found = []
    for number in range(STEPS):
        side, share = (low, (half - number) / half) if number < half else (high, (number - half) / half)
        found.append(Colour(_mixed(middle.light, side.light, share), _mixed(middle.dark, side.dark, share)))
    return tuple(found)


DIVERGING = _tones(Colour("#6fa8dc", "#1d5f9c"), Colour("#f6f6f4", "#22262a"), Colour("#ee9a80", "#a8452b"))
"""From -1 (blue) over 0 (the page) to +1 (red)."""
SEQUENTIAL = _tones(Colour("#f4f8f6", "#1f2726"), Colour("#b5dccd", "#184b40"), Colour("#63b799", "#0f6f57"))
"""From little (the page) to much (green)."""

ROLES: dict[str, Colour] = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "paper": PAPER,
    **{f"series-{number}": colour for number, colour in enumerate(SERIES)},
    **{f"diverging-{number}": colour for number, colour in enumerate(DIVERGING)},
    **{f"sequential-{number}": colour for number, colour in enumerate(SEQUENTIAL)},
}
"""Name of the CSS variable, without its dashes -> colour."""


def series(number: int) -> str:
    """The colour of the ``number``-th category, as figures draw it."""
    return SERIES[number % len(SERIES)].light


def dash(number: int) -> str:
    """The line style of the ``number``-th category: another one for each round of colours."""
    return ("-", "--", ":", "-.")[number // len(SERIES) % 4]


def diverging_map() -> Colormap:
    """For ``pcolormesh`` between -limit and limit; cells without a number keep the page's colour."""
    return _map("diverging", DIVERGING)


def sequential_map() -> Colormap:
    """For ``pcolormesh`` from the least to the largest value."""
    return _map("sequential", SEQUENTIAL)


def _map(name: str, tones: tuple[Colour, ...]) -> Colormap:
    return ListedColormap([tone.light for tone in tones], name=name).with_extremes(bad=(0, 0, 0, 0))
