"""LRC-BERT's step: at embeddings that are moved along the gradient of the whole loss."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from given import BERT, make_features, shape

from online.batch import Batch, Features, take
from online.models import LoadedModel
from online.zero3 import Partitioned
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.bundle import Bundle
from student_train.methods import parse_method
from student_train.methods.base import Method
from student_train.recipe import MethodSpec

MASK = torch.arange(8) < torch.tensor([[8], [5], [3], [6], [1]])
METHODS: list[tuple[str, dict[str, object]]] = [("lrc_bert", {"layers": [[0, 1], [2, 4]]}), ("sentence", {})]


def student_model() -> LoadedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=0.3)
    config = BertConfig(**sizes, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return LoadedModel.of(BertForSequenceClassification(config).train(), "classification")


def make_batch() -> Batch:
    ids = torch.randint(1, 30, (5, 8), generator=torch.Generator().manual_seed(5)) * MASK
    return Batch(torch.arange(5), ids, MASK, torch.zeros_like(ids), None, None, None, None, torch.arange(5))


def bundle_of(student: LoadedModel, teacher: ModelShape, perturbation: bool) -> Bundle:
    torch.manual_seed(1)
    methods = []
    for name, options in METHODS:
        given = options | ({"perturbation": perturbation} if name == "lrc_bert" else {})
        methods.append((MethodSpec(name=name, weight=2.0), parse_method(name, given, student.shape, teacher)))
    return Bundle(student, methods)


def loss_at(bundle: Bundle, batch: Batch, teacher: Features, added_BTW: Tensor) -> Tensor:
    """Twice the mean of each term, from transformers' own outputs, with ``added_BTW`` behind the embeddings."""
    embeddings = bundle.student.bert.embeddings
    hook = embeddings.register_forward_hook(lambda module, args, output: output + added_BTW)
    states = bundle.student.bert(batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True).hidden_states
    hook.remove()
    total = torch.zeros(())
    for method in bundle.methods.values():
        assert isinstance(method, Method)
        student = {key: take(states[-1 if key.layer is None else key.layer], batch, key.positions) for key in method.student_keys}
        answers = {key: teacher[key] for key in method.teacher_keys}
        counts = method.counts(batch)
        total = total + 2 * sum(value / counts[term] for term, value in method(student, answers, batch).items())
    return total


@pytest.mark.parametrize("perturbation", [True, False])
def test_a_step_is_taken_at_embeddings_moved_by_unit_vectors_along_the_gradient(perturbation: bool) -> None:
    student, batch, teacher_shape = student_model(), make_batch(), shape(BERT)
    bundle = bundle_of(student, teacher_shape, perturbation)
    keys = frozenset[FeatureKey]().union(*(method.teacher_keys for method in bundle.methods.values() if isinstance(method, Method)))
    teacher = make_features(keys, teacher_shape, batch, 2)

    zero_BTW = torch.zeros(5, 8, 8, requires_grad=True)
    (slope_BTW,) = torch.autograd.grad(loss_at(bundle, batch, teacher, zero_BTW), zero_BTW)
    moved_BTW = torch.zeros(5, 8, 8)
    for row, token in MASK.nonzero().tolist():
        if perturbation:
            moved_BTW[row, token] = slope_BTW[row, token] / slope_BTW[row, token].norm()
    expected = loss_at(bundle, batch, teacher, moved_BTW)

    loss, _ = bundle(batch, teacher, bundle.counts(batch, True), True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [weight for weight in bundle.parameters() if weight.requires_grad]
    found, true = (torch.autograd.grad(one, weights, allow_unused=True) for one in (loss, expected))
    for mine, other in zip(found, true, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if perturbation:
        assert loss.item() != pytest.approx(loss_at(bundle, batch, teacher, zero_BTW).item(), rel=1e-3)
        bundle.eval()
        assert bundle(batch, teacher, bundle.counts(batch, True), True)[0].item() == pytest.approx(
            loss_at(bundle, batch, teacher, zero_BTW).item(), rel=1e-5
        )


def test_a_student_whose_weights_are_in_parts_is_refused_with_what_would_serve() -> None:
    whole = student_model()
    sharded = dataclasses.replace(whole, weights=Partitioned(whole.model))  # as ZeRO-3 leaves it
    teacher = shape(BERT, "classification", 3)
    message = "lrc_bert: its perturbation .* sharded student .*; expected a student under DDP, or perturbation: false"
    with pytest.raises(ValueError, match=message):
        bundle_of(sharded, teacher, perturbation=True)
    bundle_of(sharded, teacher, perturbation=False)
