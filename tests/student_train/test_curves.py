"""What can be seen of a run: its curves as Parquet, how long it waited for data, its bar, and trackers beside TensorBoard."""

import json
import time
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import TrainerControl, TrainerState, TrainingArguments

from online.ranks import Ranks
from student_train.curves import curves, write_curves
from student_train.journal import Journal
from student_train.progress import Progress
from student_train.recipe import MethodSpec
from student_train.window import Window

KD = MethodSpec(name="kd")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_number_of_the_journal_is_a_row_and_a_half_written_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"loss": 2.5, "kd/soft": 1.5, "epoch": 0.5, "step": 4}\n{"eval_accuracy": 1, "step": 4}\n{"loss": NaN, "st', encoding="utf-8"
    )
    write_curves(tmp_path)
    table = parquet.read_table(tmp_path / "metrics.parquet")
    assert table.to_pylist() == [
        {"step": 4, "epoch": 0.5, "name": "loss", "value": 2.5},
        {"step": 4, "epoch": 0.5, "name": "kd/soft", "value": 1.5},
        {"step": 4, "epoch": None, "name": "eval_accuracy", "value": 1.0},
    ]
    assert [field.type for field in table.schema] == [pa.int64(), pa.float64(), pa.string(), pa.float64()]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_run_without_a_log_has_no_rows_and_all_columns(tmp_path: Path) -> None:
    assert curves(tmp_path).num_rows == 0
    assert curves(tmp_path).column_names == ["step", "epoch", "name", "value"]


def test_a_run_leaves_its_curves_as_parquet_also_where_it_ends_in_an_error(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    tiny.run([taught], tmp_path / "whole", methods=[KD], steps=3)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rows = parquet.read_table(tmp_path / "whole" / "metrics.parquet").to_pylist()
    assert [(row["step"], row["value"]) for row in rows if row["name"] == "loss"] == [(line["step"], line["loss"]) for line in lines]
    assert len(rows) == sum(len(line) - 2 for line in lines)

    def failing(bundle: object) -> dict[str, float]:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        tiny.run([taught], tmp_path / "half", methods=[KD], steps=4, evaluate=failing, trainer={"eval_steps": 2})
    rows = parquet.read_table(tmp_path / "half" / "metrics.parquet").to_pylist()
    assert {row["step"] for row in rows if row["name"] == "loss"} == {1, 2}


def test_a_run_that_starts_over_drops_also_what_was_logged_before_its_first_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    Journal(file, -1).append({"step": 0, "eval_loss": 1.0})
    Journal(file, 0).append({"step": 1, "loss": 1.0})
    assert [row["step"] for row in curves(tmp_path).to_pylist()] == [0, 1]
    Journal(file, -1)
    assert curves(tmp_path).num_rows == 0


def test_the_share_of_waiting_is_of_the_time_in_steps_alone() -> None:
    window, now = Window(), time.perf_counter()
    window.paused = 1e6  # before the first step: no part of its speed
    window.begin(now - 10)
    window.begin(now)  # only the first step starts the clock
    window.waited, window.paused, window.tokens = 2.0, 2.0, 80.0
    window.add({"kd/soft": torch.tensor(3.0)})
    window.add_step({"tokens": 0.0, "kd/soft": 1.0})
    logs = window.logs(Ranks(60))
    assert logs["loader_wait"] == pytest.approx(0.25, abs=0.02)
    assert logs["tokens_per_second"] == pytest.approx(10, abs=0.5)
    assert logs["kd/soft"] == 3.0


def test_every_log_says_how_long_a_step_waited(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, result = tiny.run([taught], tmp_path, methods=[KD], steps=3)
    waits = [entry["loader_wait"] for entry in result.history]
    assert len(waits) == 3
    assert all(0 < wait < 1 for wait in waits)


def test_the_bar_of_a_resumed_run_counts_its_own_steps_and_says_what_was_waited(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, control, progress = TrainerState(global_step=500, max_steps=1000, is_world_process_zero=True), TrainerControl(), Progress()
    progress.on_train_begin(args, state, control)
    bar = progress.training_bar
    state.global_step = 501
    progress.on_step_end(args, state, control)
    found = bar.format_dict
    assert (found["initial"], found["n"], found["total"]) == (500, 501, 1000)
    progress.on_log(args, state, control, {"loss": 1.25, "tokens_per_second": 1234.0, "loader_wait": 0.125})
    assert bar.postfix == "loss 1.25, 1,234 tokens/s, 12% waiting for data"
    progress.close()


def test_a_tracker_that_is_unknown_or_not_installed_is_an_error_that_says_so(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phase 'tiny': trainer: report_to: unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        tiny.run([taught], tmp_path / "a", methods=[KD], trainer={"report_to": ["tensorbord"]})
    with pytest.raises(ValueError, match=r"phase 'tiny': trainer: report_to wandb: .*requires wandb to be installed"):
        tiny.run([taught], tmp_path / "b", methods=[KD], trainer={"report_to": "wandb"})


def test_no_tracker_leaves_the_journal_alone(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    tiny.run([taught], tmp_path, methods=[KD], steps=1, trainer={"report_to": "none"})
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "metrics.jsonl").read_text()
