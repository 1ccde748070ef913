"""The command ``student-train plan``."""

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--on", "machine", metavar="MACHINE", help="8x40GB, 8xA100-40GB, 2xH100.  [default: the GPUs of this machine]")
@click.option("--phase", default=None, help="This phase alone.  [default: all]")
@click.option("--ranks", multiple=True, type=click.IntRange(1), help="A job of so many ranks; may be given again.  [default: all divisors]")
@click.option("--length", type=click.IntRange(1), help="Tokens of a row, where the store is not there yet.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="[PASS=]FOLDER",
    help="A teacher's folder, for stores and passes that are not made yet; config.json is enough. May be given again, for other passes.",
)
@click.option("--nodes", type=click.IntRange(1), help="Machines that the ranks are spread over.  [default: one for each 8]")
@click.option("--utilisation", type=click.FloatRange(0, 1, min_open=True), help="Part of the peak FLOP/s that is reached.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="Peak FLOP/s of a rank: 312e12.")
@click.option("--link", type=click.FloatRange(0, min_open=True), help="Bytes/s that a rank receives from those of its node: 300e9.")
@click.option("--host-memory", type=click.FloatRange(0, min_open=True), help="Bytes of main memory of a node: 1e12.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes and seconds.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    machine: str | None,
    phase: str | None,
    ranks: tuple[int, ...],
    length: int | None,
    teachers: tuple[str, ...],
    nodes: int | None,
    utilisation: float | None,
    flops: float | None,
    link: float | None,
    host_memory: float | None,
    as_json: bool,
) -> None:
    """Say what the phases of RECIPE take of a machine in every way that student and teachers can lie over its ranks.

    For each number of ranks, teacher sharding, student engine and offload: memory that tensors take of a device (allocated) and
    that torch takes for them (cached), main memory, and time of a row; which of them fit; and what to try first, in GKD's order:
    optimiser states and gradients, then weights, then offload. Configurations are read and nothing else: no weights, and no GPU.
    """
    import json

    from online.machines import UTILISATION, this_machine
    from store.strict import load_yaml
    from student_train.plan import Wanted
    from student_train.plan import plan as work_out
    from student_train.plan_report import plain, report
    from student_train.recipe import TrainRecipe

    loaded = load_yaml(TrainRecipe, recipe, overrides)
    folders = {
        name if equals else "": Path(folder if equals else name) for name, equals, folder in (one.partition("=") for one in teachers)
    }
    given = {"flops": flops, "link": link, "host_memory": host_memory}
    known = {name: value for name, value in given.items() if value is not None}
    wanted = Wanted(machine or this_machine(), ranks, length, nodes, utilisation or UTILISATION, known)
    phases = loaded.phases if phase is None else (loaded.phase(phase),)
    plans = [work_out(loaded, chosen, wanted, folders) for chosen in phases]
    if as_json:
        click.echo(json.dumps([plain(found) for found in plans], indent=1))
        return
    click.echo("\n\n".join("\n".join(report(found)) for found in plans))
