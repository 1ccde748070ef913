"""A report as Markdown, with its pictures as files beside it."""

import re
from collections.abc import Sequence

from student_train.report.section import Section, Table

PICTURES = "pictures"
"""Folder beside the file."""


def markdown(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The text; what could be read as Markdown or HTML is escaped."""
    parts = [f"# {plain(title)}", plain(lead)]
    for one in sections:
        parts += [f"## {plain(one.title)}", *map(plain, one.text)]
        for picture in one.pictures:
            parts += [f"![{picture.name}]({PICTURES}/{picture.name}.svg)", f"*{plain(picture.caption)}*"]
        for table in one.tables:
            parts += [f"### {plain(table.name)}", _table(table), *([plain(table.note)] if table.note else [])]
    return "\n\n".join([*parts, plain(footer)]) + "\n"


def plain(text: str) -> str:
    """Text that stands for itself, on one line."""
    return re.sub(r"([\\|*`<>\[\]#])", r"\\\1", " ".join(text.split()))


def _table(one: Table) -> str:
    lines = [one.header, tuple("---" for _ in one.header), *one.rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else plain(cell) for cell in line)} |" for line in lines)
