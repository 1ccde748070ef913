"""Progressive knowledge transfer: which block learns in which step, at what rate, and that all others really stand still."""

import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from store.shape import ModelShape
from student_train.bundle import Bundle
from student_train.methods import parse_method
from student_train.moment import Moment
from student_train.recipe import MethodSpec

RATE = 0.01
SLOW = {"rise": 0.5}
"""A curve that still rises in slices of few steps."""


def shape(layers: int = 3, *, width: int = 8, heads: int = 2) -> ModelShape:
    return ModelShape.model_validate(
        dict(family="bert", layers=layers, width=width, heads=heads, kv_heads=heads, head_width=4, vocab=9, causal=False, pre_norm=False)
        | dict(windows=(None,) * layers, head="masked_lm")
    )


def gates(steps: int, **options: object) -> list[dict[int, float]]:
    """The factors of every step of a phase."""
    method, found = parse_method("mobilebert", options, shape(3), shape(3)), []
    for step in range(steps):
        method.moment = Moment(step=step, steps=steps, epoch_steps=1.0, seed=0)
        factors = method.gates()
        assert factors is not None
        found.append(dict(factors))
    return found


def test_the_published_rates_in_slices_of_ten_steps() -> None:
    for step, found in enumerate(gates(30)):
        active, over = step // 10 + 1, step % 10
        curve = 3.0 * min(1 - 0.1 + 0.1 * math.sqrt(1 - over / 10), 10 * over / 10)
        expected = {block: (0.1 if block < active else block == active) * curve for block in (1, 2, 3)}
        assert found == pytest.approx({0: 0.0, **expected})
    assert gates(30)[0] == dict.fromkeys(range(4), 0.0)
    assert gates(30)[21][3] == pytest.approx(3 * (0.9 + 0.1 * math.sqrt(0.9)))


def test_slices_differ_by_a_step_at_most_and_one_of_a_single_step_trains_at_the_full_rate() -> None:
    active = [max((block for block, factor in found.items() if factor), default=0) for found in gates(8, rise=0)]
    assert active == [1, 1, 1, 2, 2, 2, 3, 3]
    expected = [{0: 0, 1: 3, 2: 0, 3: 0}, {0: 0, 1: 0.3, 2: 3, 3: 0}, {0: 0, 1: 0.3, 2: 0.3, 3: 3}]
    assert all(found == pytest.approx(wanted) for found, wanted in zip(gates(3), expected, strict=True))


def test_blocks_without_a_pair_train_with_the_next_that_has_one() -> None:
    found = gates(2, layers=[[3, 3], [2, 1]], rate=1.0)
    assert found == [{0: 0, 1: 1, 2: 1, 3: 0}, {0: 0, 1: 0.1, 2: 0.1, 3: 1}]


@pytest.mark.parametrize(
    ("options", "student", "message"),
    [
        ({}, shape(width=6), "equal widths of student and teacher, found 6 and 8; its teacher is made as wide as the student"),
        ({}, shape(heads=4), "equal numbers of attention heads of student and teacher, found 4 and 2"),
        ({"layers": [[1, 1], [1, 2]]}, shape(), r"layers: expected each student block once.*found \[\(1, 1\), \(1, 2\)\]"),
        ({"hidden": 0, "mean": 0, "variance": 0, "attention": 0}, shape(), "every weight is 0"),
        ({"earlier": 1.5}, shape(), "earlier: .*less than or equal to 1"),
        ({"rate": 0}, shape(), "rate: .*greater than 0"),
    ],
)
def test_bad_options_say_what_was_expected(options: dict[str, object], student: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=f"method mobilebert: .*{message}"):
        parse_method("mobilebert", options, student, shape())


# Real runs: a student of 2 blocks


