"""Stacked internal distillation: when the next pair of blocks comes in, and what the method refuses."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from store.shape import ModelShape
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.moment import Moment
from student_train.recipe import MethodSpec


def shape(layers: int = 2, *, width: int = 8, heads: int = 2, head: str = "classification", labels: int = 2) -> ModelShape:
    return ModelShape.model_validate(
        dict(family="bert", layers=layers, width=width, heads=heads, kv_heads=heads, head_width=4, vocab=9, causal=False, pre_norm=False)
        | dict(windows=(None,) * layers, head=head, labels=labels)
    )


def made(layers: int, **options: object) -> Method:
    return parse_method("sid", options, shape(layers), shape(2 * layers))


def levels(method: Method, steps: int, told: dict[int, float], epoch_steps: float = 4.0) -> list[int]:
    """How many pairs are in the sum in each step, of a run that reads the cosine loss ``told`` after some of them."""
    found = []
    for step in range(steps):
        method.moment = Moment(step=step, steps=steps, epoch_steps=epoch_steps, seed=0)
        found.append(method._level())
        method.learned({"attention": 0.0, "cosine": told.get(step, 9.0)})
    return found


@pytest.mark.parametrize(
    ("layers", "steps", "expected"),
    [(2, 9, [1] * 3 + [2] * 3 + [3] * 3), (3, 10, [1, 1, 1, 2, 2, 3, 3, 3, 4, 4]), (2, 2, [1, 2]), (1, 5, [1, 1, 1, 2, 2])],
)
def test_a_phase_is_cut_into_equal_slices_the_last_one_for_the_soft_labels(layers: int, steps: int, expected: list[int]) -> None:
    assert levels(made(layers), steps, {}) == expected


def test_a_pair_comes_in_as_soon_as_those_before_it_are_matched_and_at_the_end_of_a_slice_at_the_latest() -> None:
    matched = {1: 0.49, 2: 0.51}
    assert levels(made(2, threshold=0.5), 12, {}) == [1] * 4 + [2] * 4 + [3] * 4
    assert levels(made(2, threshold=0.5), 12, matched) == [1] * 2 + [2] * 6 + [3] * 4
    assert levels(made(2, threshold=0.5), 12, {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1}) == [1, 2] + [3] * 10
    assert levels(made(2), 12, {0: 0.0, 1: -1e-7}) == [1] * 4 + [2] * 4 + [3] * 4


def test_the_threshold_is_one_of_the_cosine_loss_without_its_weight() -> None:
    assert levels(made(2, threshold=0.5, cosine=2.0, limit=99), 4, {0: 1.01}) == [1] * 4
    assert levels(made(2, threshold=0.5, cosine=2.0, limit=99), 4, {0: 0.99}) == [1, 2, 2, 2]


def test_a_limit_counts_the_epochs_of_each_pair_by_itself() -> None:
    assert levels(made(2, limit=1.5), 16, {}) == [1] * 6 + [2] * 6 + [3] * 4
    assert levels(made(2, limit=1.5, threshold=0.5), 16, {1: 0.1}) == [1] * 2 + [2] * 6 + [3] * 8
    assert levels(made(3, limit=0.25), 5, {}) == [1, 2, 3, 4, 4]
    assert levels(made(2, limit=9), 5, {}) == [1] * 5


def test_a_step_that_told_nothing_of_the_cosine_matches_nothing() -> None:
    method = made(2, threshold=0.5)
    method.learned({"attention": 0.1})
    assert method._level() == 1


def test_where_a_run_stands_is_in_its_state() -> None:
    method, other = made(2, threshold=0.5, limit=1.0), made(2, threshold=0.5, limit=1.0)
    levels(method, 3, {1: 0.1})
    other.load_state_dict(method.state_dict())
    assert {name: int(value) for name, value in other.state_dict().items()} == {"inside": 2, "since": 2}
    assert levels(other, 8, {}) == [2] * 6 + [3] * 2


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, shape(width=8), shape(4, width=12), "equal widths of student and teacher, found 8 and 12; cosine: 0"),
        ({}, shape(heads=4), shape(4), "equal numbers of attention heads of student and teacher, found 4 and 2; attention: 0"),
        ({"attention": 0, "cosine": 0}, shape(), shape(4), "every weight is 0"),
        ({"cosine": 0, "threshold": 0.1}, shape(), shape(4), "threshold is one of the cosine loss"),
        ({"threshold": 0}, shape(), shape(4), "threshold: .*greater than 0"),
        ({}, shape(labels=3), shape(4), "equal numbers of labels"),
        ({}, shape(head="masked_lm", labels=0), shape(4, head="masked_lm", labels=0), "head"),
    ],
)
def test_bad_options_say_what_was_expected(options: dict[str, object], student: ModelShape, teacher: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=f"method sid: .*{message}"):
        parse_method("sid", options, student, teacher)


def test_attention_alone_takes_a_narrower_student() -> None:
    method = parse_method("sid", {"cosine": 0}, shape(width=6), shape(4, width=12))
    assert {key.site for key in method.student_keys} == {"attention_scores", "task_logits"}


def test_a_run_moves_on_by_its_own_losses(tiny: ModuleType, stores: ModuleType, tmp_path: Path) -> None:
    """Each level shows in the log by its terms; how they change is taken from the losses there."""
    store = stores.write_store(tmp_path, "classification", ["hidden.*@first", "attention_scores.*", "task_logits@row"])
    spec = MethodSpec(name="sid", options={"threshold": 1.9, "limit": 99.0})
    options = {"pass_name": "tiny", "bank": False, "steps": 12, "trainer": {"learning_rate": 0.02, "save_strategy": "no"}}
    bundle, result = tiny.run([store], tmp_path / "out", methods=[spec], **options)
    cosines = [entry["sid/cosine"] for entry in result.history if "sid/cosine" in entry]
    assert "sid/soft" in result.history[-1], json.dumps(result.history[-1])
    first = next(step for step, cosine in enumerate(cosines) if cosine < 1.9)
    second = next(step for step, cosine in enumerate(cosines) if step > first and cosine < 1.9)
    assert len(cosines) == second + 1
    assert torch.equal(bundle.methods["sid"].since, torch.tensor(second + 1))
