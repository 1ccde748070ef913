"""MetaDistil's teacher: its gradient against finite differences of the quiz in float64, its steps against plain torch."""

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, ModernBertConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parent))

from test_rw_kd import KINDS, Kind, hard, logits_of, soft, student_of

from online.models import HEADS, LoadedModel
from online.zero3 import Partitioned
from store.shape import Head, ModelShape
from student_train.methods import parse_method
from student_train.methods.metadistil import MetaDistil
from student_train.moment import START
from student_train.step import Step, run

Weights = dict[str, Tensor]
Make = Callable[[Head, int], LoadedModel]
"""The student of a head with so many labels."""
SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.5,
}  # fmt: skip
PILOT = 0.5
"""Large enough to see what the pilot step changes."""
HUGE = 1e9
GROUPS = 7
"""Into which the teacher's weights are dealt out, to be moved together."""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("classes", {}),
    ("classes", {"soft": "kl", "temperature": 2.0, "alpha": 0.8}),
    ("classes", {"beta": 3.0, "alpha": 0.3}),
    ("classes", {"beta": 3.0, "alpha": 0.0}),
    ("choices", {"alpha": 1.0, "temperature": 1.0}),
    ("tokens", {"soft": "kl"}),
]


def llama_of(head: Head, labels: int) -> LoadedModel:
    return made(LlamaConfig(**SIZES, num_key_value_heads=1, num_labels=labels), head)


def modern_of(head: Head, labels: int) -> LoadedModel:
    windows = {"global_attn_every_n_layers": 2, "local_attention": 16}
    return made(ModernBertConfig(**SIZES, **windows, num_labels=labels, cls_token_id=1, sep_token_id=1, classifier_dropout=0.0), head)


def made(config: PreTrainedConfig, head: Head) -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel.of(HEADS[head].from_config(config).train(), head)


def teacher_of(make: Make, head: Head, labels: int) -> LoadedModel:
    """As the student, with other weights."""
    teacher = make(head, labels)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in teacher.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    teacher.model.eval().requires_grad_(False)
    return teacher


class World:
    """Student and teacher: as the method has them, and in float64 as the paper does."""

    def __init__(self, name: str, options: dict[str, Any], make: Make = student_of) -> None:
        self.kind: Kind = KINDS[name]
        self.options = options
        self.student, self.teacher = make(self.kind.head, self.kind.labels), teacher_of(make, self.kind.head, self.kind.labels)
        self.exact = [copy.deepcopy(one.model).double() for one in (self.student, self.teacher)]
        for model in self.exact:
            model.set_attn_implementation("eager")

    def method(self, **more: object) -> MetaDistil:
        options = {"pilot_rate": PILOT, "clip": HUGE} | self.options | more
        made = parse_method("metadistil", options, self.student.shape, self.teacher.shape)
        assert isinstance(made, MetaDistil)
        made.attach({"": self.teacher})
        return made

    def step(self) -> Step:
        return Step(self.student, self.kind.train, {}, (self.kind.meta, {}))

    def weights(self, number: int) -> Weights:
        """Those in float64 of the student (0) or the teacher (1), as leaves."""
        return {name: weight.detach().clone().requires_grad_() for name, weight in self.exact[number].named_parameters()}

    def running(self, number: int, weights: Weights) -> Callable[..., Any]:
        left_out = {"token_type_ids"} - signature(self.exact[number].forward).parameters.keys()
        return lambda **inputs: functional_call(self.exact[number], weights, (), {key: inputs[key] for key in inputs.keys() - left_out})

    def terms(self, student: Weights, teacher: Weights) -> list[Tensor]:
        """Those of the rows to train on, means, from the paper."""
        kind, alpha, heat = self.kind, self.options.get("alpha", 0.5), self.options.get("temperature", 5.0)
        models = self.running(0, student), self.running(1, teacher)
        logits, answers = (logits_of(model, kind.head, kind.train) for model in models)
        losses = []
        for line, answer in zip(logits, answers, strict=True):
            p, q = torch.softmax(answer / heat, 0), torch.softmax(line / heat, 0)
            losses.append(soft(line, answer, heat) if self.options.get("soft") == "kl" else heat**2 * (p - q).square().mean())
        right = [hard(line, label) for line, label in zip(logits, kind.right, strict=True) if label is not None]
        found = [alpha * torch.stack(losses).mean(), (1 - alpha) * torch.stack(right).mean()]
        if beta := self.options.get("beta"):
            batch = kind.train
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long(), "token_type_ids": batch.segments}
            s, t = (model(**inputs, output_hidden_states=True).hidden_states[1] for model in models)
            at = batch.lengths - 1 if self.student.shape.causal else torch.zeros_like(batch.lengths)
            s, t = (hidden[torch.arange(len(at)), at] for hidden in (s, t))
            s, t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
            found.append(beta * (s - t).square().mean())
        return found

    def quiz(self, student: Weights, teacher: Weights) -> Tensor:
        """What the student makes of held-out rows after its pilot step."""
        loss = torch.stack(self.terms(student, teacher)).sum()
        slopes = torch.autograd.grad(loss, list(student.values()), create_graph=True, allow_unused=True)
        ahead = {
            name: weight if slope is None else weight - PILOT * slope for (name, weight), slope in zip(student.items(), slopes, strict=True)
        }
        lines = logits_of(self.running(0, ahead), self.kind.head, self.kind.meta)
        return torch.stack([hard(line, right) for line, right in zip(lines, self.kind.meta_right, strict=True)]).mean()


