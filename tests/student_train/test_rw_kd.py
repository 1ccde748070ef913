"""RW-KD's weights against what they mean: what one small step along a loss's gradient gains on held-out rows, in float64."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMultipleChoice, BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from online.batch import IGNORED, Batch, Features
from online.models import LoadedModel
from store.features import FeatureKey
from store.shape import Head
from student_train.methods import parse_method
from student_train.methods.rw_kd import RWKD
from student_train.step import Step, run

CLASSES: dict[Head, type[PreTrainedModel]] = {
    "classification": BertForSequenceClassification,
    "multiple_choice": BertForMultipleChoice,
    "token_classification": BertForTokenClassification,
}
STEP = 1e-5
"""Of the virtual step; gains are divided by it."""


def student_of(head: Head, labels: int) -> LoadedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=16,
        num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    return LoadedModel.of(CLASSES[head](config).train(), head)


def batch_of(seed: int, labels: list[float] | None, token_labels: list[int] | None = None) -> Batch:
    """Six rows of 3 to 6 tokens, in groups of three."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [4], [6], [3]])
    ids = torch.randint(1, 20, mask.shape, generator=generator) * mask
    places = None
    if token_labels is not None:
        places = torch.full(mask.shape, IGNORED)
        places[:, 1] = torch.tensor(token_labels)
    row_labels = None if labels is None else torch.tensor(labels)
    return Batch(torch.arange(6), ids, mask, torch.zeros_like(ids), None, None, places, row_labels, torch.tensor([0, 0, 0, 1, 1, 1]))


