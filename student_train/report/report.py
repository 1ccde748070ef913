"""A report on disk: ``report.html``, ``report.md`` with ``pictures/``, and a Parquet file for each table."""

from importlib.metadata import version
from pathlib import Path

from store.publish import make_folder, replace
from student_train.parquet_file import write_parquet
from student_train.report.drawing import style, svg, svg_file
from student_train.report.markdown import PICTURES, markdown
from student_train.report.page import page
from student_train.report.runs import Runs
from student_train.report.sections import SECTIONS
from student_train.report.tables import tables

PAGE = "report.html"


def write_report(runs: Runs, folder: Path) -> Path:
    """Write all of it to ``folder``, over an earlier report; returns the page.

    Raises:
        ValueError: the folder holds something else, or a file of a run is damaged.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).is_file()):
        raise ValueError(f"--save: expected an earlier report, a folder that is empty or nothing, found something else at {folder}")
    with style():
        sections = [section for make in SECTIONS if (section := make(runs)) is not None]
        drawn = {picture.name: svg(picture.figure, picture.name) for section in sections for picture in section.pictures}
    about = _title(runs), _lead(runs), sections, _footer(runs)
    make_folder(folder / PICTURES)
    for old in (folder / PICTURES).glob("*.svg"):
        old.unlink()
    for name, text in drawn.items():
        replace(folder / PICTURES / f"{name}.svg", svg_file(text).encode())
    for name, table in tables(runs).items():
        write_parquet(folder / f"{name}.parquet", table)
    replace(folder / "report.md", markdown(*about).encode())
    replace(folder / PAGE, page(*about, drawn).encode())
    return folder / PAGE


def _title(runs: Runs) -> str:
    methods, models = len({run.method for run in runs.all}), len(runs.all)
    if models == 1:
        return f"{runs.all[0].method}: one run"
    return f"{models} runs of {methods} method{'s' if methods > 1 else ''}, by {runs.metric}"


def _lead(runs: Runs) -> str:
    sources = dict.fromkeys(f"sweep {run.sweep.name}" if run.sweep is not None else f"run {run.name}" for run in runs.all)
    states = {state: sum(run.state == state for run in runs.all) for state in dict.fromkeys(run.state for run in runs.all)}
    return f"{', '.join(sources)} — {', '.join(f'{count} {state}' for state, count in states.items())}"


def _footer(runs: Runs) -> str:
    """What trained the students, and what wrote the report."""
    made = [run.phase.result["made"]["versions"] for run in runs.all if run.phase is not None and run.phase.result is not None]
    used = sorted({f"{name} {number}" for versions in made for name, number in versions.items()})
    trained = f"Students were trained with {', '.join(used)}. " if used else ""
    written = f"Report of student-train, teachercache {version('teachercache')}."
    return f"{trained}{written} The tables beside it hold all numbers: runs, scores, comparisons, curves, correlations."
