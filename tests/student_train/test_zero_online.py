"""Teacher and student in parts side by side in one job: the losses of one process that holds both."""

from pathlib import Path

import pytest
import torch
import yaml
from two_ranks import launched

from store.strict import load_yaml
from student_train import checkpoint
from student_train.journal import read_journal
from student_train.recipe import TrainRecipe
from student_train.run import run as train

SPEED = ("tokens_per_second", "loader_wait")


LEARN: list[dict[str, object]] = [{"name": "lm_kd"}, {"name": "hid_seq", "options": {"layers": [[1, 2], [2, 4]]}}]
MIX: list[dict[str, object]] = [
    {"name": "theseus", "options": {"rate": 0.5, "train": "all", "dropout": False, "loss": "none"}},
    {"name": "lm_loss"},
]
PARTS: dict[str, object] = {"kind": "zero3", "size": 2}


def written(
    folder: Path, store: Path, methods: list[dict[str, object]], sharding: dict[str, object], zero: dict[str, object] | None
) -> Path:
    """The recipe of a run into ``folder`` with a live teacher, without dropout."""
    plan = {
        "name": "phase",
        "student": {"random": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
        "teacher": {"online": {"model": str(store.parent / "teacher"), "head": "masked_lm", "sharding": sharding}},
        "data": [{"store": str(store)}],
        "evaluate": [{"store": str(store), "split": "dev"}],
        "methods": methods,
        "metrics": ["teacher_kl"],
        "best": "-loss",
        "steps": 8,
        "batch_rows": 8,
        "zero": zero,
        "trainer": {
            "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1, "save_steps": 4, "eval_steps": 4,
            "weight_decay": 0.1, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"output": str(folder), "phases": [plan]}), encoding="utf-8")
    return file


def run(recipe: Path, ranks: int) -> None:
    """The program on two ranks, or here on one."""
    if ranks == 1:
        train(load_yaml(TrainRecipe, recipe), ["test"])
        return
    done = launched("-m", "student_train.cli", "run", str(recipe))
    assert done.returncode == 0, done.stderr[-4000:]


def check_like(folder: Path, alone: Path) -> None:
    """Losses, scores and the exported student are those of the run ``alone``, as far as float32 carries them."""
    expected = read_journal(alone / "phase" / "metrics.jsonl")
    assert len(expected) == 10
    for entry, one in zip(read_journal(folder / "phase" / "metrics.jsonl"), expected, strict=True):
        assert entry.keys() == one.keys()
        for key in entry.keys() - set(SPEED):
            assert entry[key] == pytest.approx(one[key], rel=2e-5, abs=2e-5), (folder.name, key, entry["step"])
    weights, found = (checkpoint.load(place / "phase" / "student" / "model.safetensors") for place in (alone, folder))
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-4, rtol=0, msg=lambda text, key=key: f"{folder.name}: {key}: {text}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_student_and_teacher_in_parts_learn_and_are_measured_as_one_process_that_holds_both(words: Path, tmp_path: Path) -> None:
    run(written(tmp_path / "alone", words, LEARN, {}, None), 1)
    for stage in (2, 3):
        run(written(tmp_path / f"stage {stage}", words, LEARN, PARTS, {"stage": stage}), 2)
        check_like(tmp_path / f"stage {stage}", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_blocks_that_theseus_does_not_choose_stand_still_under_stage_2_with_a_teacher_in_parts(words: Path, tmp_path: Path) -> None:
    run(written(tmp_path / "alone", words, MIX, {}, None), 1)
    run(written(tmp_path / "stage 2", words, MIX, PARTS, {"stage": 2}), 2)
    check_like(tmp_path / "stage 2", tmp_path / "alone")
