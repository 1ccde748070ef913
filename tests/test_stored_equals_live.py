"""The reason to trust a cache: what a student learns from a store is, to the bit, what it learns from the live teacher.

Everything here is real: a teacher folder, rows from text, a dump, a student, its loss and gradients. Batches of training
differ from those of the dump in size, order and company.
"""

import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent / "student_train"))
sys.path.insert(0, str(Path(__file__).parent / "student_train" / "golden"))

from case import all_of
from lab import SETTINGS, Lab, make_lab

from online.batch import Batch, Features, Value, bucket, dense
from online.collate import collate
from online.derive import PAIRWISE
from online.models import HEADS, LoadedModel
from online.words import Words
from store.errors import MissingFeature
from store.features import FeatureKey
from store.intervention import Intervention
from store.shape import ModelShape
from student_train.bundle import Bundle
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method
from student_train.recipe import MethodSpec
from student_train.step import Survey
from student_train.teacher import StoredTeacher
from teacher_dump.records import read_errors


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lab]:
    made: dict[str, Lab] = {}

    def lab(name: str) -> Lab:
        if name not in made:
            made[name] = make_lab(tmp_path_factory.mktemp(name), name)
        return made[name]

    return lab


def both(
    lab: Lab, wanted: frozenset[FeatureKey], rows: NDArray[np.int64], kept: str = "float32", written: Intervention | None = None
) -> tuple[Batch, Features, Features]:
    """A batch, and what store and model answer for it."""
    stored = lab.dump(wanted, kept, written)
    live, batch = lab.live(wanted, written), collate(lab.store, rows)
    return batch, stored.features(batch, stored.fetch(rows)), live.features(batch, live.fetch(rows))


def tensors(value: Value) -> tuple[Tensor, ...]:
    if isinstance(value, Words):
        return (value.dense(),)
    return (value,) if isinstance(value, Tensor) else tuple(value)


ATTENTION = ("attention_scores.2", "attention_probs.4", "value.4")
EVERYWHERE = (
    *ATTENTION,
    "query.1",
    "key.1",
    "input.1",
    "value.3",
    "hidden.0",
    "hidden.3",
    "final",
    "hidden.2@first",
    "hidden.4@mean",
    "hidden.4@last",
)
WORDS_AT_LABELS = ("lm_logits@labels", "lm_logits@labels:top8", "hidden.4@mean")
FEATURES = [(name, ATTENTION) for name in SETTINGS] + [(name, EVERYWHERE) for name in SETTINGS]
FEATURES += [
    (name, words) for name in SETTINGS if name != "class" for words in (WORDS_AT_LABELS, ("lm_logits@labels:top8",), ("lm_logits",))
]
FEATURES += [("class", ("task_logits@row", "hidden.2@first"))]


def keys(names: Iterable[str]) -> frozenset[FeatureKey]:
    return frozenset(map(FeatureKey.parse, names))


@pytest.mark.parametrize(("name", "features"), FEATURES)
def test_features_are_equal_to_the_bit_for_equal_padding(name: str, features: tuple[str, ...], labs: Callable[[str], Lab]) -> None:
    lab = labs(name)
    _, stored, live = both(lab, keys(features), lab.some_rows(32))
    assert stored.keys() == live.keys() == keys(features)
    for key, value in live.items():
        for found, expected in zip(tensors(stored[key]), tensors(value), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), key


@pytest.mark.parametrize("name", ["mlm", "modern", "causal"])
def test_features_differ_by_less_than_2e_5_for_other_padding(name: str, labs: Callable[[str], Lab]) -> None:
    lab = labs(name)
    features = (*EVERYWHERE, "head_input@labels")
    batch, stored, live = both(lab, keys(features), lab.some_rows(None))
    assert len(set(map(bucket, batch.lengths.tolist()))) == 2
    for key in keys(features):
        found, expected = dense(stored, key), dense(live, key)
        if key.site in PAIRWISE:
            found, expected = found.transpose(1, 2)[batch.mask], expected.transpose(1, 2)[batch.mask]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_within_its_declared_error_and_derived_errors_are_of_that_size(dtype: str, labs: Callable[[str], Lab]) -> None:
    lab = labs("mlm")
    _, stored, live = both(lab, keys(EVERYWHERE), lab.some_rows(32), dtype)
    teacher = lab.dump(keys(EVERYWHERE), dtype)
    info = lab.reopened().manifest.passes[lab.passes[keys(EVERYWHERE), dtype, None]]
    error = {spec.feature: spec.error for spec in info.features}
    assert set(error.values()) == {2.0**-11 if dtype == "float16" else 2.0**-8}
    assert teacher.shape == lab.live(keys(EVERYWHERE)).shape
    for key in keys(EVERYWHERE):
        found, expected = dense(stored, key), dense(live, key)
        if key in error:
            assert ((found - expected).abs() <= error[key] * expected.abs() + 1e-6).all(), key
        elif key.site == "attention_scores":
            seen = expected[expected > torch.finfo(torch.float32).min]
            assert (found[expected > torch.finfo(torch.float32).min] - seen).norm() / seen.norm() < 4 * max(error.values())


