"""The command ``student-train sweep``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from student_train.sweep import Sweep, Trial

FAILED = 1
"""Exit code of a sweep that is over, and some of whose trials failed."""

EXAMPLE = """\b
A sweep is a YAML file; paths are relative to the folder that it is started in:
  recipe: train.yaml                  # what student-train run takes
  output: out/sweep
  search:
    method:                           # alternatives by name: keys that are set together
      kd:  {phases.0.methods: [{name: kd}]}
      pkd: {phases.0.methods: [{name: kd}, {name: pkd, weight: 50}]}
    phases.0.trainer.learning_rate: [2.0e-5, 5.0e-5]
  seeds: [0, 1, 2]
  metric: accuracy                    # -task_kl: lower is better
  devices: [cuda:0, cuda:1]           # a trial at a time on each
To search instead of trying all:
    phases.0.trainer.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
  sampler: tpe                        # or random
  trials: 30                          # combinations to propose
  pruner: median                      # ends poor ones early
See docs/sweeps.md.
"""


@click.command(epilog=EXAMPLE)
@click.argument("sweep", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--print", "only_print", is_flag=True, help="Print the trials, and train none.")
@click.option("--retry", is_flag=True, help="Try those trials again that have failed.")
def sweep(sweep: Path, overrides: tuple[str, ...], only_print: bool, retry: bool) -> None:
    """Train combinations of the values in SWEEP with every seed, and rank them; or go on where an earlier sweep stopped.

    All combinations of a grid are tried; from ranges a sampler proposes what to try next. Before the first one trains they are checked (of
    a search its corners), down to the features that stores must hold. Each trial is a process of its own, student-train run on
    OUTPUT/recipes/TRIAL.yaml. Finished trials are skipped, interrupted ones go on from their checkpoints. The same command in other
    terminals, or on other machines that see the same folders, joins in. A trial that fails is recorded in OUTPUT/trials.json, and the
    others go on; the exit code is then 1.
    """
    from store.strict import load_yaml, read_yaml
    from student_train.sweep import Sweep, trials, trials_of

    loaded = load_yaml(Sweep, sweep, overrides)
    tried = trials(loaded)
    if only_print:
        click.echo("\n".join(_listed(loaded, tried)))
        return
    from student_train.ranking import table
    from student_train.study import known
    from student_train.sweep_check import check_sweep
    from student_train.sweep_run import run_sweep

    base = read_yaml(loaded.recipe)
    check_sweep(loaded, [*tried, *(trial for choice in known(loaded) for trial in trials_of(loaded, base, choice))])
    rows = run_sweep(loaded, retry=retry)
    if not rows:
        raise ValueError("search: no combination that was proposed makes a recipe; the lines above say why")
    click.echo(table(rows, loaded.metric))
    if failed := [row for row in rows if row.state == "failed"]:
        click.echo(f"{len(failed)} of {len(rows)} trials failed: see trials.json and logs/ in {loaded.output}; --retry tries them again")
        sys.exit(FAILED)


def _listed(sweep: "Sweep", tried: "Sequence[Trial]") -> list[str]:
    """A grid's trials; of another sweep what it searches and the corners that are checked beforehand."""
    from student_train.search import NumberRange, labels
    from student_train.sweep import combination

    if sweep.sampler == "grid":
        return [f"{number}  {trial}  {trial.name}" for number, trial in enumerate(tried, 1)]
    seeds = f"seed{'s' if len(sweep.seeds) > 1 else ''} {', '.join(map(str, sweep.seeds))}"
    searched = [f"  {key}: {one if isinstance(one, NumberRange) else ', '.join(labels(one))}" for key, one in sweep.search.items()]
    corners = [f"  {combination(trial.parameters)}" for trial in tried if trial.seed == sweep.seeds[0]]
    return [f"{sweep.sampler} proposes {sweep.trials} combinations, each with {seeds}:", *searched, "checked before that:", *corners]
