"""Jobs over two nodes: two torchruns that find each other, on one machine or in two network namespaces, and under SLURM's script."""

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from launching import ENDS, ROOT, Program, assert_close, committed_bytes, environment, free_port, two_networks, wait_for
from tiny_dump import Outcome, Tree, stored_bytes

from store.reader import Store
from store.verify import verify

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

SCRIPT = ROOT / "recipes" / "cluster" / "slurm.sh"

SBATCH = """#!/usr/bin/env python3
'''Stands for sbatch and the cluster: runs a job, hands SIGTERM on to its script, and runs it again where it queues up again.'''
import os, pathlib, signal, subprocess, sys
again = pathlib.Path(os.environ["TO_REQUEUE"])
job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
for restarts in range(3):
    script = subprocess.Popen(["bash", *sys.argv[1:]], env={**os.environ, **job, "SLURM_RESTART_COUNT": str(restarts)})
    signal.signal(signal.SIGTERM, lambda *_: script.send_signal(signal.SIGTERM))
    code = script.wait()
    print("job ended with", code, flush=True)
    if not again.exists():
        sys.exit(code)
    again.unlink()
"""
SRUN = """#!/usr/bin/env python3
'''Stands for srun: starts the command once for each node, hands SIGTERM on, and returns the highest exit code.'''
import os, signal, subprocess, sys
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(sys.argv[1:], env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}) for node in nodes]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
# Stands for scontrol.
case "$1 $2" in
    "show hostnames") echo localhost; echo localhost ;;
    "requeue 4711") touch "$TO_REQUEUE" ;;
    *) exit 1 ;;
esac
"""


def torchrun(endpoint: str, node: int, *options: str) -> list[str]:
    """The words that start one rank on one of two nodes."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job", f"--rdzv-conf=is_host={int(node == 0)}"]
    return ["torchrun", "--nnodes=2", "--nproc-per-node=1", *meeting, *options, "-m", "teacher_dump.cli", "run"]


def start_nodes(folder: Path, commands: Sequence[Sequence[str]], added: dict[str, str] | None = None) -> list[Program]:
    return [Program.start(command, folder / f"node{number}.txt", added) for number, command in enumerate(commands)]


@pytest.mark.slow
def test_a_teacher_over_two_networks_makes_the_store_of_one_process(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    recipe, alone, store = write({**masked_recipe, "batch_tokens": 64}), tmp_path / "alone", Path(masked_recipe["store"])
    assert teacher_dump("run", recipe, f"store={alone}").code == 0
    with ExitStack() as stack:
        try:
            inside, addresses, cable = stack.enter_context(two_networks())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine gives no network namespaces: {error}")
        words = [torchrun(f"{addresses[0]}:29400", node, f"--local-addr={addresses[node]}") for node in range(2)]
        sharding = ["sharding.kind=zero3", "sharding.size=2"]
        commands = [[*inside[node], *words[node], str(recipe), *sharding] for node in range(2)]
        nodes = start_nodes(tmp_path, commands, {"GLOO_SOCKET_IFNAME": cable})
        for node in nodes:
            stack.callback(node.kill)
        assert [node.code() for node in nodes] == [0, 0], "\n".join(node.text for node in nodes)
    assert_close(store, alone)
    assert not verify(store)


@pytest.mark.slow
def test_a_node_that_is_gone_ends_the_job_and_the_next_one_completes_the_store(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe, store = write({**masked_recipe, "batch_tokens": 16}), Path(masked_recipe["store"])
    sharding = ["sharding.kind=fsdp", "sharding.size=2"]
    endpoint = f"localhost:{free_port()}"
    nodes = start_nodes(tmp_path, [[*torchrun(endpoint, node), str(recipe), *sharding] for node in range(2)])
    try:
        wait_for(lambda: not all(node.running for node in nodes) or committed_bytes(store) > 0)
        nodes[0].kill()  # the one that the two meet at
        assert nodes[1].code() != 0, nodes[1].text
    finally:
        for node in nodes:
            node.kill()
    assert "rank 1: " in nodes[1].text
    slots, committed = Store.open(store).manifest.rows.slots, len(Store.open(store).committed("bert"))
    assert 0 < committed < slots
    assert not verify(store)
    again = teacher_dump("run", recipe)
    assert again.code == 0, again.err
    assert f"going on after {committed} committed shards" in again.err
    assert not verify(store)


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=20)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.slow
def test_the_slurm_script_runs_two_nodes_and_queues_up_again_when_told_to_stop(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe, alone, store = write({**masked_recipe, "batch_tokens": 16}), tmp_path / "alone", Path(masked_recipe["store"])
    assert teacher_dump("run", recipe, f"store={alone}").code == 0
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    added = {"PATH": f"{programs}:{environment()['PATH']}", "TO_REQUEUE": str(tmp_path / "requeue"), "GRACE": "20"}
    cluster = Program.start(["sbatch", str(SCRIPT), str(recipe)], tmp_path / "job.txt", added)
    try:
        wait_for(lambda: not cluster.running or committed_bytes(store) > 0)
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.code(2 * ENDS) == 0, cluster.text
    finally:
        cluster.kill()
    assert "shards of pass bert are committed" in cluster.text
    assert "stopped by SIGTERM" in cluster.text
    assert "job ended with 0" in cluster.text
    assert stored_bytes(store) == stored_bytes(alone)