def test_compressed_features_are_equal_to_the_bit(labs: Callable[[str], Lab]) -> None:
    lab = labs("causal")
    wanted = keys(("hidden.2", "attention_probs.3", "value.3", "lm_logits@labels:top8"))
    _, stored, live = both(lab, wanted, lab.some_rows(32), "compressed")
    info = lab.reopened().manifest.passes[lab.passes[wanted, "compressed", None]]
    assert all(spec.compressed and spec.exact for spec in info.features)
    for key in wanted:
        assert all(torch.equal(*pair) for pair in zip(tensors(stored[key]), tensors(live[key]), strict=True)), key


@pytest.mark.parametrize("kept", ["int8", "float8", "rounded"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("mlm", "tinybert"), ("modern", "minilm"), ("packed", "hid_seq"), ("causal", "val_kl"), ("class", "hid_cls"), ("mlm", "lm_kd")],
)
def test_what_a_method_is_taught_is_within_the_declared_and_the_measured_errors(
    name: str, method: str, kept: str, labs: Callable[[str], Lab]
) -> None:
    lab = labs(name)
    wanted = parse_method(method, {}, LoadedModel.of(lab.student(), lab.head).shape, lab.shape).teacher_keys
    rows = lab.some_rows(32)
    batch, stored, live = both(lab, wanted, rows, kept)
    passed = lab.passes[wanted, kept, None]
    specs = {spec.feature: spec for spec in lab.reopened().manifest.passes[passed].features}
    measured = read_errors(lab.folder / "store", passed)
    assert any(not spec.exact for spec in specs.values())
    assert {spec.codec for spec in specs.values()} == {"cast" if kept == "rounded" else kept}
    for key in wanted:
        found, expected = dense(stored, key).double(), dense(live, key).double()
        if key in specs:
            bound = specs[key].error * expected.abs() + specs[key].error_of_largest * expected.abs().amax(-1, keepdim=True)
            assert ((found - expected).abs() <= bound + 1e-6).all(), key
        else:
            where = expected > torch.finfo(torch.float32).min
            if key.site in PAIRWISE:
                where &= batch.mask[:, None, :, None]
            error = (found - expected)[where].norm() / expected[where].norm()
            assert 0 < error < 2 * measured[str(key)], key
    found_loss, expected_loss = (float(learned(lab, method, {}, batch, features)[0]) for features in (stored, live))
    assert found_loss == pytest.approx(expected_loss, rel=0.15)


def test_a_store_answers_when_the_teacher_is_gone(labs: Callable[[str], Lab], tmp_path: Path) -> None:
    lab = labs("mlm")
    stored, rows = lab.dump(keys(ATTENTION)), lab.some_rows(32)
    batch = collate(lab.store, rows)
    expected = stored.features(batch, stored.fetch(rows))
    lab.teacher.rename(lab.folder / "gone")
    try:
        again = StoredTeacher(lab.reopened(), lab.passes[keys(ATTENTION), "float32", None], keys(ATTENTION))
        found = again.features(batch, pickle.loads(pickle.dumps(again)).fetch(rows))
    finally:
        (lab.folder / "gone").rename(lab.teacher)
    for key, value in expected.items():
        assert torch.equal(dense(found, key), tensors(value)[0])


# Methods


CASES: list[tuple[str, str, dict[str, Any]]] = [(name, method, options) for method, name, options in all_of("LIVE")]


def test_every_method_that_learns_from_a_teacher_is_compared() -> None:
    assert {name for _, name, _ in CASES} == {name for name, method in METHODS.items() if method.needs_teacher and not method.live}


def learned(lab: Lab, method: str, options: dict[str, Any], batch: Batch, features: Features) -> list[Tensor]:
    """The loss of a fresh student, with dropout, and the gradients of all its weights and the method's."""
    student = LoadedModel.of(lab.student().train(), lab.head)
    torch.manual_seed(5)
    made = parse_method(method, options, student.shape, shapes(lab, method))
    bundle = Bundle(student, [(MethodSpec(name=method), made)])
    rows = np.arange(len(lab.store.rows))
    bundle.survey(lambda: Survey(len(rows), rows, lab.store.rows.label_at(rows)))
    torch.manual_seed(3)
    loss, _ = bundle(batch, features, bundle.counts(batch, True), True, (batch, features))
    weights = [weight for weight in bundle.parameters() if weight.requires_grad]
    return [loss.detach(), *(grad for grad in torch.autograd.grad(loss, weights, allow_unused=True) if grad is not None)]


