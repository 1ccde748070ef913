"""The program ``teacher-dump``: run a teacher once and keep its answers in a store.

torch is imported inside the commands that need it, so that ``--help``, ``status`` and ``verify`` answer at once.
"""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from store.errors import StoreError
from teacher_dump.import_commands import imports
from teacher_dump.last_words import LastWords, RanksFailed
from teacher_dump.plan_command import plan
from teacher_dump.remote_commands import download, upload
from teacher_dump.stopping import EXIT, GRACE, Stopped
from teacher_dump.store_commands import add, copy, diff, drop, graft, merge

USAGE = 2
"""Exit code of anything a user can mend."""
INTERRUPTED = 130

EXAMPLE = """\b
A recipe is a YAML file:
  store: bert-store              # folder to write
  pass_name: bert                # name of this teacher's answers in it
  teacher: {model: path/to/hugging-face-folder, head: masked_lm}
  rows: ...                      # which texts become which model inputs
  features: [hidden.6@all, "attention_probs.*", lm_logits@labels:top8]
  dtype: bfloat16                # stored type; float32 is exact
"""

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
_STORE = click.argument("store", type=click.Path(path_type=Path))


@click.group(epilog="TEACHER-DUMP COMMAND --help explains each command.", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="teachercache")
@click.option(
    "--local_rank",
    "--local-rank",
    "_local_rank",
    hidden=True,
    expose_value=False,
    help="As launchers add it; the environment says the same.",
)
def program() -> None:
    """Run a teacher once and keep its logits, word predictions and features in a store that students learn from."""


@program.command(epilog=EXAMPLE)
@_RECIPE
@_OVERRIDES
@click.option("--nproc", default=1, show_default=True, type=click.IntRange(1), help="Start so many ranks on this machine.")
@click.option(
    "--grace", default=GRACE, show_default=True, type=click.FloatRange(0), help="Seconds after SIGTERM in which shards are still finished."
)
def run(recipe: Path, overrides: tuple[str, ...], nproc: int, grace: float) -> None:
    """Make the store that RECIPE describes, or go on where an earlier run stopped.

    Rows are built first where the store has none. Then the teacher answers shard after shard, and each is committed as
    a whole: a run that is interrupted, killed or out of disk loses nothing committed, and the same command goes on.
    A second recipe with another pass_name adds another teacher's answers, or more features, to the same rows.
    Started several times over one store, by hand or by a scheduler, the runs share the shards between them.

    A teacher that is sharded over n ranks (`sharding` in the recipe) needs n of them, or a multiple: --nproc starts them on
    this machine; torchrun, deepspeed and SLURM start them on many (docs/pass.md).

    Options of the recipe can be set on the command line: teacher-dump run dump.yaml dtype=float16 batch_tokens=8192
    """
    from teacher_dump.dump import check_complete, dump
    from teacher_dump.recipe import load

    what = load(recipe, overrides)
    if nproc == 1:
        summary = dump(what, _command(), grace)
        if os.environ.get("RANK", "0") == "0":
            click.echo(summary)
        return
    from teacher_dump.launch import launch

    try:
        launch(nproc, ["-m", "teacher_dump.cli", "run", f"--grace={grace}", "--", str(recipe), *overrides], grace)
    except Stopped:
        check_complete(what.store, what.pass_name)


