"""The commands ``student-train evaluate`` and ``student-train mean``."""

from pathlib import Path
from typing import Literal

import click

TASKS_EPILOG = """\b
Tasks:
  superglue: boolq cb copa multirc record rte wic wsc
  glue: cola mnli mrpc qnli qqp rte sst2 stsb
  language models: mlm causal (column: text)
Columns of their files and metrics: docs/evaluation.md
"""


@click.command(epilog=TASKS_EPILOG)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=click.Path(path_type=Path))
@click.option("--task", "name", required=True, metavar="NAME", help="What is measured; see below.")
@click.option(
    "--data",
    "files",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Parquet, JSON lines or CSV file. May be given again.",
)
@click.option("--teacher", type=click.Path(path_type=Path), help="Measure this model too, and how far the others agree with it.")
@click.option("--limit", type=click.IntRange(min=1), help="Measure on the first rows only; a group is never cut.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="An option of rows, such as max_length=64. May be given again.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU.  [default: those of torch]")
@click.option("--batch", "batch_rows", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of the batch that is timed.")
@click.option("--repeats", type=click.IntRange(min=0), default=10, show_default=True, help="How often it is timed; 0: not at all.")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the results as JSON.")
def evaluate(
    models: tuple[Path, ...],
    name: str,
    files: tuple[str, ...],
    teacher: Path | None,
    limit: int | None,
    changes: tuple[str, ...],
    device: Literal["cpu", "cuda"],
    dtype: Literal["float32", "bfloat16", "float16"],
    threads: int | None,
    batch_rows: int,
    repeats: int,
    save: Path | None,
) -> None:
    """Measure each MODEL (a Hugging Face folder, or that of a student, its phase, or a run with one phase) on the rows of a task.

    Rows are built in memory as a store's would be; no store is needed. Prints the task's metrics, calibration, agreement with the
    teacher, and parameters, size and time of a batch.

    student-train evaluate students/kd --teacher teachers/sst2 --task sst2 --data data/tasks/sst2_dev.parquet
    """
    from store.publish import replace
    from student_train.evaluation import Asked, measure
    from student_train.results import report

    asked = Asked(name, files, teacher, limit, changes, device, dtype, threads, batch_rows, repeats)
    if save is not None and not save.absolute().parent.is_dir():
        raise ValueError(f"--save: expected a folder at {save.absolute().parent}, found none")
    results = measure(models, asked)
    click.echo(report(results))
    if save is not None:
        replace(save, (results.model_dump_json(indent=1) + "\n").encode())


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
def mean(files: tuple[Path, ...]) -> None:
    """Print a benchmark's mean over tasks from RESULTS, files that `evaluate --save` wrote.

    The first models of all files are one system's, the second another's, and so on. A task's metrics are averaged first.
    """
    from student_train.results import mean as over_tasks
    from student_train.results import read_results

    click.echo(over_tasks([(str(file), read_results(file)) for file in files]))
