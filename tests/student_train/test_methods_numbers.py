"""Losses and gradients of every method against its paper's formula, written once more in float64 (golden/methods)."""

import dataclasses
import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from case import Case, all_cases, all_of, modules
from given import Given, in_words, make_batch, make_features, shape

from online.batch import IGNORED, Batch, Drawn, Features, TopBanded, TopDrawn, TopK
from store.features import FeatureKey, neurons
from store.shape import ModelShape
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method
from student_train.step import Survey

torch.set_num_threads(1)

CASES = all_cases()
CHANGES: list[tuple[str, dict[str, object]]] = [change for module in modules().values() for change in module.CHANGES]


@dataclasses.dataclass
class Setting:
    """A method with the features that it is tried on."""

    method: Method
    student: Features
    teacher: Features
    batch: Batch
    shape: ModelShape
    teachers: dict[str, ModelShape]


def setting(case: Case, changed: dict[str, object] | None = None) -> Setting:
    student, batch = shape(case.sizes[0], *case.head), make_batch(case.labels)
    teachers = {name: shape(sizes, *case.head) for name, sizes in {"first": case.sizes[1], **case.others}.items()}
    torch.manual_seed(0)
    several = METHODS[case.method].several
    method = parse_method(case.method, case.options | (changed or {}), student, teachers if several else teachers["first"])
    if not several:
        teachers = {"": teachers["first"]}
    method.moment = case.moment
    labels = np.full(5, np.nan) if batch.row_labels is None else batch.row_labels.double().numpy()
    method.survey(Survey(rows=5, numbers=np.arange(5), labels=np.where(labels == IGNORED, np.nan, labels)))
    if case.set_up is not None:
        case.set_up(method)
    answers: Features = {}
    for number, (name, one) in enumerate(teachers.items(), 2):
        keys = frozenset(key.of("") for key in method.teacher_keys if key.pass_name == name)
        answers |= {key.of(name): value for key, value in make_features(keys, one, batch, number).items()}
    return Setting(method, make_features(method.student_keys, student, batch, 1), answers, batch, student, teachers)


def leaves(features: Features) -> Features:
    return {key: value.clone().requires_grad_() for key, value in features.items() if isinstance(value, Tensor)}


def label(key: FeatureKey) -> str:
    return f"{key.pass_name}/{key.name}" if key.pass_name else key.name


def named(features: Features, double: bool) -> dict[str, Tensor | TopK | Drawn | TopDrawn | TopBanded]:
    """By teacher, site and layer; where a site is read twice, the second with its positions."""
    result: dict[str, Tensor | TopK | Drawn | TopDrawn | TopBanded] = {}
    for key, value in sorted(features.items(), key=lambda item: str(item[0])):
        changed = value.detach().double().requires_grad_(double) if isinstance(value, Tensor) else value
        result[str(key) if label(key) in result else label(key)] = changed
    return result


def test_every_method_has_a_formula() -> None:
    assert {case.method for case in CASES.values()} == {name for name, cls in METHODS.items() if not cls.live}  # those: files of their own


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_formula_in_float64(name: str) -> None:
    case = CASES[name]
    given = setting(case)
    method, features = given.method, leaves(given.student)
    terms, counts = method(features, given.teacher, given.batch), method.counts(given.batch)
    trained = {n: p for n, p in method.named_parameters() if n not in case.fixed}
    exact = Given(
        named(given.student, True),
        named(given.teacher, False),
        {n: p.detach().double().requires_grad_(n in trained) for n, p in method.named_parameters()}
        | {n: b.detach().double() for n, b in method.named_buffers()},
        given.batch,
        given.shape,
        next(iter(given.teachers.values())),
        given.teachers,
        case.moment,
    )
    expected = case.reference(exact)

    assert list(terms) == list(counts)
    assert set(terms) == set(expected)
    for term, (total, count) in expected.items():
        assert terms[term].dtype == counts[term].dtype == torch.float32
        assert terms[term].shape == counts[term].shape == ()
        assert counts[term].item() == pytest.approx(count)
        assert terms[term].item() == pytest.approx(total.item(), rel=2e-5)

    read = {key: leaf for key, leaf in features.items() if key.name not in case.unread}
    inputs = [*read.values(), *trained.values()]
    exact_inputs = [exact.S[str(k)] if str(k) in exact.S else exact.S[k.name] for k in read] + [exact.P[n] for n in trained]
    unread = [leaf for key, leaf in features.items() if key.name in case.unread]
    assert not unread or set(torch.autograd.grad(sum(terms.values()), unread, retain_graph=True, allow_unused=True)) == {None}
    ours = torch.autograd.grad(sum(terms.values()), inputs)
    theirs = torch.autograd.grad(sum(total for total, _ in expected.values()), exact_inputs)
    for mine, true in zip(ours, theirs, strict=True):
        assert true.abs().max() > 0
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=2e-5)


