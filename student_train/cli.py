"""The program ``student-train``: train students from a store of a teacher's features.

torch is imported inside the commands that need it, so that ``--help`` answers at once.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from store.errors import StoreError
from student_train.evaluate_command import evaluate, mean
from student_train.export_command import export
from student_train.plan_command import plan
from student_train.report_command import report
from student_train.suggest_command import suggest
from student_train.sweep_command import sweep

USAGE = 2
"""Exit code of anything a user can mend."""
INTERRUPTED = 130

EXAMPLE = """\b
A recipe is a YAML file:
  output: students                    # folder for checkpoints, curves and results
  phases:
    - name: kd
      student: {layers: [2, 4, 6]}    # three of the teacher's blocks
      data: [{store: bert-store, pass_name: bert}]
      methods: [{name: hid_seq}, {name: kd, weight: 0.5}]
      evaluate: [{store: bert-store, split: dev, pass_name: bert}]
      metrics: [accuracy, agreement]
      epochs: 3
"""
CHAIN_EXAMPLE = """\b
A chain is a YAML file; paths are relative to the folder that the chain is started in:
  steps:
    - {dump: dump.yaml, nproc: 8}                    # teacher-dump run dump.yaml --nproc 8
    - {train: train.yaml, phase: assistant}          # student-train run train.yaml --phase assistant
    - {dump: assistant.yaml, set: [dtype=float16]}   # its teacher is OUTPUT/assistant/student
    - {train: train.yaml, phase: student}
Further steps: {rows: RECIPE}, {augment: RECIPE}, {generate: RECIPE}, {add: RECIPE}. See docs/chains.md.
"""

_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")


@click.group(epilog="STUDENT-TRAIN COMMAND --help explains each command.", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="teachercache")
def program() -> None:
    """Train students from a store of a teacher's features; the teacher itself is not needed any more."""


@program.command(epilog=EXAMPLE)
@_RECIPE
@_OVERRIDES
@click.option("--phase", default=None, help="Train this phase alone; those that it starts from must be finished.")
@click.option(
    "--smoke", is_flag=True, help="Try the recipe: three steps of every phase, measured on few rows, into a folder that is removed."
)
def run(recipe: Path, overrides: tuple[str, ...], phase: str | None, smoke: bool) -> None:
    """Train the phases of RECIPE in their order, or go on where an earlier run stopped.

    Everything is checked before the first phase starts, down to the features that the last one reads. Each phase runs
    in a process of its own and ends in OUTPUT/PHASE/student, a plain Hugging Face folder. Finished phases are skipped;
    an interrupted one goes on from its newest whole checkpoint, with the losses it would have had.

    Several processes train one phase in each launch:
    torchrun --nproc-per-node=2 -m student_train.cli run RECIPE --phase NAME

    Options of the recipe can be set on the command line: student-train run train.yaml seed=1 phases.0.batch_rows=16
    """
    from store.strict import load_yaml
    from student_train.recipe import TrainRecipe
    from student_train.run import PhaseError
    from student_train.run import run as train
    from student_train.run import smoke as try_out

    if smoke and phase is not None:
        raise ValueError("--smoke tries all phases: leave --phase out")
    loaded = load_yaml(TrainRecipe, recipe, overrides)
    try:
        if smoke:
            try_out(loaded, _command())
            click.echo(f"{recipe}: {len(loaded.phases)} phases work")
        else:
            train(loaded, _command(), phase)
    except PhaseError as error:  # the phase's own process has said what went wrong
        sys.exit(error.code)


@program.command(hidden=True)
@_RECIPE
@click.argument("name")
def phase(recipe: Path, name: str) -> None:
    """Train phase NAME of a resolved RECIPE whose run was checked and begun by `run`."""
    from store.strict import load_yaml
    from student_train.outline import outline
    from student_train.output import read_run
    from student_train.recipe import TrainRecipe
    from student_train.run import train_phase

    loaded = load_yaml(TrainRecipe, recipe)
    train_phase(loaded, outline(loaded, loaded.phase(name)), read_run(loaded.output))


