"""Commands of ``teacher-dump`` for stores as a whole: add rows, merge, drop, copy, compare."""

import os
import sys
from pathlib import Path
from typing import get_args

import click

from store.features import Compression, StoreDtype
from teacher_dump.stopping import GRACE

DIFFERENT = 1
"""Exit code of `diff` for stores that are not the same."""

_POSITIONS = click.Choice(["first", "last", "mean", "masked", "labels"])


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--rows-only", is_flag=True, help="Add rows and answer nothing yet.")
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(1), help="Start so many ranks on this machine.")
@click.option(
    "--grace", default=GRACE, show_default=True, type=click.FloatRange(0), help="Seconds after SIGTERM in which shards are still finished."
)
def add(recipe: Path, overrides: tuple[str, ...], rows_only: bool, nproc: int, grace: float) -> None:
    """Add what RECIPE describes to its store: rows, another teacher, or more features. What is there stays as it is.

    \b
    more rows      texts in rows.sources that the store lacks: their rows come behind the others, and the pass answers
                   them. Other passes then lack shards, with which `run` and the recipe of each go on.
    a teacher      a pass_name that the store lacks: answered over all rows, as `run` would.
    more features  the pass_name of a pass, and features that neither are in it nor follow from it: they make a further
                   pass, NAME-2, NAME-3 and so on. Students read them as one: pass_name: [NAME, NAME-2].

    The store may be read meanwhile. An add that was stopped goes on with the same command.
    """
    from teacher_dump.add import add as add_all
    from teacher_dump.add import add_rows
    from teacher_dump.recipe import load

    what = load(recipe, overrides)
    if rows_only:
        click.echo(add_rows(what, made_by()))
    elif nproc == 1:
        summary = add_all(what, made_by(), grace)
        if os.environ.get("RANK", "0") == "0":
            click.echo(summary)
    else:
        from teacher_dump.launch import launch

        launch(nproc, ["-m", "teacher_dump.cli", "add", f"--grace={grace}", "--", str(recipe), *overrides], grace)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--pass", "pass_name", required=True, help="The pass of SOURCE.")
def graft(source: Path, store: Path, pass_name: str) -> None:
    """Give STORE what a pass of SOURCE says of whole rows: task logits, sentence vectors.

    Both are made of the same texts, and may be of different tokenizers: a student then learns task logits from a teacher whose words
    it doesn't share (docs/causal.md). Rows are matched by the record that they are of. One that was stopped goes on.
    """
    from tqdm import tqdm

    from store.graft import graft as give

    with tqdm(unit="shard", delay=0.5) as progress:

        def tick(done: int, total: int) -> None:
            progress.total = total
            progress.update(1)

        features = give(source, pass_name, store, tick)
    click.echo(f"{store}: pass {pass_name} has {', '.join(features)} of {source}")


@click.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path))
def merge(new: Path, stores: tuple[Path, ...]) -> None:
    """Make the new store NEW of the rows and passes of STORES, in this order.

    Their rows must be built in the same way from different texts, and passes of one name must be the same teacher's
    answers. Files become hard links, so that the new store takes no disk; across file systems they are copied. The
    stores stay as they are, and may be removed afterwards.
    """
    from teacher_dump.merge import merge_stores

    click.echo(merge_stores(new, stores, made_by()))


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("targets", nargs=-1, required=True, metavar="PASS[/FEATURE]...")
@click.option("--force", is_flag=True, help="Also where requested features are derived from those, and are lost with them.")
def drop(store: Path, targets: tuple[str, ...], force: bool) -> None:
    """Remove passes (bert) or stored features (bert/hidden.6@all, 'bert/hidden.*') from STORE, and free their disk.

    A drop that was stopped is finished by the next one, or by `verify --repair`.
    """
    from teacher_dump.drop import drop_from

    click.echo(drop_from(store, targets, force, made_by()))


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--pass", "passes", multiple=True, help="Only the answers of this pass; may be given again.  [default: all]")
@click.option("--features", multiple=True, help="Only this stored feature, such as bert/hidden.6@all; may be given again.")
@click.option("--split", default=None, help="Only rows of this split.")
@click.option("--rows", "of_rows", default=None, metavar="FIRST:AFTER", help="Only rows from FIRST on and before AFTER.")
@click.option(
    "--positions",
    default=None,
    type=click.Choice(["first", "last", "mean", "masked", "labels"]),
    help="Reduce features of all tokens to these.",
)
@click.option("--dtype", default=None, type=click.Choice(get_args(StoreDtype)), help="Keep numbers in this type.")
@click.option("--keep-bits", default=None, type=int, metavar="N", help="Round them to so many mantissa bits.")
@click.option("--compression", default=None, type=click.Choice(get_args(Compression)), help="Compress features, or no more.")
def copy(
    source: Path,
    new: Path,
    passes: tuple[str, ...],
    features: tuple[str, ...],
    split: str | None,
    of_rows: str | None,
    positions: str | None,
    dtype: StoreDtype | None,
    keep_bits: int | None,
    compression: Compression | None,
) -> None:
    """Copy the store SOURCE to the new folder NEW: all of it, or some rows, passes and features, or kept in another way.

    What stays as it is becomes hard links and takes no disk. A copy that was stopped goes on; one of a store whose dump
    goes on takes over what was added since. A store of an older schema is written in today's.
    """
    from store.recode import Keeping
    from teacher_dump.copy import copy_store

    keeping = Keeping(dtype, keep_bits, compression, positions)
    click.echo(copy_store(source, new, passes, features, split, of_rows, keeping, made_by()))


@click.command()
@click.argument("one", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--pass", "passes", multiple=True, metavar="NAME[=OTHER]", help="Only this pass, which OTHER may have under another name.")
def diff(one: Path, other: Path, passes: tuple[str, ...]) -> None:
    """Compare two stores, row by row and number by number; exit code 0 if they hold the same, 1 if not.

    Numbers are compared as they are read back, however they are stored: "max abs" is the largest difference, "max rel"
    the largest in relation to the number of the store ONE, "rms rel" the norm of all differences in relation to that of all numbers.
    """
    from teacher_dump.diff import compare

    same, report = compare(one, other, passes)
    click.echo(report)
    if not same:
        sys.exit(DIFFERENT)


def made_by() -> tuple[str, ...]:
    """The command line, for the record of how an output was made."""
    command: tuple[str, ...] = click.get_current_context().obj
    return command
