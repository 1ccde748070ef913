"""The command ``student-train suggest``."""

from pathlib import Path

import click

EXAMPLE = """\b
student-train suggest --teacher teachers/sst2 --rows 67349 --length 25 --students 48 --disk 100GB
student-train suggest --teacher bert-base --student hidden_size=384 --student num_attention_heads=6 --tokens 1e9 --length 128
student-train suggest --teacher llama --store out/rows --student small-llama --hours 200 --json
"""


@click.command(epilog=EXAMPLE)
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="A teacher's folder; config.json is enough.")
@click.option(
    "--student",
    "students",
    multiple=True,
    metavar="OPTION=VALUE|FOLDER",
    help="What differs in the student's configuration, or the folder of a pretrained one.  [default: num_hidden_layers, halved]",
)
@click.option("--task", type=click.Choice(["classification", "regression", "masked_lm", "causal_lm"]), help="[default: the teacher's head]")
@click.option("--store", type=click.Path(path_type=Path), help="How much text: the rows of this store.")
@click.option("--rows", type=click.FloatRange(1), help="How much text, without a store: rows, or --tokens.")
@click.option("--tokens", type=click.FloatRange(1), help="Tokens in all.")
@click.option("--length", type=click.FloatRange(1), help="With --rows or --tokens: tokens of a row.  [default: 128]")
@click.option(
    "--students", "count", type=click.IntRange(1), default=1, show_default=True, help="How many are to be trained, seeds included."
)
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True, help="Of each phase of training.")
@click.option("--disk", metavar="BYTES", help="What a store may take: 500GB.  [default: anything]")
@click.option("--hours", type=click.FloatRange(0, min_open=True), help="What all of it may take of a device.  [default: anything]")
@click.option(
    "--flops",
    type=click.FloatRange(0, min_open=True),
    default=0.4 * 312e12,
    show_default="1.2e14, 40 % of an A100's peak",
    help="Operations a second that the device reaches; a CPU core about 5e10.",
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(0, min_open=True),
    default=3e9,
    show_default="3e9, a node's disk",
    help="Bytes a second at which features are read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes and seconds.")
def suggest(
    teacher: Path,
    students: tuple[str, ...],
    task: str | None,
    store: Path | None,
    rows: float | None,
    tokens: float | None,
    length: float | None,
    count: int,
    epochs: float,
    disk: str | None,
    hours: float | None,
    flops: float,
    bandwidth: float,
    as_json: bool,
) -> None:
    """Say which methods, features and start to try for a teacher and a budget, and whether to store features or compute them again.

    Every piece of advice names its source: a paper, or a table of ours with what it was measured on. What each method reads, its bytes
    and its recipe follow from configurations alone; no weights are read. What doesn't fit the two models is listed with the reason.
    docs/choosing.md has the advice as a page, with what is not known.
    """
    import json

    from online.figures import read_bytes
    from student_train.break_even import Rates
    from student_train.suggestion import Asked, suggest
    from student_train.suggestion_report import plain, report

    if (store is None) == (rows is None and tokens is None) or (rows is not None and tokens is not None):
        raise click.UsageError("expected one of --store, --rows and --tokens: how much text is there?")
    if store is not None and length is not None:
        raise click.UsageError("--length goes with --rows or --tokens; a store knows its rows")
    room = None if disk is None else read_bytes(disk)
    if disk is not None and room is None:
        raise click.UsageError(f"--disk: expected bytes such as 500GB or 1.5TB, found {disk!r}")
    folders = [one for one in students if "=" not in one]
    if folders and len(students) > 1:
        raise click.UsageError("--student: expected OPTION=VALUE, once for each option, or one folder")
    asked = Asked(
        teacher=teacher,
        store=store,
        rows=rows,
        tokens=tokens,
        length=length or 128.0,
        changes=() if folders else students,
        student=Path(folders[0]) if folders else None,
        task=task,
        students=count,
        epochs=epochs,
        disk=room,
        hours=hours,
        rates=Rates(flops, bandwidth),
    )
    found = suggest(asked)
    click.echo(json.dumps(plain(found), indent=1) if as_json else "\n".join(report(found)))