def slopes_of(method: MetaDistil) -> list[Tensor]:
    """The gradient that the first step of Adam saw."""
    assert int(method.updates) == 1
    return [mean.double() / 0.1 for mean in method.means.buffers()]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_teachers_gradient_is_what_its_weights_do_to_the_quiz_after_the_pilot_step(name: str, options: dict[str, Any]) -> None:
    world = World(name, options)
    method, before = world.method(), copy.deepcopy(world.student.model.state_dict())
    method.prepare(world.step())
    student, teacher = world.weights(0), world.weights(1)
    torch.manual_seed(11)
    along, slopes = [torch.randn_like(weight) for weight in teacher.values()], slopes_of(method)
    for part in range(GROUPS):
        ends = []
        for way in (1e-5, -1e-5):
            moved = {
                name: (weight + way * step if number % GROUPS == part else weight).detach()
                for number, ((name, weight), step) in enumerate(zip(teacher.items(), along, strict=True))
            }
            ends.append(world.quiz(student, moved).item())
        found = sum(float((slope * step).sum()) for slope, step in list(zip(slopes, along, strict=True))[part::GROUPS])
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3, abs=3e-7)
    assert torch.stack([slope.abs().max() for slope in slopes_of(method)]).max() > 1e-3
    assert world.student.model.training
    for key, weight in world.student.model.state_dict().items():  # the pilot step is gone
        assert torch.equal(weight, before[key])
    assert all(weight.grad is None for model in (world.student.model, world.teacher.model) for weight in model.parameters())


@pytest.mark.parametrize(("options", "make"), [({"soft": "kl", "beta": 1.0}, llama_of), ({"beta": 1.0}, modern_of)])
def test_other_families_teach_too(options: dict[str, Any], make: Make) -> None:
    """Differentiated by torch: these compute in float32 here and there, where finite differences drown."""
    world = World("classes", options, make)
    method, teacher = world.method(), world.weights(1)
    method.prepare(world.step())
    world.quiz(world.weights(0), teacher).backward(inputs=list(teacher.values()))
    for weight, slope in zip(teacher.values(), slopes_of(method), strict=True):
        torch.testing.assert_close(slope, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_three_steps_are_those_of_plain_torch(name: str, options: dict[str, Any]) -> None:
    """The student by SGD, the teacher by torch's Adam on a clipped gradient and a rate that falls."""
    world = World(name, options)
    rate, clip = {"kind": "linear", "start": 1e-2, "end": 0.0}, 0.01
    method = world.method(teacher_rate=rate, clip=clip)
    optimizer = torch.optim.SGD(world.student.model.parameters(), lr=0.1)
    student, teacher = world.weights(0), world.weights(1)
    exact = torch.optim.SGD(student.values(), lr=0.1)
    adam = torch.optim.Adam(teacher.values(), lr=1.0, eps=1e-8)
    for number in range(3):
        method.moment = replace(START, step=number, steps=4)
        method.prepare(world.step())
        terms = method(run(world.student, world.kind.train, method.student_keys), {}, world.kind.train)
        counts = method.counts(world.kind.train)
        means = {term: total / counts[term] for term, total in terms.items()}
        optimizer.zero_grad()
        torch.stack(list(means.values())).sum().backward()
        optimizer.step()

        adam.zero_grad()
        world.quiz(student, teacher).backward(inputs=list(teacher.values()))
        norm = torch.nn.utils.clip_grad_norm_(teacher.values(), clip)
        assert norm > clip
        adam.param_groups[0]["lr"] = 1e-2 * (1 - number / 4)
        adam.step()
        exact.zero_grad()
        expected = world.terms(student, teacher)
        torch.stack(expected).sum().backward(inputs=list(student.values()))
        exact.step()
        assert [mean.item() for mean in means.values()] == pytest.approx(
            [mean.item() for mean in expected if mean != 0], rel=1e-4, abs=1e-6
        )
    for parts, own in (("exp_avg", method.means), ("exp_avg_sq", method.squares)):
        for weight, found in zip(teacher.values(), own.buffers(), strict=True):
            wanted = adam.state[weight][parts]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-3 * float(wanted.abs().max()) + 1e-9)
    start, clear = world.weights(1), 0
    for weight, found, name in zip(teacher.values(), method.trained.buffers(), start, strict=True):
        seen = adam.state[weight]["exp_avg_sq"].sqrt() > 1e-6  # elsewhere Adam makes whole steps of rounding errors
        torch.testing.assert_close(found.double()[seen], weight[seen], rtol=0, atol=3e-4)
        clear += int(((weight - start[name])[seen].abs() > 1e-2).sum())
    assert clear > 50
    torch.testing.assert_close(
        dict(world.student.model.named_parameters()), {k: v.float() for k, v in student.items()}, rtol=1e-3, atol=1e-5
    )


