"""The command ``student-train report``."""

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--save", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="Where the report goes.")
@click.option("--metric", default=None, help="Held-out score that ranks; -NAME: lower is better.  [default: the sweep's, or the recipe's]")
@click.option("--texts/--no-texts", default=True, help="Whether rows of the data are shown, in reports for those who may read them.")
def report(runs: tuple[Path, ...], save: Path, metric: str | None, texts: bool) -> None:
    """Say what RUNs (output folders of student-train run and sweep, finished or not) have come to.

    Writes FOLDER/report.html, one page that needs nothing else; the same as report.md with pictures/*.svg; and its tables as Parquet:
    runs, scores, comparisons, curves, correlations. An earlier report there is replaced. See docs/report.md.
    """
    from student_train.report.report import write_report
    from student_train.report.runs import load

    click.echo(str(write_report(load(runs, metric, texts), save)))
