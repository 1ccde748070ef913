"""A run that was stopped goes on as if it had not been: same losses, same weights, or a clear refusal."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from store.filters import Range, Where
from student_train import checkpoint
from student_train.bundle import Bundle
from student_train.journal import Journal, read_journal
from student_train.recipe import MethodSpec

METHODS = [MethodSpec(name="kd"), MethodSpec(name="hid_seq", weight=0.5, options={"layers": [[1, 2]]})]
LOOP = {"accumulation": 2, "workers": 2, "trainer": {"save_total_limit": 9}}
CLOCK = ("tokens_per_second", "loader_wait")
FILES = ("complete.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


@dataclass
class Whole:
    """An uninterrupted run of 12 steps with checkpoints at 4, 8 and 12: dropout, two loader processes, accumulation 2."""

    output: Path
    history: list[dict[str, float]]
    weights: dict[str, Tensor]

    def copy(self, output: Path, *steps: int) -> Path:
        """Its output as it would be had it been stopped after the last of ``steps`` and before the next."""
        shutil.copytree(self.output, output)
        for path in (output / "checkpoints").iterdir():
            if checkpoint.step_of(path) not in steps:
                shutil.rmtree(path)
        return output


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    torch.set_num_threads(1)
    output: Path = tmp_path_factory.mktemp("whole") / "out"
    bundle, result = tiny.run([taught], output, methods=METHODS, **LOOP)
    assert result.resumed is None
    return Whole(output, timeless(result.history), {name: tensor.clone() for name, tensor in bundle.state_dict().items()})


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logs without what a clock measured."""
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in history]


def assert_same_run(whole: Whole, bundle: Bundle, history: list[dict[str, float]], output: Path) -> None:
    assert timeless(history) == whole.history
    assert timeless(read_journal(output / "metrics.jsonl")) == whole.history
    assert bundle.state_dict().keys() == whole.weights.keys()
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, whole.weights[name]), name


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole, step: int
) -> None:
    output = whole.copy(tmp_path / "out", step)
    bundle, result = tiny.run([taught], output, methods=METHODS, **LOOP)
    assert result.resumed == step
    assert_same_run(whole, bundle, result.history, output)


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_another_with_the_same_losses(tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole) -> None:
    options = {"stores": [str(taught)], "output": str(tmp_path), "methods": [spec.model_dump() for spec in METHODS], **LOOP}

    def start(kill_at: int | None) -> int:
        runs = json.dumps([{**options, "kill_at": kill_at}])
        return subprocess.run([sys.executable, tiny.__file__, runs], timeout=120, check=False).returncode

    assert start(kill_at=14) == -signal.SIGKILL  # in the second micro-batch of step 7
    assert max(entry["step"] for entry in read_journal(tmp_path / "metrics.jsonl")) == 6
    assert start(kill_at=None) == 0
    assert timeless(read_journal(tmp_path / "metrics.jsonl")) == whole.history
    saved = checkpoint.load(tmp_path / "checkpoints" / "checkpoint-12" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, whole.weights[name]), name


@pytest.mark.parametrize("harm", ["lacks", "cut", "changed"])
@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_lacks_or_damages_any_file_is_passed_over(
    tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture, file: str, harm: str
) -> None:
    folder = whole.copy(tmp_path / "out", 4, 8) / "checkpoints"
    settings = json.loads((folder / "checkpoint-8" / "complete.json").read_text())["settings"]
    assert sorted(path.name for path in (folder / "checkpoint-8").iterdir()) == sorted(FILES)
    assert checkpoint.newest(folder, settings) == folder / "checkpoint-8"
    victim = folder / "checkpoint-8" / file
    content = victim.read_bytes()
    if harm == "lacks":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(content[:-3])
    else:
        victim.write_bytes(b"\xff" + content[1:])
    assert checkpoint.newest(folder, settings) == folder / "checkpoint-4"
    assert f"checkpoint-8 is not used: {'it lacks complete.json' if file == 'complete.json' else ''}" in caplog.text
    assert file in caplog.text


def test_a_run_goes_on_from_the_older_checkpoint_and_replaces_the_broken_one(
    tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole
) -> None:
    output = whole.copy(tmp_path / "out", 4, 8)
    (output / "checkpoints" / "checkpoint-8" / "optimizer.pt").unlink()
    (output / "checkpoints" / checkpoint.WRITING).mkdir()
    (output / "checkpoints" / checkpoint.WRITING / "optimizer.pt").write_text("half")
    bundle, result = tiny.run([taught], output, methods=METHODS, **LOOP)
    assert result.resumed == 4
    assert_same_run(whole, bundle, result.history, output)
    for step in (4, 8, 12):
        assert sorted(path.name for path in (output / "checkpoints" / f"checkpoint-{step}").iterdir()) == sorted(FILES)
    assert not (output / "checkpoints" / checkpoint.WRITING).exists()


