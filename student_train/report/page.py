"""A report as one HTML page that needs nothing else: no scripts but one line for the button, no fonts, no links to other machines."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from student_train.report.drawing import dark, light
from student_train.report.section import Picture, Section, Table

_NUMBER = re.compile(
    r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?: ± \d+\.\d+)?(?: of \d+)?(?:%| (?:%|s|min|h|days|[kMGT]?B))?"
    r"|[-+][\d.]+ to [-+][\d.]+"
)
"""Cells that stand at the right edge of their columns."""

_TEXT = 60
"""Letters of a cell that make its column one of texts."""

_CSS = """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--font); font-variant-numeric: tabular-nums; }
main, header, nav ul, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .6rem; border-top: 2px solid var(--ink); scroll-margin-top: 3rem; }
h3 { font-size: .95rem; margin: 1.8rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead, figcaption, .note, footer { color: var(--muted); font-size: .88rem; }
nav { position: sticky; top: 0; z-index: 1; margin-top: 1.2rem; background: var(--paper); border-bottom: 1px solid var(--grid); }
nav ul { display: flex; flex-wrap: wrap; align-items: center; gap: 0 1.3rem; list-style: none; }
nav ul { padding-top: .35rem; padding-bottom: .35rem; }
nav li { padding: .1rem 0; }
nav a { color: var(--muted); text-decoration: none; font-size: .88rem; }
nav a:hover, nav a:focus-visible { color: var(--ink); text-decoration: underline; }
nav li:last-child { margin-left: auto; }
button { font: inherit; font-size: .82rem; color: var(--muted); background: none; cursor: pointer; }
button { border: 1px solid var(--grid); border-radius: 999px; padding: .1rem .8rem; }
figure { margin: 1rem 0 1.6rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { max-width: 46rem; margin-top: .35rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; min-width: 40%; }
th, td { padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; border-bottom-color: var(--muted); white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
td { min-width: 4rem; max-width: 30rem; overflow-wrap: break-word; }
td.t { min-width: 18rem; }
tbody tr:hover { background: color-mix(in srgb, var(--grid) 45%, transparent); }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; }
footer { padding-top: 2.5rem; padding-bottom: 3rem; }
@media print { nav { display: none; } body { background: white; } figure { break-inside: avoid; } }
"""

_BUTTON = (
    "<button type=button onclick=\"let r=document.documentElement,d=r.dataset.theme?r.dataset.theme=='dark':"
    "matchMedia('(prefers-color-scheme: dark)').matches;r.dataset.theme=d?'light':'dark'\">light / dark</button>"
)


def page(title: str, lead: str, sections: Sequence[Section], footer: str, drawn: Mapping[str, str]) -> str:
    """The page; all text is escaped.

    Args:
        drawn: Name of each picture -> its ``<svg>`` element.
    """
    links = "".join(f'<li><a href="#{_anchor(one.title)}">{escape(one.title)}</a></li>' for one in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
:root {{ --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; {light()} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {dark()} }} }}
:root[data-theme=dark] {{ {dark()} }}
{_CSS.strip()}
</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
<nav aria-label="Sections"><ul>{links}<li>{_BUTTON}</li></ul></nav>
<main>
{"".join(_section(one, drawn) for one in sections)}
</main>
<footer><p>{escape(footer)}</p></footer>
</body>
</html>
"""


def _section(one: Section, drawn: Mapping[str, str]) -> str:
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in one.text)
    inside = "".join(_picture(picture, drawn[picture.name]) for picture in one.pictures) + "".join(map(_table, one.tables))
    return f'<section>\n<h2 id="{_anchor(one.title)}">{escape(one.title)}</h2>\n{paragraphs}{inside}</section>\n'


def _picture(one: Picture, drawn: str) -> str:
    return f'<figure>{drawn}<figcaption id="{one.name}-caption">{escape(one.caption)}</figcaption></figure>\n'


def _table(one: Table) -> str:
    columns = list(zip(*one.rows, strict=True)) if one.rows else [()] * len(one.header)
    kinds = ["", *(f' class="{kind}"' if (kind := _kind(column)) else "" for column in columns[1:])]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(one.header, kinds, strict=True))
    lines = []
    for first, *rest in one.rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    note = f'<p class="note">{escape(one.note)}</p>' if one.note else ""
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody></table></div>{note}\n'
    if one.folded:
        return f"<details><summary>{escape(one.name)} ({len(one.rows)})</summary>{table}</details>\n"
    return f"<h3>{escape(one.name)}</h3>\n{table}"


def _kind(cells: Sequence[str]) -> str:
    """How a column is set: numbers at its right edge, texts wide."""
    if cells and all(not cell or _NUMBER.fullmatch(cell) for cell in cells):
        return "n"
    return "t" if any(len(cell) > _TEXT for cell in cells) else ""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