def padded(features: Features, junk: float) -> Features:
    """The same features in a batch with three more tokens of padding, with ``junk`` wherever padding is read or reads."""
    real = torch.nn.functional.pad(make_batch().mask, (0, 3))
    result: Features = {}
    for key, value in features.items():
        if key.positions != "all":
            result[key] = value
        elif isinstance(value, tuple):
            tensors = [torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, 3)) for tensor in value]
            masks = [~real.reshape(*real.shape, *([1] * (tensor.dim() - 2))) for tensor in tensors]
            numbers = [tensor.masked_fill(mask, junk) for tensor, mask in zip(tensors[1:], masks[1:], strict=True)]
            result[key] = type(value)(tensors[0], *numbers)
        elif key.site.startswith("attention"):
            pairs = real[:, None, :, None] & real[:, None, None, :]
            result[key] = torch.nn.functional.pad(value, (0, 3, 0, 3)).masked_fill(~pairs, junk)
        else:
            result[key] = torch.nn.functional.pad(value, (0, 0, 0, 3)).masked_fill(~real[..., None], junk)
    return result


def longer(batch: Batch) -> Batch:
    pad = torch.nn.functional.pad
    fields = {
        name: getattr(batch, name) for name in ("mask", "input_ids", "token_labels", "phrases", "interchange") if hasattr(batch, name)
    }
    fills = {"token_labels": IGNORED, "interchange": -1}
    return dataclasses.replace(
        batch, **{name: pad(value, (0, 3), value=fills.get(name, 0)) for name, value in fields.items() if value is not None}
    )


@pytest.mark.parametrize("name", CASES)
def test_what_stands_on_padding_reaches_neither_loss_nor_gradient(name: str) -> None:
    one, two = setting(CASES[name]), setting(CASES[name])  # a method may have state that its calls change
    features, other = leaves(one.student), leaves(padded(two.student, math.nan))
    terms = one.method(features, one.teacher, one.batch)
    same = two.method(other, padded(two.teacher, math.nan), longer(two.batch))
    for term, count in two.method.counts(longer(two.batch)).items():
        assert torch.equal(count, one.method.counts(one.batch)[term])
        torch.testing.assert_close(same[term], terms[term], rtol=1e-6, atol=1e-6)
    sum(terms.values()).backward()
    sum(same.values()).backward()
    for key, leaf in features.items():
        if key.name in CASES[name].unread:
            continue
        gradient = padded({key: leaf.grad}, 0)[key]
        torch.testing.assert_close(other[key].grad, gradient, rtol=1e-5, atol=1e-6)


def part(batch: Batch, features: Features, rows: slice) -> tuple[Batch, Features]:
    """A run of the batch's rows and their features."""
    first, last = (int(batch.labelled[:row].sum()) for row in (rows.start, rows.stop))

    def cut(key: FeatureKey, value: Tensor) -> Tensor:
        return value[first:last] if key.positions in ("labels", "masked") else value[rows]

    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    smaller = Batch(**{name: value if value is None or name == "verbalisers" else value[rows] for name, value in values.items()})
    return smaller, {k: type(v)(*(cut(k, x) for x in v)) if isinstance(v, tuple) else cut(k, v) for k, v in features.items()}


@pytest.mark.parametrize("name", CASES)
def test_sums_and_counts_of_two_micro_batches_add_up(name: str) -> None:
    one = setting(CASES[name])
    whole, counts = one.method(one.student, one.teacher, one.batch), one.method.counts(one.batch)
    total, number = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0.0)
    two = setting(CASES[name])
    for rows in (slice(0, 2), slice(2, 5)):  # a group is never torn apart
        smaller, of_student = part(two.batch, two.student, rows)
        for term, loss in two.method(of_student, part(two.batch, two.teacher, rows)[1], smaller).items():
            total[term] += loss.item()
            number[term] += two.method.counts(smaller)[term].item()
    for term in whole:
        assert number[term] == pytest.approx(counts[term].item())
        coupled = term in CASES[name].coupled  # rows are compared with those of one micro-batch
        assert (total[term] == pytest.approx(whole[term].item(), rel=1e-5)) is not coupled


