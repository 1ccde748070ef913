"""MetaDistil in runs: beside plain distillation, stopped in the middle, recomputed, in half precision, on two ranks."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from two_ranks import launched

from student_train import checkpoint
from student_train.journal import read_journal
from student_train.output import CHECKPOINTS, student_folder
from student_train.recipe import TrainRecipe
from student_train.run import run

CLOCK = ("tokens_per_second", "loader_wait")
OPTIONS: dict[str, Any] = {"beta": 10.0, "pilot_rate": 0.1, "teacher_rate": {"kind": "linear", "start": 1e-2, "end": 0.0}}
PLAIN = {"random": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


@pytest.fixture(scope="module")
def folder(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows in ``store``, and their ``teacher``."""
    made = tmp_path_factory.mktemp("metadistil")
    stores.write_store(made, "classification", ["task_logits@row"])
    return made


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Callable[..., TrainRecipe]:
    """One phase of four steps with a method and its options, by the name of its output; other fields of the phase changed."""

    def made(name: str, method: str = "metadistil", options: dict[str, Any] | None = None, **changes: object) -> TrainRecipe:
        given = changes.pop("trainer", {})
        assert isinstance(given, dict)
        trainer = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-2, "save_steps": 2}
        data = {"store": str(folder / "store")}
        phase = {
            "name": "only", "teacher": {"online": {"model": str(folder / "teacher"), "head": "classification"}}, "student": PLAIN,
            "data": [data], "evaluate": [{**data, "split": "dev"}], "metrics": ["accuracy", "task_kl"], "steps": 4, "batch_rows": 8,
            "methods": [{"name": method, "options": OPTIONS if options is None else options}], **changes,
            "trainer": {**trainer, **given},
        }  # fmt: skip
        if method == "metadistil":
            phase["meta"] = {**data, "split": "dev"}
        return TrainRecipe.model_validate({"output": str(tmp_path / name), "phases": [phase]})

    return made


def curve(made: TrainRecipe, method: str = "metadistil") -> list[dict[str, float]]:
    return [
        {key.replace(method, "method"): value for key, value in entry.items() if key not in CLOCK}
        for entry in read_journal(made.output / "only" / "metrics.jsonl")
    ]


def saved(made: TrainRecipe, step: int, file: str = "model") -> dict[str, Tensor]:
    return checkpoint.load(made.output / "only" / CHECKPOINTS / f"checkpoint-{step}" / f"{file}.safetensors")


def taught(made: TrainRecipe, part: str = "trained") -> dict[str, Tensor]:
    """Buffers of the teacher that trained, after the last step."""
    start = f"methods.metadistil.{part}."
    return {name.removeprefix(start).replace("/", "."): value for name, value in saved(made, 4).items() if name.startswith(start)}


def result(made: TrainRecipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.output / "only" / "result.json").read_text())
    return found


def test_with_a_teacher_that_stands_still_it_is_plain_distillation_to_the_bit(recipe: Callable[..., TrainRecipe]) -> None:
    soft = {"alpha": 0.4, "temperature": 3.0}
    still = recipe("still", options={**soft, "soft": "kl", "teacher_rate": 0.0}, accumulation=2)
    plain = recipe("plain", "kd", soft, accumulation=2)
    moving = recipe("moving", options={**soft, "soft": "kl", "teacher_rate": 1e-2, "pilot_rate": 0.1}, accumulation=2)
    for one in (still, plain, moving):
        run(one, ["test"])
    assert curve(still) == curve(plain, "kd")
    assert result(still)["student"] == result(plain)["student"]
    assert curve(still) != curve(moving)
    first, second = (
        next(entry["metadistil/soft"] for entry in read_journal(one.output / "only" / "metrics.jsonl")) for one in (still, moving)
    )
    assert first != second  # its first step learns from the teacher that learned in it
    assert result(still)["before"] == result(moving)["before"]


