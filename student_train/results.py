"""Results of ``student-train evaluate``: as a table, as JSON, and a benchmark's mean over tasks."""

from collections.abc import Sequence
from pathlib import Path

from online.figures import size, table
from store.manifest import Provenance
from store.strict import Strict, load_json, parse
from student_train.speed import Deployment
from student_train.tasks import TASKS


class Measured(Strict):
    """One model on one task."""

    folder: str
    fingerprint: str
    """Of the weights as they ran."""
    rows: int
    scores: dict[str, float]
    score: float
    """Mean of the official metrics."""
    deployment: Deployment


class Results(Strict):
    """What one command measured."""

    task: str
    files: tuple[str, ...]
    corpus: str
    """Fingerprint of the columns that were read."""
    limit: int | None
    rows: dict[str, object]
    """The options that rows were built with."""
    official: tuple[str, ...]
    benchmarks: tuple[str, ...]
    teacher: str | None
    """Folder of the model that agreement is with."""
    models: tuple[Measured, ...]
    made: Provenance


def read_results(path: Path) -> Results:
    """The file that ``--save`` wrote.

    Raises:
        ValueError: there is none, or it is something else.
    """
    try:
        tree = load_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no such results: {path}; student-train evaluate --save {path} writes them") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON of student-train evaluate: {error}") from None
    return parse(Results, tree, str(path))


def report(results: Results) -> str:
    """The scores of all models side by side, and what they take."""
    names = list(dict.fromkeys(name for model in results.models for name in model.scores))
    heads = [f"{name}*" if name in results.official else name for name in names]
    scores = [["model", "rows", *heads]]
    speeds = [["model", "parameters", "weights", "batch", "time", "rows/s"]]
    for model in results.models:
        cells = [f"{model.scores[name]:.4f}" if name in model.scores else "-" for name in names]
        scores.append([model.folder, f"{model.rows:,}", *cells])
        run = model.deployment
        times = ["-", "-"] if run.milliseconds is None else [f"{run.milliseconds:.1f} ms", f"{1000 * run.rows / run.milliseconds:.1f}"]
        speeds.append([model.folder, f"{run.parameters:,}", size(run.bytes), f"{run.rows} x {run.tokens} tokens", *times])
    run = results.models[0].deployment
    threads = f"{run.device}, {run.dtype}, {run.threads} {'thread' if run.threads == 1 else 'threads'}, median of {run.repeats}"
    compared = f"; agreement is with {results.teacher}" if results.teacher else ""
    title = f"{results.task}: {', '.join(results.files)} (* the task's own metrics{compared})"
    right = "123456789"
    return f"{title}\n{table(scores, right)}\n\ndeployment ({threads})\n{table(speeds, right)}"


def mean(found: Sequence[tuple[str, Results]]) -> str:
    """A benchmark's mean for each column of models: the k-th models of all files are one system's.

    A task's official metrics are averaged first, then its files (MNLI's matched and mismatched rows), then tasks.

    Args:
        found: name of the file, and what it holds.

    Raises:
        ValueError: files with different numbers of models.
    """
    systems = len(found[0][1].models)
    for name, results in found:
        if len(results.models) != systems:
            raise ValueError(f"{name} has {len(results.models)} models, {found[0][0]} has {systems}: measure the same ones on every task")
    of_tasks: dict[str, list[list[float]]] = {}
    for _, results in found:
        of_tasks.setdefault(results.task, []).append([model.score for model in results.models])
    scores = {task: [sum(column) / len(column) for column in zip(*files, strict=True)] for task, files in of_tasks.items()}
    lines = [["task", *(f"model {number}" for number in range(1, systems + 1))]]
    lines += [[task, *(f"{100 * score:.2f}" for score in row)] for task, row in scores.items()]
    means = [100 * sum(column) / len(column) for column in zip(*scores.values(), strict=True)]
    lines.append([f"mean of {len(scores)}", *(f"{value:.2f}" for value in means)])
    return "\n".join([table(lines, "123456789"), *_lacking(found)])


def _lacking(found: Sequence[tuple[str, Results]]) -> list[str]:
    """Which tasks each touched benchmark still has."""
    here = {results.task for _, results in found}
    lines = []
    for benchmark in ("superglue", "glue"):
        tasks = {name for name, task in TASKS.items() if benchmark in task.benchmarks}
        if here <= tasks:
            lacking = ", ".join(sorted(tasks - here))
            lines.append(f"{benchmark}: without {lacking}" if lacking else f"{benchmark}: all tasks")
    return lines