@program.command(epilog=EXAMPLE)
@_RECIPE
@_OVERRIDES
def rows(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Build the rows of RECIPE without any features.

    Students that learn from a live teacher, and phases without a teacher, read such a store. Of the teacher only the
    configuration and the tokenizer are loaded. `run` with the same recipe adds the features later.
    """
    from teacher_dump.dump import build_rows
    from teacher_dump.recipe import load

    click.echo(build_rows(load(recipe, overrides), _command()))


@program.command()
@_RECIPE
@_OVERRIDES
def augment(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make the corpus file that RECIPE describes: training texts, and copies of them with words replaced (TinyBERT).

    It is a Parquet file with all columns of the texts, each record before its copies; a recipe of `run` or `rows` names it in
    rows.sources as any other file. One process makes it. It has its name when it is whole: one that was stopped is begun anew,
    one that is there is left as it is, or refused if it was made of something else (docs/augmentation.md).
    """
    from teacher_dump.augment import augment as make
    from teacher_dump.augment import load

    click.echo(make(load(recipe, overrides)))


@program.command()
@_RECIPE
@_OVERRIDES
def generate(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Make the corpus file that RECIPE describes: prompts, and responses that a causal teacher writes to them.

    Students of any tokenizer learn from such text, as from any other (sequence-level distillation). It is a Parquet file with the columns
    prompt, response, ended, original and sample; a recipe of `run` or `rows` names it in rows.sources. One process makes it. One that was
    stopped goes on; a file that is there is left as it is, or refused if it was made of something else (docs/causal.md).
    """
    from teacher_dump.generate import generate as make
    from teacher_dump.generate import load

    click.echo(make(load(recipe, overrides)))


@program.command()
@_STORE
def status(store: Path) -> None:
    """Show what STORE holds: its rows, its passes, how far each is, and what they weigh on disk."""
    from teacher_dump.status import status as describe

    click.echo(describe(store))


@program.command()
@_STORE
@click.option("--full/--fast", default=True, show_default=True, help="Read every byte, or only sizes, indexes and lists of checksums.")
@click.option("--repair", is_flag=True, help="Take damaged shards back, so that the next `run` makes them again; free what is not in use.")
def verify(store: Path, full: bool, repair: bool) -> None:
    """Check every committed file of STORE against its size and checksums; exit code 2 if anything is damaged.

    Shards are independent: a damaged one costs its own tokens only. With --repair it is taken back and the same
    `teacher-dump run` that made the store makes it again; everything else stays as it is. What killed commands and
    dropped features have left is removed with it. A repair that is stopped is finished by the next one.

    --fast finds what is missing, cut short or another file, without reading the data: flipped bits stay for --full.
    """
    from teacher_dump.verify import verify as check

    whole, report = check(store, repair, full)
    click.echo(report)
    if not whole:
        sys.exit(USAGE)


@program.command()
@_STORE
@click.option("--rows", "count", default=3, show_default=True, type=click.IntRange(1), help="How many rows to show.")
@click.option("--from", "start", default=0, show_default=True, type=click.IntRange(0), help="Number of the first one.")
@click.option("--pass", "pass_name", default=None, help="Only the answers of this pass.")
def show(store: Path, count: int, start: int, pass_name: str | None) -> None:
    """Print a few rows of STORE as text, with what the teacher answered for each.

    Task logits are shown as probabilities, word predictions as the likeliest words, hidden features as their norms.
    """
    from teacher_dump.show import show as render

    click.echo(render(store, count, start, pass_name))


@program.command()
@_STORE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "kind", required=True, type=click.Choice(["parquet", "safetensors", "hidden-states"]), help="See above.")
@click.option("--pass", "passes", multiple=True, help="Only the answers of this pass; may be given again.  [default: all]")
@click.option("--features", multiple=True, help="Only this stored feature, such as bert/hidden.6@all; may be given again.")
@click.option("--split", default=None, help="Only rows of this split.")
@click.option("--rows", "of_rows", default=None, metavar="FIRST:AFTER", help="Only rows from FIRST on and before AFTER.")
def export(
    store: Path,
    out: Path,
    kind: Literal["parquet", "safetensors", "hidden-states"],
    passes: tuple[str, ...],
    features: tuple[str, ...],
    split: str | None,
    of_rows: str | None,
) -> None:
    """Write features of STORE to the new folder OUT for other programs. An export that was cut short goes on.

    \b
    parquet        a file for each shard, a row for each row, features as lists of float32: pandas, DuckDB, datasets
    safetensors    a file for each shard, all rows one after the other, the stored bits under their true types
    hidden-states  hs_<i>.safetensors for each row, its tokens and its hidden states, as speculators reads them
    """
    from teacher_dump.export import export_store

    click.echo(export_store(store, out, kind, passes, features, split, of_rows))


program.add_command(imports)
for command in (plan, add, merge, graft, drop, copy, diff, upload, download):
    program.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; exits with 2 where something is to be mended (one message on standard error), with 130 when interrupted,
    with 143 where SIGTERM has stopped it, and as the first of its ranks that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        program.main(arguments, prog_name="teacher-dump", standalone_mode=False, obj=("teacher-dump", *arguments))
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except click.Abort:
        LastWords("stopped; what is committed is kept. The same command goes on where this one was.", INTERRUPTED).end()
    except Stopped as stopped:
        LastWords(str(stopped), EXIT, follows=True).end()
    except RanksFailed as failed:
        LastWords(str(failed), failed.code).end()
    except (StoreError, ValueError) as error:
        LastWords(f"error: {error}", USAGE, _follows(error)).end()
    except MemoryError as error:
        LastWords(f"error: out of memory{f' ({error})' if str(error) else ''}; what is committed is kept", USAGE).end()
    except OSError as error:
        room = "; make room and run the same command again, what is committed is kept" if error.errno == errno.ENOSPC else ""
        LastWords(f"error: {error}{room}", USAGE).end()


def _follows(error: Exception) -> bool:
    """Whether an error only says that another rank has failed."""
    ranks = sys.modules.get("online.ranks")  # not imported for this: it takes torch
    return ranks is not None and isinstance(error, ranks.RankLost)


def _command() -> tuple[str, ...]:
    """The command line, for the record of how an output was made."""
    command: tuple[str, ...] = click.get_current_context().obj
    return command


if __name__ == "__main__":
    main()