def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one_and_the_teacher_stays_behind(
    recipe: Callable[..., TrainRecipe], folder: Path
) -> None:
    changes = {"student": {"random": {"num_hidden_layers": 2}}, "accumulation": 2, "workers": 1}
    whole, resumed = (recipe(name, **changes) for name in ("whole", "resumed"))
    run(whole, ["test"])
    shutil.copytree(whole.output, resumed.output)
    left = resumed.output / "only"
    (left / "result.json").unlink()
    for done in (student_folder(resumed, "only"), left / CHECKPOINTS / "checkpoint-4"):
        shutil.rmtree(done)
    run(resumed, ["test"])
    assert curve(resumed) == curve(whole)
    assert result(resumed)["student"] == result(whole)["student"]
    after = saved(whole, 4)
    for name, tensor in saved(resumed, 4).items():
        assert torch.equal(tensor, after[name]), name
    with safe_open(folder / "teacher" / "model.safetensors", "pt") as loaded:
        moved = [not torch.equal(weight, loaded.get_tensor(name)) for name, weight in taught(whole).items()]
    assert all(moved)
    assert not all(torch.equal(tensor, after[name]) for name, tensor in saved(whole, 2).items())
    with safe_open(student_folder(whole, "only") / "model.safetensors", "pt") as exported:
        assert not any("metadistil" in name or "/" in name for name in exported.keys())  # noqa: SIM118
        assert len(exported.keys()) == sum(name.startswith("student.") for name in after)
    assert not (whole.output / "only" / "methods.safetensors").exists()


def test_recomputed_activations_and_half_precision_teach_the_same(recipe: Callable[..., TrainRecipe]) -> None:
    found = {}
    for name, trainer in {"plain": {}, "recomputed": {"gradient_checkpointing": True}, "half": {"bf16": True}}.items():
        made = recipe(name, trainer=trainer)
        run(made, ["test"])
        found[name] = torch.cat([mean.flatten() for mean in taught(made, "means").values()])
    torch.testing.assert_close(found["recomputed"], found["plain"], rtol=1e-3, atol=1e-3 * float(found["plain"].abs().max()))
    assert float((found["half"] - found["plain"]).norm()) < 0.2 * float(found["plain"].norm())


def test_it_needs_held_out_rows_and_its_teacher_in_the_job(recipe: Callable[..., TrainRecipe]) -> None:
    made = recipe("none")
    phase = made.phases[0].model_copy(update={"meta": None})
    with pytest.raises(ValueError, match="metadistil judges rows by held-out ones; give the phase meta"):
        run(made.model_copy(update={"phases": (phase,)}), ["test"])
    stored = {"teacher": "store", "metrics": [], "data": [{"store": str(made.phases[0].data[0].store), "pass_name": "tiny"}]}
    with pytest.raises(ValueError, match="metadistil needs its teacher at work"):
        run(recipe("stored", **stored), ["test"])
    with pytest.raises(ValueError, match="zero: stage 3: metadistil takes gradients in all weights of the student by itself"):
        run(recipe("zero3", zero={"stage": 3}), ["test"])
    half = {"online": {**made.phases[0].teacher.model_dump(mode="json")["online"], "dtype": "bfloat16"}}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="expected dtype float32"):
        run(recipe("half", teacher=half), ["test"])


def on_two_ranks(made: TrainRecipe, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A run on two ranks."""
    file = tmp_path / f"{made.output.name}.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    return launched("-m", "student_train.cli", "run", str(file))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_teach_and_learn_as_one(recipe: Callable[..., TrainRecipe], tmp_path: Path) -> None:
    rate = {"optim": "sgd", "learning_rate": 0.05}  # Adam would step along rounding errors where there is no slope
    alone = recipe("alone", trainer=rate)
    run(alone, ["test"])
    for name, changes in {"ddp": {}, "zero2": {"zero": {"stage": 2}}}.items():
        pair = recipe(name, trainer=rate, **changes)
        done = on_two_ranks(pair, tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        for entry, expected in zip(curve(pair), curve(alone), strict=True):
            assert entry == pytest.approx(expected, rel=1e-3, abs=1e-5), (name, entry)
        for part in ("means", "squares"):
            for key, wanted in taught(alone, part).items():
                torch.testing.assert_close(taught(pair, part)[key], wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()) + 1e-9)
        others = saved(pair, 4, "buffers_1")
        assert all(torch.equal(others[f"metadistil.trained.{key.replace('.', '/')}"], weight) for key, weight in taught(pair).items())
