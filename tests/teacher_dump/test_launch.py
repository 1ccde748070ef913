"""Jobs of several ranks on one machine, started by `--nproc` and by the deepspeed launcher."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from launching import ROOT, Program, assert_close, committed_bytes, environment, free_port, wait_for
from tiny_dump import Outcome, Tree, stored_bytes

from store.verify import verify
from teacher_dump.last_words import RanksFailed
from teacher_dump.launch import launch

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

SAY = f"""
import atexit, os, sys
from time import sleep
sys.path.insert(0, {str(ROOT)!r})
from teacher_dump.last_words import LastWords"""
"""Beginning of a rank that needs no torch."""


@pytest.mark.parametrize(
    ("first", "second", "text", "code"),
    [
        ("LastWords('error: no file', 2).end()", "LastWords('error: no file', 2).end()", "(rank [01]: )?error: no file", 2),
        ("LastWords('error: row 7', 2).end()", "sleep(1); LastWords('error: gone', 2, follows=True).end()", "rank 0: error: row 7", 2),
        ("atexit.register(sleep, 60); LastWords('error: row 7', 2).end()", "sleep(1); sys.exit(2)", "rank 0: error: row 7.*", 2),
        ("sleep(60)", "os.kill(os.getpid(), 9)", r"rank 1: error: process \d+ was killed by SIGKILL.*", 137),
        ("os.abort()", "sleep(60)", r"rank 0: error: process \d+ was killed by SIGABRT.*", 134),
        ("sleep(60)", "sys.exit(1)", r"rank 1: error: process \d+ ended with exit code 1.*", 1),
    ],
)
def test_what_ranks_end_with_is_said_once(first: str, second: str, text: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RanksFailed) as failed:
        launch(2, ["-c", f"{SAY}\nif os.environ['RANK'] == '0':\n    {first}\nelse:\n    {second}"], grace=5)
    assert re.fullmatch(text, str(failed.value), re.S), failed.value
    assert failed.value.code == code
    assert not capfd.readouterr().err, "neither the ranks nor torch's launcher say anything besides"


def test_cores_are_divided_between_ranks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch(2, ["-c", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])"], grace=5)
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(capfd.readouterr().out.splitlines()) == [f"{each} 0 2", f"{each} 1 2"]


def test_a_rank_starts_no_ranks(masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    failed = teacher_dump("--local_rank=0", "run", write(masked_recipe), "--nproc", 2)
    assert failed.code == 2
    assert "leave --nproc away" in failed.err


def test_a_bad_recipe_is_told_before_ranks_start(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    failed = teacher_dump("run", write(masked_recipe), "--nproc", 2, "dtyp=float16")
    assert failed.code == 2
    assert failed.err.count("unknown key 'dtyp'") == 1


LAUNCH = """
import sys
from teacher_dump.launch import launch
from teacher_dump.stopping import Stopped
try:
    launch(2, ["-c", sys.argv[1]], grace=5)
except KeyboardInterrupt:
    sys.exit(130)
except Stopped:
    sys.exit(143)
"""
HEAR = """
import os, pathlib, signal, sys, time
def heard(number, frame):
    pathlib.Path(os.environ["RANK"] + ".heard").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, heard)
signal.signal(signal.SIGINT, heard)
pathlib.Path(os.environ["RANK"] + ".ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_ranks(sent: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = Program.start([sys.executable, "-c", LAUNCH, HEAR], tmp_path / "said")
    wait_for(lambda: not job.running or len(list(tmp_path.glob("*.ready"))) == 2)
    job.process.send_signal(sent)
    assert job.code(60) == code, job.text
    assert [(tmp_path / f"{number}.heard").read_text() for number in range(2)] == [str(int(sent))] * 2


@pytest.mark.slow
def test_ranks_of_one_machine_stop_together_and_go_on(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe, whole, store = write({**masked_recipe, "batch_tokens": 16}), tmp_path / "whole", Path(masked_recipe["store"])
    job = Program.start([sys.executable, "-m", "teacher_dump.cli", "run", str(recipe), "--nproc", "2"], tmp_path / "said")
    wait_for(lambda: not job.running or committed_bytes(store) > 0)
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 143, job.text
    assert len(re.findall(r"stopped by SIGTERM; \d+ of \d+ shards of pass bert are committed", job.text)) == 1, "one message for both ranks"
    assert "Traceback" not in job.text
    assert not verify(store)
    assert teacher_dump("run", recipe).code == 0
    assert teacher_dump("run", recipe, f"store={whole}").code == 0
    assert stored_bytes(store) == stored_bytes(whole)


@pytest.mark.slow
def test_the_deepspeed_launcher_with_a_hostfile(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    recipe, whole, store = write(masked_recipe), tmp_path / "whole", Path(masked_recipe["store"])
    assert teacher_dump("run", recipe, f"store={whole}").code == 0
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=2\n")
    launcher = [
        "deepspeed",
        "--hostfile",
        str(hosts),
        "--no_ssh",
        "--node_rank=0",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    command = [*launcher, "--module", "teacher_dump.cli", "run", str(recipe), "sharding.kind=zero3", "sharding.size=2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is complete" in done.stdout
    assert_close(store, whole)


def test_ranks_that_make_up_no_whole_replicas_are_refused(masked_recipe: Tree, write: Write, tmp_path: Path) -> None:
    job = jobs.start(write(masked_recipe), 3, tmp_path / "said", ["sharding.kind=fsdp", "sharding.size=2"], replica=2)
    assert job.codes() == [2, 2, 2], job.said()
    for rank in job.ranks:
        assert rank.text.startswith(f"rank {rank.number}: error: sharding.size 2 does not divide the 3 ranks of this job")
    assert not Path(masked_recipe["store"]).exists()