def logits_of(model: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    """Of a model of float64 as people call it: one line a decision."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "token_type_ids": batch.segments}
    if head == "multiple_choice":
        inputs = {name: value.view(2, 3, -1) for name, value in inputs.items()}
    logits: Tensor = model(**inputs).logits
    return logits[:, 1] if head == "token_classification" else logits


@dataclasses.dataclass
class Kind:
    head: Head
    labels: int
    train: Batch
    meta: Batch
    right: list[int | None]
    """Class or choice of each decision to train on, None without a label."""
    meta_right: list[int]


KINDS = {
    "classes": Kind(
        "classification", 3, batch_of(1, [0, 2, IGNORED, 1, 2, 0]), batch_of(2, [1, 1, 0, 2, 0, 2]),
        [0, 2, None, 1, 2, 0], [1, 1, 0, 2, 0, 2],
    ),
    "choices": Kind(
        "multiple_choice", 1, batch_of(3, [0, 0, 1, 1, 0, 0]), batch_of(4, [0, 1, 0, 0, 0, 1]), [2, 0], [1, 2],
    ),
    "tokens": Kind(
        "token_classification", 3, batch_of(5, None, [0, 1, 2, 2, 1, 0]), batch_of(6, None, [2, 2, 0, 1, 0, 1]),
        [0, 1, 2, 2, 1, 0], [2, 2, 0, 1, 0, 1],
    ),
}  # fmt: skip


def hard(logits: Tensor, right: int) -> Tensor:
    return -torch.log_softmax(logits, 0)[right]


def soft(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    p, q = (torch.softmax(z / temperature, 0) for z in (answers, logits))
    return temperature**2 * (p * (p / q).log()).sum()


def gains(kind: Kind, student: LoadedModel, answers: Tensor, options: dict[str, float]) -> list[float]:
    """What a step along each loss's gradient gains: labels first, then the teacher."""
    exact = copy.deepcopy(student.model).double()

    def held_out(model: PreTrainedModel) -> Tensor:
        lines = logits_of(model, kind.head, kind.meta)
        return torch.stack([hard(line, right) for line, right in zip(lines, kind.meta_right, strict=True)]).mean()

    lines = logits_of(exact, kind.head, kind.train)
    losses = []
    if options.get("hard", 1):
        zero = lines.sum() * 0
        losses += [
            zero if right is None else options.get("hard", 1) * hard(line, right) for line, right in zip(lines, kind.right, strict=True)
        ]
    temperature = options.get("temperature", 1)
    losses += [options.get("soft", 1) * soft(line, answer, temperature) for line, answer in zip(lines, answers, strict=True)]
    found, before = [], held_out(exact).item()
    for loss in losses:
        slopes = torch.autograd.grad(loss, list(exact.parameters()), retain_graph=True, allow_unused=True)
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for weight, slope in zip(moved.parameters(), slopes, strict=True):
                weight -= STEP * (0 if slope is None else slope)
            found.append((before - held_out(moved).item()) / STEP)
    return found


def method_of(kind: Kind, student: LoadedModel, options: dict[str, Any]) -> tuple[RWKD, Features, Tensor]:
    """The method, what its teacher answers, and the same answers one line a decision in float64."""
    method = parse_method("rw_kd", options, student.shape, student.shape)
    assert isinstance(method, RWKD)
    answers = torch.randn(6, kind.labels, generator=torch.Generator().manual_seed(9)) * 2
    lines = answers.view(2, 3) if kind.head == "multiple_choice" else answers
    return method, {method.key: answers}, lines.double()


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "hard": 2.0, "soft": 0.5}, {"hard": 0.0}])
@pytest.mark.parametrize("name", KINDS)
def test_a_loss_weighs_what_a_step_along_its_gradient_gains(name: str, options: dict[str, float]) -> None:
    kind = KINDS[name]
    student = student_of(kind.head, kind.labels)
    method, answers, lines = method_of(kind, student, options)
    method.prepare(Step(student, kind.train, answers, (kind.meta, {})))
    expected = torch.tensor(gains(kind, student, lines, options), dtype=torch.float64)
    assert (expected > 0).any()
    assert (expected < 0).any()
    labelled = sum(right is not None for right in kind.right) if options.get("hard", 1) else 0
    expected = expected.clamp(min=0) / expected.clamp(min=0).sum() * (labelled + len(lines))
    assert method.weight_K is not None
    torch.testing.assert_close(method.weight_K.double(), expected, rtol=2e-3, atol=2e-3)
    assert not method.weight_K.requires_grad
    assert all(weight.grad is None for weight in student.model.parameters())

    features = run(student, kind.train, method.student_keys)
    weighed = method(features, answers, kind.train)
    method.eval()
    plain = method(features, answers, kind.train)
    parts = dict(zip(plain, method.weight_K.split(method.weight_K.numel() // len(plain)), strict=True))
    for term, weight_U in parts.items():
        one_by_one = [single(method, features, answers, kind, term, number) for number in range(len(weight_U))]
        assert plain[term].item() == pytest.approx(sum(one_by_one), rel=1e-4)  # all weights are 1
        assert weighed[term].item() == pytest.approx(sum(w * loss for w, loss in zip(weight_U.tolist(), one_by_one, strict=True)), rel=1e-4)


def single(method: RWKD, features: Features, answers: Features, kind: Kind, term: str, number: int) -> float:
    """The loss of one decision, by hand."""
    logits, teacher = (torch.as_tensor(side[method.key]).detach().double().view(len(kind.right), -1) for side in (features, answers))
    if term == "soft":
        return float(method.soft * soft(logits[number], teacher[number], float(method.now(method.temperature))))
    right = kind.right[number]
    return 0.0 if right is None else float(method.hard * hard(logits[number], right))


def test_scores_are_weighed_too() -> None:
    kind = Kind(
        "classification", 1, batch_of(1, [0.5, -1.0, float("nan"), 2.0, 0.0, 1.0]), batch_of(2, [1.0, 0.0, 0.0, 2.0, 1.0, -1.0]), [], []
    )
    student = student_of(kind.head, 1)
    method, answers, _ = method_of(kind, student, {})
    method.prepare(Step(student, kind.train, answers, (kind.meta, {})))
    assert method.weight_K is not None
    assert method.weight_K[2] == 0  # a label that is not there
    assert float(method.weight_K.sum()) == pytest.approx(5 + 6, rel=1e-4)
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    held_out = (run(student, kind.meta, [method.key])[method.key].squeeze(1) - kind.meta.row_labels).square().mean()  # type: ignore[union-attr,operator]
    aim = torch.autograd.grad(held_out, weights, allow_unused=True)
    products = []
    for row in (0, 1, 3, 4, 5):
        loss = (run(student, kind.train, [method.key])[method.key][row, 0] - kind.train.row_labels[row]).square()  # type: ignore[index,call-overload]
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        products.append(sum(float((a * b).sum()) for a, b in zip(aim, slopes, strict=True) if a is not None and b is not None))
    positive = [max(0.0, product) for product in products]
    found = method.weight_K[[0, 1, 3, 4, 5]].tolist()
    scale = sum(found) / sum(positive)
    assert found == pytest.approx([scale * product for product in positive], rel=1e-3, abs=1e-4)


def test_where_no_loss_helps_nothing_is_learned() -> None:
    kind = KINDS["classes"]
    student = student_of("classification", 2)
    train = dataclasses.replace(kind.train, row_labels=torch.zeros(6, dtype=torch.int64))
    opposite = dataclasses.replace(kind.train, row_labels=torch.ones(6, dtype=torch.int64))
    method, answers, _ = method_of(dataclasses.replace(kind, labels=2), student, {"soft": 0})
    for weight in student.model.bert.parameters():  # the class weights alone are left to differ in
        weight.requires_grad_(False)
    method.prepare(Step(student, train, answers, (opposite, {})))
    assert method.weight_K is not None
    assert not method.weight_K.any()
    terms = method(run(student, train, method.student_keys), answers, train)
    terms["hard"].backward()
    assert terms["hard"] == 0


def test_heads_that_do_not_serve_are_refused() -> None:
    shape = student_of("classification", 3).shape
    for wrong in (student_of("multiple_choice", 1).shape, student_of("classification", 1).shape):
        with pytest.raises(ValueError, match="a row counts by the teacher's probability of its class: expected a head of classification"):
            parse_method("meta_kd", {"domains": 2}, wrong, wrong)
    with pytest.raises(ValueError, match="expected equal numbers of labels"):
        parse_method("rw_kd", {}, shape, shape.model_copy(update={"labels": 2}))
    with pytest.raises(ValueError, match="rw_kd: every weight is 0"):
        parse_method("rw_kd", {"hard": 0, "soft": 0}, shape, shape)
    assert parse_method("rw_kd", {"soft": 0}, shape, shape).teacher_keys == frozenset[FeatureKey]()
