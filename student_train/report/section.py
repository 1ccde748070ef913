"""What a report is made of: sections, each of text, tables and pictures."""

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure; it is drawn as SVG, with text as text, in colours that follow the page from light to dark."""

    name: str
    """Of its file, unique in a report: letters, digits and dashes, such as ``gkd-4``."""
    caption: str
    """One or two sentences that say what is seen and what it was made from."""
    figure: Figure
    """Made without pyplot, in colours of ``student_train.report.colours`` alone: those that matplotlib takes by itself inside
    ``drawing.style()``, where sections are called."""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names its row."""

    name: str
    """Its heading."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What must be known to read it, in a sentence below it."""
    folded: bool = False
    """Shown only when it is asked for: long ones."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: paragraphs of plain text, then pictures, then tables."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