def shapes(lab: Lab, method: str) -> ModelShape | dict[str, ModelShape]:
    """What the method is told of its teachers: where it takes several, the lab's one answers twice."""
    return {"first": lab.shape, "second": lab.shape} if METHODS[method].several else lab.shape


def of_teachers(lab: Lab, made: Method, rows: NDArray[np.int64]) -> tuple[Batch, Features, Features]:
    """A batch, and what store and model answer for it as each of the teachers."""
    stored, live = Features(), Features()
    for name in ("first", "second") if made.several else ("",):
        wanted = frozenset(key.of("") for key in made.teacher_keys if key.pass_name == name)
        batch, *answers = both(lab, wanted, rows, written=made.interventions.get(name))
        for features, of_one in zip((stored, live), answers, strict=True):
            features.update({key.of(name): value for key, value in of_one.items()})
    return batch, stored, live


@pytest.mark.parametrize(
    ("padding", "name", "method", "options"),
    [(padding, *case) for case in CASES for padding in ("equal", "other") if (case[0], padding) != ("packed", "other")],
)
def test_loss_and_gradients_from_a_store_are_those_of_the_live_teacher(
    padding: str, name: str, method: str, options: dict[str, Any], labs: Callable[[str], Lab]
) -> None:
    lab = labs(name)
    made = parse_method(method, options, LoadedModel.of(lab.student(), lab.head).shape, shapes(lab, method))
    rows = lab.some_rows(32 if padding == "equal" else None)
    batch, stored, live = of_teachers(lab, made, rows)
    found, expected = (learned(lab, method, options, batch, features) for features in (stored, live))
    assert len(found) == len(expected) > (1 if made.student_keys == frozenset() else 8)
    assert float(expected[0]) > 0
    for one, other in zip(found, expected, strict=True):
        if padding == "equal":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_a_real_teacher_teaches_the_same_from_a_store_as_live(shared: Path, tmp_path: Path) -> None:
    teacher = shared / "teachers" / "mlm"

    def student() -> PreTrainedModel:
        torch.manual_seed(2)
        narrow = BertConfig.from_pretrained(teacher, num_hidden_layers=2, hidden_size=48, intermediate_size=96)
        return HEADS["masked_lm"].from_config(narrow)

    source = {"files": str(shared / "data" / "corpus" / "wikipedia_valid.parquet"), "limit": 16}
    rows = {"sources": [source], "objective": "mlm", "max_length": 48, "slot_tokens": 512, "empty": "skip"}
    lab = Lab(tmp_path, teacher, "masked_lm", rows, 1024, 6, student)
    for method, options in (("minilmv2", {"relation_heads": 24}), ("tinybert", {}), ("lm_kd", {}), ("lm_kd", {"top": 32})):
        wanted = parse_method(method, options, LoadedModel.of(lab.student(), lab.head).shape, lab.shape).teacher_keys
        batch, stored, live = both(lab, wanted, lab.some_rows(48))
        found, expected = learned(lab, method, options, batch, stored), learned(lab, method, options, batch, live)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), method


# What a store lacks


def test_a_feature_that_is_missing_prints_the_recipe_lines_that_would_hold_it(labs: Callable[[str], Lab]) -> None:
    lab = labs("mlm")
    lab.dump(keys(["attention_probs.4"]))
    name = lab.passes[keys(["attention_probs.4"]), "float32", None]
    StoredTeacher(lab.reopened(), name, keys(["attention_scores.4", "query.4", "hidden.3@first"]))
    with pytest.raises(MissingFeature) as caught:
        StoredTeacher(lab.reopened(), name, keys(["attention_scores.4", "value.4", "lm_logits@labels"]))
    message = str(caught.value)
    assert "lm_logits@labels, value.4@all neither stored nor" in message
    assert "features:\n  - attention_probs.4@all\n  - lm_logits@labels\n  - value.4@all\n" in message
    assert "teacher-dump run RECIPE" in message
    with pytest.raises(MissingFeature, match=r"(?s)has no pass 'other'; it has pass-.*features:\n  - value.1@all"):
        StoredTeacher(lab.reopened(), "other", keys(["value.1"]))


def test_a_live_teacher_says_what_it_cannot_answer(labs: Callable[[str], Lab]) -> None:
    lab = labs("class")
    with pytest.raises(ValueError, match="only a store knows which words were chosen"):
        lab.live(keys(["lm_logits@labels:select"]))
    with pytest.raises(ValueError, match="expected one of masked_lm, causal_lm"):
        lab.live(keys(["lm_logits@labels"]))
    with pytest.raises(ValueError, match="blocks 1 to 4"):
        lab.live(keys(["value.5"]))
