"""PKD, ALP-KD, RAIL-KD and Universal-KD: which blocks meet, what is drawn, and what they refuse."""

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from online.batch import Features
from online.collate import collate
from store.features import FeatureKey
from store.reader import Store
from store.shape import ModelShape
from store.strict import parse
from student_train import checkpoint
from student_train.bundle import Bundle
from student_train.methods import parse_method
from student_train.methods.rail_kd import RAILKD
from student_train.methods.universal_kd import UniversalKD
from student_train.moment import Moment
from student_train.output import student_folder
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import run


def shape(layers: int, *, width: int = 16, head: str = "classification", labels: int = 2, causal: bool = False) -> ModelShape:
    return ModelShape.model_validate(
        dict(family="bert", layers=layers, width=width, heads=4, kv_heads=4, head_width=4, vocab=50, causal=causal, pre_norm=False)
        | dict(windows=(None,) * layers, head=head, labels=labels)
    )


def blocks(keys: frozenset[FeatureKey]) -> list[int]:
    return sorted(key.layer or 0 for key in keys)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("skip", 6, 12, [2, 4, 6, 8, 10]),
        ("last", 6, 12, [7, 8, 9, 10, 11]),
        ("last", 3, 12, [10, 11]),
        ("skip", 6, 24, [4, 8, 12, 16, 20]),
        ([[1, 12]], 6, 12, [12]),
    ],
)
def test_patience_meets_the_published_blocks(layers: object, student: int, teacher: int, expected: list[int]) -> None:
    method = parse_method("pkd", {"layers": layers}, shape(student), shape(teacher))
    assert blocks(method.teacher_keys) == expected
    assert blocks(method.student_keys) == list(range(1, len(expected) + 1))


def test_the_token_that_stands_for_a_row_is_the_last_in_causal_students() -> None:
    for name, options in (("pkd", {}), ("alp_kd", {}), ("universal_kd", {"stage": "distil"})):
        for causal, positions in ((False, "first"), (True, "last")):
            method = parse_method(name, options, shape(3, causal=causal), shape(6, causal=causal))
            assert {key.positions for key in method.student_keys | method.teacher_keys} == {positions}
            assert {key.site for key in method.student_keys | method.teacher_keys} == {"hidden"}


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher", "message"),
    [
        ("pkd", {}, shape(1), shape(12), "at least one pair of blocks; skip and last leave out the last of the student's, which has 1"),
        ("pkd", {"layers": "last"}, shape(6), shape(3), "layers: the teacher has blocks 1 to 3, found -2"),
        ("pkd", {"layers": [[7, 1]]}, shape(6), shape(12), "layers: the student has blocks 1 to 6, found 7"),
        ("pkd", {"layers": "uniform"}, shape(6), shape(12), "layers.*'skip' or 'last', found 'uniform'"),
        ("alp_kd", {"buckets": True}, shape(6), shape(3), "at least as many blocks as the student's 6, found 3; without buckets"),
        ("rail_kd", {}, shape(1), shape(12), "a student of 2 blocks to the teacher's 12, found 1"),
        ("rail_kd", {}, shape(6), shape(3), "a student of 2 blocks to the teacher's 3, found 6"),
        ("rail_kd", {"width": 0}, shape(3), shape(6), "width: .*greater than or equal to 1"),
        ("universal_kd", {}, shape(3), shape(6), "stage: required"),
        ("universal_kd", {"stage": "distil"}, shape(3, labels=1), shape(6), "2 or more labels, found head classification with 1; pkd"),
        ("universal_kd", {"stage": "distil"}, shape(3, head="base", labels=0), shape(6), "found head base with 0"),
        ("universal_kd", {"stage": "classifiers"}, shape(1), shape(6), "2 or more blocks on both sides, found 1 and 6"),
    ],
)
def test_bad_options_say_what_was_expected(
    name: str, options: dict[str, object], student: ModelShape, teacher: ModelShape, message: str
) -> None:
    with pytest.raises(ValueError, match=f"method {name}: .*{message}"):
        parse_method(name, options, student, teacher)


# RAIL-KD


def drawn(method: RAILKD, step: int, seed: int = 3) -> list[int]:
    """The teacher's blocks that the method reads in a step of a run of five steps an epoch."""
    method.moment = Moment(step=step, steps=10_000, epoch_steps=5.0, seed=seed)
    return [key.layer or 0 for key in method._drawn()]


def rail() -> RAILKD:
    method = parse_method("rail_kd", {}, shape(4), shape(12))
    assert isinstance(method, RAILKD)
    return method