def test_a_teacher_learns_to_teach() -> None:
    """The student stands still; what it makes of the quiz after one step from this teacher gets better."""
    world = World("classes", {"alpha": 1.0, "soft": "kl", "temperature": 1.0})
    method, student, found = world.method(teacher_rate=1e-3), world.weights(0), []
    for number in range(22):
        method.moment = replace(START, step=number, steps=100)
        teacher = dict(zip(world.weights(1), (weight.double() for weight in method.trained.buffers()), strict=True))
        found.append(world.quiz(student, teacher).item())
        method.prepare(world.step())
    assert found[1] < found[0]
    assert found[-1] < 0.95 * found[0]


def test_a_teacher_learns_once_a_step_and_the_loaded_one_never() -> None:
    world = World("classes", {})
    method, loaded = world.method(teacher_rate=0.1), copy.deepcopy(world.teacher.model.state_dict())
    copies = [[weight.clone() for weight in method.trained.buffers()]]
    for step in (0, 0, 1):
        method.moment = replace(START, step=step, steps=9)
        method.prepare(world.step())
        copies.append([weight.clone() for weight in method.trained.buffers()])
    same = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(copies)]
    assert same == [False, True, False]
    assert all(torch.equal(weight, loaded[name]) for name, weight in world.teacher.model.state_dict().items())
    assert not any(weight.requires_grad for weight in world.teacher.model.parameters())
    assert list(method.parameters()) == []


def test_the_pilot_step_has_dropout_and_neither_quiz_nor_teacher_has() -> None:
    world = World("classes", {})
    seen: list[tuple[bool, bool]] = []
    for model, is_student in ((world.student.model, True), (world.teacher.model, False)):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model.bert.register_forward_pre_hook(lambda module, _, of=is_student: seen.append((of, module.training)))
    world.method().prepare(world.step())
    assert seen == [(True, True), (False, False), (True, False)]
    assert all(module.training for module in world.student.model.modules())


def shape(head: Head = "classification", **sizes: object) -> ModelShape:
    return student_of("classification", 3).shape.model_copy(update={"head": head, **sizes})


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, shape(labels=1), shape(labels=1), "scores, without probabilities; expected classes or choices, or kd"),
        ({}, shape(), shape(labels=2), "expected equal numbers of labels of student and teacher, found 3 and 2"),
        ({}, shape(), shape("token_classification"), "expected equal heads"),
        ({}, shape("base", labels=0), shape(), "task_logits needs a student with a head"),
        ({"alpha": 0}, shape(), shape(), "metadistil: what comes of the teacher: every weight is 0"),
        ({"beta": 1.0}, shape(), shape(width=16), "expected equal widths of student and teacher, found 8 and 16; beta: 0 leaves"),
        ({"beta": 1.0, "layers": [[1, 3]]}, shape(), shape(), "the teacher has blocks 1 to 2, found 3"),
        ({"teacher_rate": -1e-5}, shape(), shape(), "teacher_rate: expected numbers 0 to inf, found -1e-05"),
        ({"pilot_rate": 0}, shape(), shape(), "pilot_rate: .*greater than 0"),
    ],
)
def test_what_cannot_be_taught_is_refused(options: dict[str, object], student: ModelShape, teacher: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method("metadistil", options, student, teacher)


def test_a_teacher_in_parts_or_in_half_precision_is_refused() -> None:
    world = World("classes", {})
    with pytest.raises(ValueError, match="trains its teacher on every rank: expected sharding kind none, found a teacher in parts"):
        world.method().attach({"": replace(world.teacher, weights=Partitioned(world.teacher.model))})
    with pytest.raises(ValueError, match=r"steps too small for torch\.bfloat16: expected dtype float32"):
        world.method().attach({"": LoadedModel.of(copy.deepcopy(world.teacher.model).bfloat16(), "classification")})
