"""The command ``teacher-dump plan``: measured here, or calculated for another machine."""

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--measure/--no-measure", default=None, help="Run a few real batches, or read the teacher's configuration alone.  [default: measure]"
)
@click.option("--ranks", type=click.IntRange(1), help="Measured: calculate other shardings for so many ranks.  [default: all there are]")
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Measured: start so many ranks on this machine.")
@click.option("--on", "machine", metavar="MACHINE", help="Calculate for a machine that is not here: 8x40GB, 8xA100-40GB, 16xH100.")
@click.option("--tokens", type=click.FloatRange(1), help="With --on: how much text, where it is not here: 10e9.")
@click.option("--length", type=click.IntRange(1), help="With --tokens: tokens of a row.  [default: the recipe's max_length]")
@click.option("--nodes", type=click.IntRange(1), help="With --on: machines that the ranks are spread over.  [default: one for each 8]")
@click.option("--utilisation", type=click.FloatRange(0, 1, min_open=True), help="With --on: part of the peak FLOP/s that is reached.")
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="With --on: peak FLOP/s of a rank: 312e12.")
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), help="With --on: bytes/s of a device's memory: 1.5e12.")
@click.option(
    "--link", type=click.FloatRange(0, min_open=True), help="With --on: bytes/s that a rank receives from those of its node: 300e9."
)
@click.option("--network", type=click.FloatRange(0, min_open=True), help="With --on: bytes/s that it receives from other nodes: 25e9.")
@click.option("--host-memory", type=click.FloatRange(0, min_open=True), help="With --on: bytes of main memory of a node: 1e12.")
@click.option("--disk", type=click.FloatRange(0, min_open=True), help="With --on: bytes/s of a node's disk: 3e9.")
@click.option("--json", "as_json", is_flag=True, help="With --on or --no-measure: print what would be stored as JSON, bytes in all.")
@click.pass_obj
def plan(
    command: tuple[str, ...],
    recipe: Path,
    overrides: tuple[str, ...],
    measure: bool | None,
    ranks: int | None,
    nproc: int,
    machine: str | None,
    tokens: float | None,
    length: int | None,
    nodes: int | None,
    utilisation: float | None,
    flops: float | None,
    bandwidth: float | None,
    link: float | None,
    network: float | None,
    host_memory: float | None,
    disk: float | None,
    as_json: bool,
) -> None:
    """Say what `run` would write and what it would cost, before any of it is done; nothing below the store is touched.

    Rows are really tokenised and a few real batches are really run, so sizes are counted and times are measured: what is stored and
    what is derived from it, bytes per token and in total, disk, hours, memory, rounding errors; and what other shardings would take.

    With --on nothing is run and no weights are needed: memory of a rank, hours and GPU hours follow from the teacher's config.json for
    every sharding that the machine allows, by the formulas of docs/scale.md. --no-measure alone does so for the GPUs of this machine.
    """
    from teacher_dump.recipe import load

    known = {"flops": flops, "bandwidth": bandwidth, "link": link, "network": network, "host_memory": host_memory, "disk": disk}
    given = {name: value for name, value in known.items() if value is not None}
    if machine is None and measure is not False:
        if given or tokens is not None or length is not None or nodes is not None or utilisation is not None:
            raise click.UsageError("--tokens, --length, --nodes and what a machine is capable of go with --on MACHINE")
        if as_json:
            raise click.UsageError("--json goes with --on MACHINE or --no-measure")
        _measured(recipe, overrides, command, ranks, nproc)
        return
    if measure:
        raise click.UsageError("--measure runs the teacher here, --on MACHINE calculates for another machine; leave one of them out")
    import json

    from online.machines import UTILISATION, this_machine
    from teacher_dump.estimate import Wanted, estimate, stored

    if as_json:
        click.echo(json.dumps(stored(load(recipe, overrides), Wanted(machine or "", tokens, length), command), indent=1))
        return
    wanted = Wanted(machine or this_machine(), tokens, length, nodes, utilisation or UTILISATION, given)
    click.echo(estimate(load(recipe, overrides), wanted, command))


def _measured(recipe: Path, overrides: tuple[str, ...], command: tuple[str, ...], ranks: int | None, nproc: int) -> None:
    if nproc > 1:
        from teacher_dump.launch import launch

        options = [] if ranks is None else [f"--ranks={ranks}"]
        launch(nproc, ["-m", "teacher_dump.cli", "plan", *options, "--", str(recipe), *overrides], grace=0.0)
        return
    from teacher_dump.plan import plan as make_plan
    from teacher_dump.recipe import load

    if report := make_plan(load(recipe, overrides), command, ranks):
        click.echo(report)