@pytest.fixture(scope="module")
def store(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = stores.write_store(tmp_path_factory.mktemp("transfer"), "classification", ["hidden.*@all", "attention_scores.*"])
    return path


def loop(steps: int, **trainer: object) -> dict[str, Any]:
    return {
        "pass_name": "tiny", "bank": False, "steps": steps,
        "trainer": {"learning_rate": RATE, "lr_scheduler_type": "constant", "save_total_limit": 99, **trainer},
    }  # fmt: skip


def watched(tiny: ModuleType, store: Path, output: Path, steps: int, **trainer: object) -> list[dict[str, Tensor]]:
    """The student's weights before a run and after each of its steps."""
    seen: list[dict[str, Tensor]] = []

    def look(bundle: Bundle) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in bundle.student.state_dict().items()})
        return {"score": 0.0}

    options = loop(steps, eval_steps=1, eval_on_start=True, **trainer)
    tiny.run([store], output, methods=[MethodSpec(name="mobilebert", options=SLOW)], evaluate=look, **options)
    assert len(seen) == steps + 1
    return seen


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Block -> its largest change in a step; ``else`` for all other weights."""
    found = {"layer.0": 0.0, "layer.1": 0.0, "else": 0.0}
    for name, weight in after.items():
        part = next((block for block in found if f".{block}." in name), "else")
        found[part] = max(found[part], float((weight - before[name]).abs().max()))
    return found


def test_what_is_off_keeps_its_bits_while_weights_decay(tiny: ModuleType, store: Path, tmp_path: Path) -> None:
    seen = watched(tiny, store, tmp_path, 8, weight_decay=0.5)
    steps = [moved(before, after) for before, after in pairwise(seen)]
    assert all(step["else"] == 0 for step in steps)
    assert [step["layer.0"] > 0 for step in steps] == [False, True, True, True, False, True, True, True]
    assert [step["layer.1"] > 0 for step in steps] == [False] * 5 + [True] * 3


def test_rates_are_those_of_the_curve(tiny: ModuleType, store: Path, tmp_path: Path) -> None:
    """Adam's first step moves each weight by the learning rate."""
    seen = watched(tiny, store, tmp_path, 8)
    first, second = moved(seen[1], seen[2]), moved(seen[5], seen[6])
    assert first["layer.0"] == pytest.approx(RATE * 3 * 0.25 / 0.5, rel=1e-3)
    assert second["layer.1"] == pytest.approx(RATE * 3 * 0.25 / 0.5, rel=1e-3)
    assert 0 < second["layer.0"] < 0.2 * second["layer.1"]


def test_the_optimiser_knows_nothing_of_a_block_before_its_slice(tiny: ModuleType, store: Path, tmp_path: Path) -> None:
    methods = [MethodSpec(name="mobilebert", options=SLOW)]
    tiny.run([store], tmp_path, methods=methods, **loop(8, save_steps=2))
    taken = {}
    for step in (4, 8):
        state = torch.load(tmp_path / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        counted: dict[int, set[int]] = {}
        for group in state["param_groups"]:
            steps = {int(state["state"][number]["step"]) if number in state["state"] else 0 for number in group["params"]}
            counted.setdefault(group["part"], set()).update(steps)
        taken[step] = counted
    assert taken == {4: {0: {0}, 1: {3}, 2: {0}}, 8: {0: {0}, 1: {6}, 2: {3}}}


def test_a_run_resumed_within_a_slice_is_the_uninterrupted_one(tiny: ModuleType, store: Path, tmp_path: Path) -> None:
    methods = [MethodSpec(name="mobilebert", options=SLOW)]
    bundle, whole = tiny.run([store], tmp_path / "whole", methods=methods, **loop(11, save_steps=1, weight_decay=0.1))
    weights = {name: tensor.clone() for name, tensor in bundle.state_dict().items()}
    for step in (2, 7):  # slices begin at 0 and 6
        copied = tmp_path / f"from-{step}" / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}", copied)
        bundle, resumed = tiny.run([store], tmp_path / f"from-{step}", methods=methods, **loop(11, save_steps=1, weight_decay=0.1))
        assert resumed.resumed == step
        assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in whole.history]
        for name, tensor in bundle.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
