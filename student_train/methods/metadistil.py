"""MetaDistil: a teacher that learns to teach, from what its student makes of held-out rows one step later.

Shapes: U decisions (rows, labelled tokens or groups of choices), C classes or choices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from online.batch import Batch, Features
from online.models import LoadedModel
from online.sharding import Whole
from store.features import FeatureKey
from store.shape import ModelShape
from student_train.gather import summed
from student_train.methods.base import Method, Stages, Temperature, Terms, Weight, check_equal, check_weights, row_token
from student_train.methods.decisions import check_decides, decisions, soft_losses
from student_train.methods.losses import MASKED, mse, unit_count, vectors
from student_train.methods.pkd import inner_pairs
from student_train.methods.task_loss import answer_count, label_count, label_loss, task_key
from student_train.schedule import Scheduled, check_range
from student_train.step import Step, run

MOMENTS = 0.9, 0.999
EPSILON = 1e-8
"""Of Adam, as in the authors' code."""

Named = Mapping[str, Tensor]
"""Weights by their names in a model."""


class MetaDistil(Method):
    """alpha soft + (1 - alpha) CE(y, z_s) + beta PKD, from a teacher that is trained first, in each step, by second-order gradients.

    Zhou, Xu, McAuley, "BERT Learns to Teach: Knowledge Distillation with Meta Learning", ACL 2022, arXiv 2106.04570. With L the loss
    above, theta the student's weights and phi the teacher's, each optimiser step first teaches the teacher:

        theta' = theta - pilot_rate dL(theta, phi)/dtheta          (pilot step, one SGD step on the rows to train on)
        phi <- Adam(phi, dQ(theta'(phi))/dphi, teacher_rate)       (Q: mean label loss of theta' on the phase's ``meta`` rows, the quiz)

    and then theta' is dropped, and the student takes its own step with the new phi. The gradient is exact: with v = dQ/dtheta' it is
    -pilot_rate d<dL/dtheta, v>/dphi, a second backward pass through the first. v and dL/dtheta are summed over ranks in between, so that
    ranks learn as one. ``soft`` is the squared difference of the softmaxes at T, mean over classes, times T^2 as in the authors' code,
    or ``kl``, T^2 KL. beta PKD is that of the method ``pkd``, of equal widths: their mean over M pairs of blocks is a sum here, so that
    their beta of 100 is 100 / M; 0 leaves it out. From the authors' code are alpha, T, both rates, Adam's numbers and ``clip`` (what of
    these the paper's own runs had is unverified). There teacher_rate falls linearly to 0, which is the schedule ``{kind: linear, start:
    1.0e-5, end: 0}``, and a quiz is all held-out rows or some batches of them; here it is one batch, as many rows as the step has. As
    there, the pilot step has dropout, the quiz and the teacher have none.

    The teacher that trains is a copy, made when it is handed over: the loaded one stays as it is for metrics and other methods. The copy
    and Adam's two moments are buffers, on each rank and in each checkpoint (which has them once more for each rank where there are
    several): three times the teacher's weights. They never reach the exported student, and are gone when the phase is over. A step costs
    two more passes of the student, one more of the teacher, and three more backward passes, one of which goes through another; attention
    runs without fused kernels there, which have no second derivative. With accumulation, pilot step and quiz are those of a step's first
    micro-batch, and the other micro-batches learn from the teacher that came of it.

    Refused: a teacher in parts or in half precision, a student under ZeRO-3, and scores (one label), which have no softmax.
    Terms ``soft`` (rows, groups or tokens), ``hard`` (those with a label) and ``patience`` (rows; sum over pairs, mean over width).
    """

    paper = "Zhou, Xu, McAuley 2022, arXiv 2106.04570"
    stages: ClassVar[Stages] = {"task": ("soft", "hard")}
    kinds = frozenset({"changes its loss as it goes"})
    accepts = "any with the teacher's task head; held-out rows with labels (meta)"
    live = True
    reads_meta = True
    takes_gradients = True
    trains_teacher = True

    updates: Tensor

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        *,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.5,
        temperature: Temperature = 5.0,
        soft: Literal["mse", "kl"] = "mse",
        beta: Weight = 0.0,
        layers: Literal["skip", "last"] | list[tuple[int, int]] = "skip",
        pilot_rate: Annotated[float, Field(gt=0)] = 5e-5,
        teacher_rate: Scheduled = 1e-5,
        clip: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        check_weights("metadistil: what comes of the teacher", alpha, beta)
        check_range("teacher_rate", teacher_rate, least=0)
        key, at = task_key(student), row_token(student)
        check_equal("heads", student.head, teacher.head)
        check_equal("numbers of labels", student.labels, teacher.labels)
        check_decides(student, "kd")
        pairs = []
        if beta:
            check_equal("widths", student.width, teacher.width, "beta: 0 leaves hidden states out")
            pairs = [(FeatureKey("hidden", s, at), FeatureKey("hidden", t, at)) for s, t in inner_pairs(layers, student, teacher)]
        super().__init__({key, *(s for s, _ in pairs)}, reads_labels=True)
        self.answered = frozenset({key, *(t for _, t in pairs)})
        """What is read of the teacher that trains; nothing is of the loaded one."""
        self.key, self.shape, self.pairs, self.positions = key, student, pairs, at
        self.alpha, self.temperature, self.soft, self.beta = alpha, temperature, soft, beta
        self.pilot_rate, self.teacher_rate, self.clip = pilot_rate, teacher_rate, clip
        self.teacher: LoadedModel | None = None
        """The loaded teacher, which runs with the weights of the copy; no submodule."""
        self.trained, self.means, self.squares = nn.Module(), nn.Module(), nn.Module()
        """The copy's weights and Adam's moments, as buffers in the teacher's order."""
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        (self.teacher,) = teachers.values()
        if not isinstance(self.teacher.weights, Whole):
            raise ValueError("metadistil trains its teacher on every rank: expected sharding kind none, found a teacher in parts")
        for name, weight in self.teacher.model.named_parameters():
            if torch.finfo(weight.dtype).bits < 32:
                raise ValueError(f"metadistil trains its teacher, in steps too small for {weight.dtype}: expected dtype float32")
            name, weight = name.replace(".", "/"), weight.detach()
            self.trained.register_buffer(name, weight.clone())
            for moments in (self.means, self.squares):
                moments.register_buffer(name, torch.zeros_like(weight))

    def counts(self, batch: Batch) -> Terms:
        terms = {"soft": answer_count(batch, self.shape)} if self.alpha else {}
        if self.alpha < 1:
            terms["hard"] = label_count(batch, self.shape)
        return terms | ({"patience": unit_count(batch, self.positions)} if self.beta else {})

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        with torch.no_grad():
            answers = self._answers(self._copy(), batch)
        return self._terms(student, answers, batch)

    def prepare(self, step: Step) -> None:
        if int(self.updates) > self.moment.step:  # by the first micro-batch of this step
            return
        assert step.meta is not None
        weights = {name: weight for name, weight in step.student.model.named_parameters() if weight.requires_grad}
        copy = {name: weight.detach().requires_grad_() for name, weight in self._copy().items()}
        with sdpa_kernel(SDPBackend.MATH):  # in the backward passes too, which may compute activations again
            slopes = self._pilot_slopes(step, weights, copy)
            ahead = self._ahead(weights, slopes)
            aims = self._quiz_slopes(step.student, ahead, step.meta[0])
            linked = [(slope, aim) for slope, aim in zip(slopes, aims, strict=True) if slope.requires_grad]
            found = torch.autograd.grad([slope for slope, _ in linked], list(copy.values()), [aim for _, aim in linked], allow_unused=True)
        self._teach(_summed([-self.pilot_rate * slope for slope in _filled(found, list(copy.values()))], self.training))

    def _pilot_slopes(self, step: Step, weights: Named, copy: Named) -> list[Tensor]:
        """This rank's part of dL/dtheta over the rows of all ranks, differentiable in the teacher's weights ``copy``."""
        counts = self.counts(step.batch)
        totals = dict(zip(counts, summed(torch.stack(list(counts.values())), self.training).tolist(), strict=True))
        student, answers = step.run(step.batch, self.student_keys), self._answers(copy, step.batch)
        with torch.autocast(step.batch.mask.device.type, enabled=False):
            terms = self._terms(student, answers, step.batch)
            loss = torch.stack([term / (totals[name] or 1.0) for name, term in terms.items()]).sum()
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        return _filled(slopes, list(weights.values()))

    def _ahead(self, weights: Named, slopes: Sequence[Tensor]) -> dict[str, Tensor]:
        """theta': the student's weights after the pilot step, as leaves."""
        with torch.no_grad():
            total = _summed(slopes, self.training)
            moved = {name: weight - self.pilot_rate * slope for (name, weight), slope in zip(weights.items(), total, strict=True)}
        return {name: weight.requires_grad_() for name, weight in moved.items()}

    def _quiz_slopes(self, student: LoadedModel, ahead: Named, quiz: Batch) -> list[Tensor]:
        """dQ/dtheta' over the quiz rows of all ranks; without dropout."""
        number = float(summed(label_count(quiz, self.shape), self.training)) or 1.0
        training = student.model.training
        student.model.eval()
        features = with_weights(student.model, ahead, lambda: run(student, quiz, {self.key}))
        student.model.train(training)
        with torch.autocast(quiz.mask.device.type, enabled=False):
            loss = label_loss(vectors(features, self.key, quiz), quiz, self.shape) / number
        return _summed(_filled(torch.autograd.grad(loss, list(ahead.values()), allow_unused=True), list(ahead.values())), self.training)

    @torch.no_grad()
    def _teach(self, slopes: Sequence[Tensor]) -> None:
        """One step of Adam on the copy, of the gradient that all ranks have found together."""
        norm = torch.stack([slope.norm() for slope in slopes]).norm()
        rate, factor = self.now(self.teacher_rate), (self.clip / (norm + 1e-6)).clamp(max=1)
        self.updates += 1
        first, second = (1 - beta ** int(self.updates) for beta in MOMENTS)
        parts = zip(self.trained.buffers(), self.means.buffers(), self.squares.buffers(), slopes, strict=True)
        for weight, mean, square, slope in parts:
            slope = slope * factor
            mean.lerp_(slope, 1 - MOMENTS[0])
            square.mul_(MOMENTS[1]).addcmul_(slope, slope, value=1 - MOMENTS[1])
            weight -= rate * (mean / first) / ((square / second).sqrt() + EPSILON)

    def _copy(self) -> dict[str, Tensor]:
        """The weights of the teacher that trains, by their names in the loaded one."""
        assert self.teacher is not None
        names = [name for name, _ in self.teacher.model.named_parameters()]
        return dict(zip(names, self.trained.buffers(), strict=True))

    def _answers(self, weights: Named, batch: Batch) -> Features:
        """What the teacher with ``weights`` says of ``batch``, in float32 whatever autocast is on."""
        teacher = self.teacher
        assert teacher is not None
        with torch.autocast(batch.mask.device.type, enabled=False):
            return with_weights(teacher.model, weights, lambda: run(teacher, batch, self.answered))

    def _terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        logits, answers = (vectors(side, self.key, batch) for side in (student, teacher))
        terms = {}
        if self.alpha:
            terms["soft"] = self.alpha * self._soft(logits, answers, batch)
        if self.alpha < 1:
            terms["hard"] = (1 - self.alpha) * label_loss(logits, batch, self.shape)
        if self.beta:
            units = [
                (F.normalize(vectors(student, s, batch), dim=-1), F.normalize(vectors(teacher, t, batch), dim=-1)) for s, t in self.pairs
            ]
            terms["patience"] = self.beta * torch.stack([mse(*pair).sum() for pair in units]).sum()
        return terms

    def _soft(self, logits: Tensor, answers: Tensor, batch: Batch) -> Tensor:
        """0-d sum over decisions."""
        temperature = self.now(self.temperature)
        if self.soft == "kl":
            return soft_losses(logits, answers, batch, self.shape, temperature).sum()
        student_UC, teacher_UC = (decisions(scores, batch, self.shape) for scores in (logits, answers))
        difference_UC = (student_UC / temperature).softmax(-1) - (teacher_UC / temperature).softmax(-1)
        return temperature**2 * (difference_UC.square().sum(-1) / (student_UC > MASKED).sum(-1)).sum()


class _Host(nn.Module):
    """Runs anything that calls ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Features]) -> Features:
        return work()


def with_weights(model: nn.Module, weights: Named, work: Callable[[], Features]) -> Features:
    """``work()``, in which ``model`` has these ``weights`` in place of its own (tied ones where they are tied); the others stay."""
    found: Features = functional_call(_Host(model), {f"model.{name}": weight for name, weight in weights.items()}, (work,))
    return found


def _filled(slopes: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """``slopes`` with zeros where a weight has none."""
    return [torch.zeros_like(weight) if slope is None else slope for slope, weight in zip(slopes, weights, strict=True)]


def _summed(tensors: Sequence[Tensor], training: bool) -> list[Tensor]:
    """Each of ``tensors`` summed over ranks, without gradient; one exchange for all."""
    total = summed(torch.cat([tensor.flatten() for tensor in tensors]), training)
    return [part.view_as(tensor) for part, tensor in zip(total.split([tensor.numel() for tensor in tensors]), tensors, strict=True)]