ZERO = {name: case for name, case in CASES.items() if case.zero}


@pytest.mark.parametrize("name", ZERO)
def test_a_student_equal_to_its_teacher_has_no_loss_but_that_of_labels(name: str) -> None:
    case = CASES[name]
    large, options = case.sizes[1], case.options
    if isinstance(options.get("layers"), list):  # uniform and last are the identity already
        options = options | {"layers": [[1, 1]]}
    if "student_layer" in options:
        options = options | {"student_layer": options["teacher_layer"]}
    equal = dataclasses.replace(case, options=options, sizes=(large, large), others=dict.fromkeys(case.others, large))
    given = setting(equal)
    for module in given.method.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.eye_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    keys = {key.of("") for key in given.method.teacher_keys} | {key for key in given.method.student_keys if not key.form}
    teacher = make_features(frozenset(keys), given.shape, given.batch, 3)
    for key in [key for key in teacher if key.words]:
        logits = teacher[FeatureKey("lm_logits", None, key.positions)]
        assert isinstance(logits, Tensor)
        teacher[key] = in_words(logits, key.form, torch.Generator())
    for key in [key for key in teacher if key.kept]:
        whole = teacher[dataclasses.replace(key, form="")]
        assert isinstance(whole, Tensor)
        teacher[key] = whole[..., neurons(whole.shape[-1], key.kept)]
    answers = {key: teacher[key.of("")] for key in given.method.teacher_keys}
    terms = given.method({key: teacher[key] for key in given.method.student_keys}, answers, given.batch)
    for term in set(terms) - {"hard", "mlm"}:
        assert terms[term].item() == pytest.approx(0, abs=2e-5)


def answer(name: str, changed: dict[str, object]) -> tuple[object, ...]:
    """All that an option can act on: what is read, each term's mean and gradient, and what the method then is."""
    given = setting(CASES[name], changed)
    features = leaves(given.student)
    terms = given.method(given.student | features, given.teacher, given.batch)
    loss = torch.stack(list(terms.values())).sum()
    slopes = torch.autograd.grad(loss, list(features.values()), allow_unused=True) if features else ()
    means = {term: terms[term].item() / count.item() for term, count in given.method.counts(given.batch).items()}
    given.method.learned(means)
    state = {name: tensor.tolist() for name, tensor in given.method.state_dict().items()}
    learned = [slope if slope is None else slope.tolist() for slope in slopes]
    return given.method.student_keys, given.method.teacher_keys, means, learned, state, given.method.gates(), given.method.perturbs


@pytest.mark.parametrize(("name", "changed"), CHANGES)
def test_an_option_changes_the_answer(name: str, changed: dict[str, object]) -> None:
    assert answer(name, changed) != answer(name, {})
    assert answer(name, {}) == answer(name, {})


def test_every_option_is_among_the_changed_ones() -> None:
    options = {(name, option) for name, cls in METHODS.items() if not cls.live for option in options_of(cls)}
    assert options == {(CASES[name].method, option) for name, changed in CHANGES for option in changed} | set(all_of("ELSEWHERE"))


def options_of(cls: type[Method]) -> list[str]:
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]


def test_batches_without_any_label_give_zero_that_can_still_be_trained_on() -> None:
    for name in ("task_loss classes", "task_loss scores", "task_loss choices", "task_loss tokens", "lm_loss", "kd classes"):
        given = setting(dataclasses.replace(CASES[name], labels=""))
        features = leaves(given.student)
        terms = given.method(features, given.teacher, given.batch)
        term = "words" if name == "lm_loss" else "hard"
        assert given.method.counts(given.batch)[term] == 0
        assert terms[term] == 0
        terms[term].backward()
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in features.values())


def test_half_precision_features_are_compared_in_float32() -> None:
    given = setting(CASES["tinybert"])
    halves: list[Features] = [{key: value.bfloat16() for key, value in side.items()} for side in (given.student, given.teacher)]
    rounded = [{key: value.float() for key, value in side.items()} for side in halves]
    first, second = (given.method(*sides, given.batch).values() for sides in (halves, rounded))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