@program.command(epilog=CHAIN_EXAMPLE)
@click.argument("chain", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--print", "only_print", is_flag=True, help="Print the command of each step for a shell, and run none.")
def chain(chain: Path, overrides: tuple[str, ...], only_print: bool) -> None:
    """Run the steps of CHAIN in their order, each in a process of its own, or go on where an earlier run stopped.

    A phase's student is the next dump's teacher: its recipe names OUTPUT/PHASE/student, which an earlier step makes. All
    recipes are read before the first step starts. Each program skips what it has done already, so a chain that was
    stopped goes on with the same command. A step that fails ends the chain with its exit code.

    Options of the chain can be set on the command line: student-train chain chain.yaml steps.0.nproc=4
    """
    import shlex

    from store.strict import load_yaml
    from student_train.chain import Chain, check
    from student_train.chain_run import StepError, run_chain

    loaded = load_yaml(Chain, chain, overrides)
    check(loaded)
    if only_print:
        for step in loaded.steps:
            click.echo(shlex.join(step.words))
        return
    try:
        run_chain(loaded)
    except StepError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.code)


@program.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="[PASS=]FOLDER",
    help="A teacher's folder, for stores and passes that are not made yet; config.json is enough. May be given again, for other passes.",
)
def needs(recipes: tuple[Path, ...], teachers: tuple[str, ...]) -> None:
    """Print what a dump must hold for all RECIPES to run, as lines for a dump recipe.

    One YAML document for each teacher pass: its store, its features (each once, over all recipes), and the blocks that
    students start from. Follows from the shapes of teacher and students; no weights are read.
    """
    from store.strict import load_yaml
    from student_train.needs import needs as lines
    from student_train.recipe import TrainRecipe

    folders: dict[str, Path] = {}
    for given in teachers:
        pass_name, equals, folder = given.partition("=")
        folders[pass_name if equals else ""] = Path(folder if equals else given)
    click.echo(lines([load_yaml(TrainRecipe, recipe) for recipe in recipes], folders), nl=False)


@program.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--teacher",
    default=None,
    type=click.Path(path_type=Path),
    help="A teacher's folder, config.json is enough: show what a dump of what each method reads of it costs.",
)
@click.option(
    "--student",
    "changes",
    multiple=True,
    metavar="OPTION=VALUE",
    help="With --teacher: what differs in the student's configuration, such as hidden_size=192.  [default: num_hidden_layers, halved]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the options as a JSON schema.")
def methods(names: tuple[str, ...], teacher: Path | None, changes: tuple[str, ...], as_json: bool) -> None:
    """List all methods, or print those NAMEd in full: what they learn from, what they accept, and their options.

    With --teacher the list says, before anything is dumped, how many bytes a token, row or labelled token the default options of each
    method need of that teacher, and which methods refuse it or the student, and why.
    """
    import json

    from student_train.listing import page, plain, table
    from student_train.method_reads import pair_of
    from student_train.methods import METHODS

    if changes and teacher is None:
        raise click.UsageError("--student goes with --teacher FOLDER")
    pair = None if teacher is None else pair_of(teacher, changes)
    if as_json:
        click.echo(json.dumps(plain(names or tuple(METHODS), pair), indent=1))
        return
    click.echo("\n\n\n".join(page(name, pair) for name in names) if names else table(pair))


program.add_command(plan)
program.add_command(export)
program.add_command(suggest)
program.add_command(sweep)
program.add_command(evaluate)
program.add_command(mean)
program.add_command(report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 done, 2 something to mend (one message on standard error), 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("student_train").setLevel(logging.INFO)
    try:
        program.main(arguments, prog_name="student-train", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; the same command goes on from the newest checkpoint.", err=True)
        sys.exit(INTERRUPTED)
    except (StoreError, ValueError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(USAGE)


def _command() -> tuple[str, ...]:
    """The command line, for the record of how an output was made."""
    return ("student-train", *sys.argv[1:])


if __name__ == "__main__":
    main()