def test_a_finished_run_has_nothing_left_to_do(tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole) -> None:
    output = whole.copy(tmp_path / "out", 12)
    bundle, result = tiny.run([taught], output, methods=METHODS, **LOOP)
    assert (result.resumed, result.steps) == (12, 12)
    assert_same_run(whole, bundle, result.history, output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "was made with seed 3, this run has 4"),
        ({"steps": 20}, "was made with steps 12, this run has 20"),
        ({"batch_rows": 16}, "was made with batch_rows 8, this run has 16"),
        ({"accumulation": 1}, "was made with accumulation 2, this run has 1"),
        ({"trainer": {"learning_rate": 0.1}}, r"was made with trainer .*0\.001.*this run has .*0\.1"),
        ({"methods": METHODS[:1]}, "was made with methods .*hid_seq"),
        (
            {"rows": {"where": Where(length=Range(max=12))}},
            r"was made with data .*\"where\": null.*this run has .*\"length\": {\"max\": 12",
        ),
        ({"rows": {"shuffle": "block"}}, r"was made with data .*\"random\".*this run has .*\"block\""),
        ({"rows": {"by_length": 2}}, r"was made with data .*\"by_length\": null.*this run has .*\"by_length\": 2"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole, changes: dict[str, object], message: str
) -> None:
    output = whole.copy(tmp_path / "out", 8)
    with pytest.raises(ValueError, match=message):
        tiny.run([taught], output, **{"methods": METHODS, **LOOP, **changes})
    assert checkpoint.step_of(next((output / "checkpoints").iterdir())) == 8


def test_when_to_log_save_and_load_may_change_between_run_and_resumption(
    tiny: ModuleType, taught: Path, tmp_path: Path, whole: Whole
) -> None:
    output = whole.copy(tmp_path / "out", 8)
    changes = {**LOOP, "workers": 0, "trainer": {"logging_steps": 2, "save_steps": 3, "save_total_limit": 1}}
    bundle, result = tiny.run([taught], output, methods=METHODS, **changes)
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-12"]
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, whole.weights[name]), name


def test_the_best_weights_outlive_a_stop(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    def evaluate(bundle: Bundle) -> dict[str, float]:
        return {"score": -abs(float(next(tiny_steps)) - 6)}

    options = {"methods": METHODS, "best": "score", "patience": 2, "trainer": {"eval_steps": 2, "save_total_limit": 9}}
    tiny_steps = iter(range(2, 99, 2))
    bundle, result = tiny.run([taught], tmp_path / "a", evaluate=evaluate, **options)
    assert (result.best_step, result.steps) == (6, 10)
    best = {name: tensor.clone() for name, tensor in bundle.student.state_dict().items()}

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tiny_steps = iter(range(10, 99, 2))
    again, resumed = tiny.run([taught], tmp_path / "b", evaluate=evaluate, **options)
    assert (resumed.resumed, resumed.best_step, resumed.steps) == (8, 6, 10)
    assert timeless(resumed.history) == timeless(result.history)
    for name, tensor in again.student.state_dict().items():
        assert torch.equal(tensor, best[name])


def test_a_run_that_ran_out_of_patience_is_not_taken_up_again(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    options = {"methods": METHODS, "best": "score", "patience": 1, "trainer": {"eval_steps": 4}}
    values = iter([1.0, 0.5])
    bundle, result = tiny.run([taught], tmp_path, evaluate=lambda _: {"score": next(values)}, **options)
    assert (result.steps, result.best_step) == (8, 4)
    again, resumed = tiny.run([taught], tmp_path, evaluate=lambda _: {"score": next(values)}, **options)
    assert (resumed.resumed, resumed.steps, resumed.best_step) == (8, 8, 4)
    for name, tensor in again.student.state_dict().items():
        assert torch.equal(tensor, bundle.student.state_dict()[name])


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)),
        lambda: BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
    ],
)
def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path, model: type[nn.Module]) -> None:
    saved, other = model(), model()
    checkpoint.save(checkpoint.weights(saved), tmp_path / "model.safetensors")
    with torch.no_grad():
        checkpoint.restore(other, checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    for name, tensor in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds an unknown bias: it belongs to another student"):
        checkpoint.restore(nn.Linear(2, 3, bias=False), checkpoint.weights(nn.Linear(2, 3)), tmp_path)
    with pytest.raises(ValueError, match="lacks bias"):
        checkpoint.restore(nn.Linear(2, 3), checkpoint.weights(nn.Linear(2, 3, bias=False)), tmp_path)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4, 2\], found \[3, 2\]"):
        checkpoint.restore(nn.Linear(2, 4, bias=False), checkpoint.weights(nn.Linear(2, 3, bias=False)), tmp_path)


def test_a_journal_forgets_what_lies_after_the_checkpoint_and_half_written_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    journal = Journal(file, 2)
    journal.append({"step": 3, "loss": 0.5})
    assert read_journal(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
    assert Journal(file, 0).file.read_text() == ""


def test_rotation_keeps_the_newest_up_to_this_step(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, 2, 8)  # 10 is damaged, or 8 would not have been trained again
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-8", "checkpoint-10"}
    checkpoint.rotate(tmp_path, None, 10)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"cannot write a checkpoint to .*No space left on device; make room"),
        checkpoint.writing(tmp_path),
    ):
        raise OSError(28, "No space left on device")
