"""Every method on real models: their features fit, its gradient reaches the student's weights, padding changes nothing."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from case import all_of

from online.batch import IGNORED, Batch, Features
from online.models import LoadedModel
from online.teacher import LiveTeacher
from store.shape import Head
from student_train.methods import METHODS, parse_method
from student_train.step import Step, Survey, run

CLASSES: dict[tuple[str, Head], type[PreTrainedModel]] = {
    ("bert", "masked_lm"): BertForMaskedLM,
    ("bert", "classification"): BertForSequenceClassification,
    ("bert", "token_classification"): BertForTokenClassification,
    ("bert", "multiple_choice"): BertForMultipleChoice,
    ("llama", "causal_lm"): LlamaForCausalLM,
    ("llama", "classification"): LlamaForSequenceClassification,
}
CASES: list[tuple[str, dict[str, object], str, Head]] = all_of("MODELS")
SAME_WIDTH = {name for (name,) in all_of("SAME_WIDTH")}
"""Methods that take only students as wide as their teacher."""
PAIRED = {"diito"}
"""Learn from rows in pairs, which a longer batch is not: tests/student_train/test_diito.py."""


def tiny(family: str, head: Head, *, layers: int, width: int, seed: int) -> LoadedModel:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=30, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24, initializer_range=0.3
    )
    labels = dict(num_labels=1 if head == "multiple_choice" else 3, pad_token_id=0)
    config: PretrainedConfig
    if family == "bert":
        config = BertConfig(**sizes, **labels, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    else:
        config = LlamaConfig(**sizes, **labels, num_key_value_heads=2, max_position_embeddings=32)
    return LoadedModel.of(CLASSES[family, head](config).eval(), head)


def make_batch(head: Head, family: str) -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.randint(1, 30, (4, 8), generator=generator), torch.arange(8) < torch.tensor([[8], [3], [6], [1]])
    ids = ids * mask
    labels, token_labels = torch.tensor([0, 1, 2, 1]), torch.full((4, 8), IGNORED)
    if head == "causal_lm":
        token_labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], IGNORED)
        token_labels[0, :2] = token_labels[2, 0] = IGNORED  # prompts
    else:
        token_labels[0, [1, 4]], token_labels[2, 3] = torch.tensor([2, 1]), 0
    segments = torch.zeros_like(ids) if family == "bert" else None
    row_labels = torch.tensor([0, 1, 1, 0]) if head == "multiple_choice" else labels
    groups, domains = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 2, 0])
    written = torch.tensor([False, True, False, False]) if head == "causal_lm" else None
    return Batch(torch.arange(4), ids, mask, segments, None, None, token_labels, row_labels, groups, domains, written=written)


def clozes(batch: Batch) -> Batch:
    """The same rows with one masked token in each."""
    token_labels = torch.full_like(batch.input_ids, IGNORED)
    for row, token in enumerate([4, 2, 3, 0]):
        token_labels[row, token] = 7
    return dataclasses.replace(batch, token_labels=token_labels, verbalisers=torch.tensor([7, 2, 9]))


def longer(batch: Batch) -> Batch:
    changes = {
        f.name: pad(v, (0, 8)) for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor) and v.dim() == 2
    }
    assert batch.token_labels is not None
    return dataclasses.replace(batch, **changes | {"token_labels": pad(batch.token_labels, (0, 8), value=IGNORED)})


def step(
    name: str, options: dict[str, object], student: LoadedModel, teachers: dict[str, LoadedModel], batch: Batch
) -> tuple[float, list[torch.Tensor]]:
    """The loss of a method on one batch, and its gradients in the student's and its own weights."""
    shapes = {of: teacher.shape for of, teacher in teachers.items()}
    torch.manual_seed(4)
    method = parse_method(name, options, student.shape, shapes if METHODS[name].several else shapes["first"])
    answers: Features = {}
    for of, teacher in teachers.items():
        keys = {key.of("") for key in method.teacher_keys if key.pass_name == (of if method.several else "")}
        if keys and (method.several or of == "first"):
            answers |= {
                key.of(of if method.several else ""): value for key, value in LiveTeacher(teacher, keys).features(batch, {}).items()
            }
    assert batch.row_labels is not None
    method.survey(Survey(len(batch.rows), batch.rows.numpy(), batch.row_labels.double().numpy()))
    method.train()
    method.prepare(Step(student, batch, answers, (batch, answers)))
    features = run(student, batch, method.student_keys) if method.student_keys else {}
    counts = method.counts(batch)
    loss = torch.stack([total / counts[term] for term, total in method(features, answers, batch).items()]).sum()
    weights = [weight for weight in (*student.model.parameters(), *method.parameters()) if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss.item(), [gradient for gradient in gradients if gradient is not None]


def test_every_method_meets_a_real_model() -> None:
    assert {case[0] for case in CASES} | PAIRED == {name for name, cls in METHODS.items() if not cls.live}  # those: files of their own


@pytest.mark.parametrize(("name", "options", "family", "head"), CASES)
def test_gradients_reach_a_real_student_and_padding_changes_nothing(name: str, options: dict[str, object], family: str, head: Head) -> None:
    teachers = {"first": tiny(family, head, layers=4, width=24, seed=1), "second": tiny(family, head, layers=3, width=24, seed=3)}
    student, batch = tiny(family, head, layers=2, width=24 if name in SAME_WIDTH else 16, seed=2), make_batch(head, family)
    batch = clozes(batch) if name.startswith("cloze") else batch
    loss, gradients = step(name, options, student, teachers, batch)
    assert loss > 0
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    padded_loss, padded_gradients = step(name, options, student, teachers, longer(batch))
    assert padded_loss == pytest.approx(loss, rel=2e-5, abs=1e-6)
    for one, other in zip(gradients, padded_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5)
