"""Chains at work: real processes from teacher to student, killed, stopped, failing, and the same by hand."""

import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # several processes, each of which loads torch


@pytest.fixture(scope="module")
def whole(tiny_chain: ModuleType, stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A chain that ran undisturbed, and what it said."""
    folder = tiny_chain.write_chain(tmp_path_factory.mktemp("chains") / "whole", stores)
    code, said = tiny_chain.ended(tiny_chain.start(folder, "chain.yaml"))
    assert code == 0, said
    return folder, said


def times(folder: Path) -> dict[Path, int]:
    """When each file of the store's arrays and of the phases was written."""
    kept = [*(folder / "features").rglob("c.*"), *(folder / "out").rglob("*.safetensors"), *(folder / "out").rglob("result.json")]
    return {path: path.stat().st_mtime_ns for path in kept}


def test_a_chain_trains_assistant_and_student_and_skips_what_is_done(whole: tuple[Path, str], tiny_chain: ModuleType) -> None:
    folder, said = whole
    assert "step 1 of 4: teacher-dump run dump.yaml\n" in said
    assert "step 3 of 4: teacher-dump run dump.yaml pass_name=assistant teacher.model=out/assistant/student 'ship_layers=[1, 3]'\n" in said
    assert said.count(" took 0:0") == 4
    assert "all 4 steps are done, in 0:0" in said
    manifest = yaml.safe_load((folder / "features" / "manifest.json").read_text())
    assert [manifest["passes"][name]["shape"]["layers"] for name in ("teacher", "assistant")] == [4, 3]
    config = yaml.safe_load((folder / tiny_chain.STUDENT).with_name("config.json").read_text())
    assert config["num_hidden_layers"] == 2

    before = times(folder)
    assert len(before) > 8
    code, said = tiny_chain.ended(tiny_chain.start(folder, "chain.yaml"))
    assert code == 0, said
    assert times(folder) == before
    assert "phase 'assistant' is finished" in said


def test_a_killed_chain_goes_on_and_ends_in_the_same_student(whole: tuple[Path, str], tiny_chain: ModuleType, tmp_path: Path) -> None:
    folder = tiny_chain.copied(whole[0], tmp_path / "killed")
    process = tiny_chain.start(folder, "chain.yaml")
    checkpoints = folder / "out" / "assistant" / "checkpoints"
    wait_for(lambda: any(checkpoints.glob("checkpoint-*")), process)
    process.send_signal(signal.SIGKILL)
    assert tiny_chain.ended(process)[0] == -signal.SIGKILL
    assert not (folder / "out" / "assistant" / "result.json").exists()

    process = tiny_chain.start(folder, "chain.yaml")  # at once
    wait_for((folder / "features" / "assistant").exists, process)
    process.send_signal(signal.SIGKILL)
    said = tiny_chain.ended(process)[1]
    assert "going on from " in said
    assert "step 4 of 4" not in said

    code, said = tiny_chain.ended(tiny_chain.start(folder, "chain.yaml"))
    assert code == 0, said
    assert "phase 'assistant' is finished" in said
    assert (folder / tiny_chain.STUDENT).read_bytes() == (whole[0] / tiny_chain.STUDENT).read_bytes()


def test_printed_lines_typed_in_a_shell_give_the_same_student(whole: tuple[Path, str], tiny_chain: ModuleType, tmp_path: Path) -> None:
    folder = tiny_chain.copied(whole[0], tmp_path / "typed")
    process = tiny_chain.start(folder, "chain.yaml", "--print")
    lines = process.communicate(timeout=100)[0].splitlines()
    assert len(lines) == 4
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=folder, env=tiny_chain.environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (folder / tiny_chain.STUDENT).read_bytes() == (whole[0] / tiny_chain.STUDENT).read_bytes()


def test_a_step_that_fails_ends_the_chain_with_its_code(whole: tuple[Path, str], tiny_chain: ModuleType, tmp_path: Path) -> None:
    folder = tiny_chain.copied(whole[0], tmp_path / "failing")
    wild = 'steps.1.set=["phases.0.trainer.learning_rate=1.0e+30", "phases.0.trainer.max_grad_norm=0"]'
    code, said = tiny_chain.ended(tiny_chain.start(folder, "chain.yaml", wild))
    assert code == 2
    assert "error: step 2: the loss term kd/" in said  # the phase itself
    *_, last = said.splitlines()
    assert last.startswith("error: step 2 of 4 (student-train run train.yaml ")
    assert last.endswith(") ended with exit code 2. The same chain goes on with this step.")
    assert "step 3 of 4" not in said
    assert "Traceback" not in said


def test_sigterm_ends_the_step_and_the_chain(whole: tuple[Path, str], tiny_chain: ModuleType, tmp_path: Path) -> None:
    folder = tiny_chain.copied(whole[0], tmp_path / "ended")
    process = tiny_chain.start(folder, "chain.yaml", "steps.1.set=[phases.0.steps=2000]")
    wait_for(lambda: any((folder / "out").rglob("checkpoint-*")), process)
    process.terminate()
    code, said = tiny_chain.ended(process)
    assert code == 143
    assert "step 2 of 4 (student-train run train.yaml phases.0.steps=2000 --phase assistant) ended with exit code 143" in said
    assert "Traceback" not in said
    newest = max((folder / "out").rglob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    time.sleep(1)
    assert newest == max((folder / "out").rglob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)  # nobody trains any more


def test_steps_may_be_done_by_several_ranks(whole: tuple[Path, str], tiny_chain: ModuleType, tmp_path: Path) -> None:
    folder = tiny_chain.copied(whole[0], tmp_path / "ranks")
    chain = yaml.safe_load((folder / "chain.yaml").read_text())
    tiny_chain.write(folder / "chain.yaml", {"steps": [{**step, "nproc": 2} for step in chain["steps"][:2]]})
    code, said = tiny_chain.ended(tiny_chain.start(folder, "chain.yaml"))
    assert code == 0, said
    assert "torchrun --standalone --nproc-per-node=2 -m student_train.cli run train.yaml --phase assistant" in said
    both = (folder / "out" / "assistant" / "checkpoints" / "checkpoint-8").glob("rng_state*")
    assert sorted(path.name for path in both) == ["rng_state_0.pth", "rng_state_1.pth"]