def test_layers_are_drawn_once_an_epoch_in_order_and_again_after_a_resumption() -> None:
    first, second = rail(), rail()
    of_steps = [drawn(first, step) for step in range(50)]
    assert [drawn(second, step) for step in reversed(range(50))] == of_steps[::-1]
    for epoch in range(10):
        assert len({tuple(found) for found in of_steps[5 * epoch : 5 * epoch + 5]}) == 1
    assert len({tuple(found) for found in of_steps}) > 5
    assert all(found == sorted(set(found)) and len(found) == 3 for found in of_steps)
    assert any(drawn(first, step, seed=4) != of_steps[step] for step in range(0, 50, 5))


def test_every_inner_block_of_the_teacher_is_drawn_equally_often() -> None:
    method, epochs = rail(), 2000
    often = Counter(block for epoch in range(epochs) for block in drawn(method, 5 * epoch))
    assert often.keys() == set(range(1, 12))
    expected = epochs * 3 / 11
    spread = (epochs * 3 / 11 * (1 - 3 / 11)) ** 0.5
    assert all(abs(number - expected) < 5 * spread for number in often.values())


# Universal-KD


def universal(stage: str, student: ModelShape, teacher: ModelShape) -> UniversalKD:
    torch.manual_seed(0)
    method = parse_method("universal_kd", {"stage": stage}, student, teacher)
    assert isinstance(method, UniversalKD)
    return method


def of_teacher(method: UniversalKD, rows: int) -> Features:
    return {key: torch.randn(rows, 16) for key in sorted(method.teacher_keys)}


def test_classifiers_are_trained_without_a_pass_of_the_student(tiny: ModuleType, taught: Path) -> None:
    student = tiny.model(1, layers=3, width=16)
    passes: list[Tensor] = []
    student.model.register_forward_hook(lambda module, args, output: passes.append(output.logits))
    batch = collate(Store.open(taught), Store.open(taught).rows.select("train")[:6])
    for stage, expected in (("classifiers", 0), ("distil", 1)):
        method = universal(stage, student.shape, shape(6))
        bundle = Bundle(student, [(MethodSpec(name="universal_kd"), method)])
        loss, _ = bundle(batch, of_teacher(method, 6), bundle.counts(batch, True), True)
        loss.backward()
        assert len(passes) == expected
        trained = {name.split(".")[0] for name, weight in method.named_parameters() if weight.grad is not None}
        assert trained == {"teacher_classifiers" if stage == "classifiers" else "student_classifiers"}
        assert any(weight.grad is not None for weight in student.model.parameters()) == (stage == "distil")
        assert method.must_carry == (stage == "distil")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_second_phase_takes_over_the_classifiers_of_the_first_and_keeps_them(stores: ModuleType, tmp_path: Path) -> None:
    features = ["task_logits@row", "hidden.1@first", "hidden.2@first", "hidden.3@first"]
    data = {"store": str(stores.write_store(tmp_path / "made", "classification", features)), "pass_name": "tiny"}
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "learning_rate": 0.01, "weight_decay": 0.1}
    common = {"data": [data], "evaluate": [data], "steps": 20, "batch_rows": 8, "trainer": quiet}
    method = {"name": "universal_kd"}
    phases = [
        {"name": "classifiers", "student": {"layers": [2, 4]}, "methods": [{**method, "options": {"stage": "classifiers"}}], **common},
        {
            "name": "distil",
            "student": {"phase": "classifiers"},
            "methods": [{**method, "options": {"stage": "distil"}, "carry": "classifiers"}, {"name": "kd"}],
            **common,
        },
    ]
    made = parse(TrainRecipe, {"output": str(tmp_path / "out"), "phases": phases}, "recipe")
    run(made, ["test"], "classifiers")
    run(made, ["test"], "distil")
    results = [json.loads((made.output / name / "result.json").read_text()) for name in ("classifiers", "distil")]
    assert results[0]["after"]["universal_kd/classifiers"] < results[0]["before"]["universal_kd/classifiers"]
    assert results[1]["after"]["universal_kd/pseudo"] < results[1]["before"]["universal_kd/pseudo"]

    shipped = checkpoint.load(Store.open(data["store"]).shipped("tiny") / "model.safetensors")
    unchanged = checkpoint.load(student_folder(made, "classifiers") / "model.safetensors")
    assert torch.equal(unchanged["bert.encoder.layer.0.output.dense.weight"], shipped["bert.encoder.layer.1.output.dense.weight"])
    kept = [checkpoint.load(made.output / name / "methods.safetensors") for name in ("classifiers", "distil")]
    for number in range(3):
        name = f"universal_kd.teacher_classifiers.{number}.weight"
        assert torch.equal(kept[0][name], kept[1][name])
    name = "universal_kd.student_classifiers.0.weight"
    assert not torch.equal(kept[0][name], kept[1][name])
