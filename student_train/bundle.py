"""The wrapped model of a training run: student and methods together, and one forward pass that is the whole step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from online.batch import Batch, Features
from online.models import LoadedModel
from online.sharding import Whole
from store.features import FeatureKey
from student_train.methods.base import Method, Terms
from student_train.moment import START, Moment
from student_train.recipe import MethodSpec
from student_train.schedule import at
from student_train.step import Step, Survey, run
from student_train.translation import translated

Answered = tuple[Batch, Features]
"""Rows and what their teachers answer."""


class Bundle(nn.Module):
    """Student and methods under one ``forward``, so that DDP reduces the gradients of all their passes once.

    Teachers never live in here: they neither train nor reach a checkpoint. Their features come under the names that the
    phase's data gives them (empty for the only one); a method sees those of its teacher alone, under keys without a name.
    """

    accepts_loss_kwargs = True
    """Tells transformers.Trainer that the loss is divided by counts over all accumulation steps already."""

    def __init__(self, student: LoadedModel, methods: Sequence[tuple[MethodSpec, Method]]) -> None:
        super().__init__()
        self.loaded = student
        self.student = student.model
        self.methods = nn.ModuleDict()
        self.specs: dict[str, MethodSpec] = {}
        self.moment = START
        self.probed: dict[str, Tensor] | None = None
        """Where a forward pass leaves the norm of each term's gradient in the student; None: it is not asked to."""
        for (spec, method), name in zip(methods, method_names([spec for spec, _ in methods]), strict=True):
            method.running_student = student
            self.methods[name] = method
            self.specs[name] = spec
        writers = [name for name, method in self._named() if method.rewrites]
        if len(writers) > 1:
            raise ValueError(f"{' and '.join(writers)} both write the rows of a step: one method of a phase can")
        self.rewrites = bool(writers)
        """Whether a method writes rows itself."""
        self._perturbs = [name for name, method in self._named() if method.perturbs]
        if self._perturbs and not isinstance(student.weights, Whole):
            raise ValueError(
                f"{self._perturbs[0]}: its perturbation takes gradients by itself, and ranks of a sharded student lack weights for that; "
                "expected a student under DDP, or perturbation: false"
            )

    def begin(self, moment: Moment) -> None:
        """The optimiser step that all calls belong to from now on."""
        self.moment = moment
        for _, method in self._named():
            method.moment = moment

    def weight(self, name: str) -> float:
        """The weight of method ``name`` in this step."""
        return at(self.specs[name].weight, self.moment)

    def gates(self) -> dict[int, float]:
        """Factors on the learning rate of the student's blocks, and under 0 of all else, in this step; those of all methods multiplied."""
        factors: dict[int, float] = {}
        for _, method in self._named():
            for block, factor in (method.gates() or {}).items():
                factors[block] = factors.get(block, 1.0) * factor
        return factors

    def taking_part(self, taught: bool, written: bool = False) -> dict[str, Method]:
        """The methods of a step by name: all where the rows have a teacher (``taught``), else those that read none of its features.

        Responses that the student has ``written`` itself teach only those that do: its own words are no labels.
        """
        return {name: method for name, method in self._named() if (not written if not method.teacher_keys else taught)}

    def counts(self, batch: Batch, taught: bool) -> dict[str, float]:
        """Term -> how many tokens, rows or pairs of ``batch`` it sums over; the names of ``forward``'s terms."""
        methods = self.taking_part(taught, batch.written is not None).items()
        return {f"{name}/{term}": float(count) for name, method in methods for term, count in method.counts(batch).items()}

    def forward(
        self,
        batch: Batch,
        teacher: Features,
        counts: Mapping[str, float],
        taught: bool,
        meta: Answered | None = None,
        past: Sequence[Answered] = (),
    ) -> tuple[Tensor, Terms]:
        """The loss of ``batch`` and its terms, as they enter it: weight * sum / count.

        ``counts`` are those of the whole optimiser step, over ranks and accumulation; the losses of its micro-batches
        add up to that of the step. A step without a term's units (count 0) gives 0. The student runs under the caller's
        autocast; what the methods make of its features is float32.

        Args:
            meta: Held-out rows with what their teacher answers.
            past: Micro-batches of earlier steps, as far back as ``looks_back`` says; read again.
        """
        batch, teacher = translated(self.loaded, batch, teacher)
        meta, past = None if meta is None else translated(self.loaded, *meta), [translated(self.loaded, *one) for one in past]
        methods = self.taking_part(taught, batch.written is not None)
        for name, method in methods.items():
            own = None if meta is None else (meta[0], self.of_teacher(name, meta[1]) if meta[1] else {})
            method.prepare(Step(self.loaded, batch, self.of_teacher(name, teacher), own, self._past_of(name, past)))
        added_BTW = None
        if self.training and not methods.keys().isdisjoint(self._perturbs):
            added_BTW = self._perturbation(methods, batch, teacher, counts)
        terms = self._terms(methods, batch, teacher, counts, added_BTW)
        if self.probed is not None:
            self.probed.update(self._norms(terms))
        return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}

    def looks_back(self) -> int:
        """How many steps back a method wants to see again in this step."""
        return max((method.look_back for _, method in self._named() if _due(method)), default=0)

    def rewrite(self, batch: Batch) -> Batch:
        """The rows to learn from in place of ``batch``, where a method writes them itself."""
        for _, method in self._named():
            if method.rewrites:
                with torch.no_grad():
                    batch = method.rewrite(batch, self.loaded)
        return batch

    def attach(self, teachers: Mapping[str, LoadedModel]) -> None:
        """Hand the models of live teachers, by their names in the data, to the methods that work with them."""
        for name, method in self._named():
            if method.live or method.rewrites:
                own = self.specs[name].teacher
                method.attach(teachers if method.several else {"": teachers[own or ""]})

    def decided(self) -> list[int]:
        """What the methods drew for this step."""
        return [number for _, method in self._named() for number in method.decided()]

    def _past_of(self, name: str, past: Sequence[Answered]) -> list[Answered]:
        method = self.methods[name]
        assert isinstance(method, Method)
        if not past or not _due(method):
            return []
        wanted = len(past) * method.look_back // self.looks_back()
        return [(batch, self.of_teacher(name, features) if features else {}) for batch, features in past[len(past) - wanted :]]

    def of_teacher(self, name: str, features: Features) -> Features:
        """What method ``name`` reads of ``features``."""
        method = self.methods[name]
        assert isinstance(method, Method)
        if method.several:
            return {key: features[key] for key in method.teacher_keys}
        return {key: features[key.of(self.specs[name].teacher or "")] for key in method.teacher_keys}

    def checkpoint_activations(self, where: str) -> None:
        """Recompute the student's activations in the backward pass; not re-entrant, or captured features lose their gradient."""
        mixing = [name for name, method in self._named() if type(method).running is not Method.running or method.interventions]
        if mixing:
            raise ValueError(
                f"{where}: trainer: gradient_checkpointing: {mixing[0]} changes what runs in a forward pass, which is over when "
                "activations are computed again; leave it out"
            )
        if not self.student.supports_gradient_checkpointing:
            raise ValueError(f"{where}: trainer: gradient_checkpointing: {type(self.student).__name__} does not support it")
        new_name = hasattr(self.student, "activation_checkpointing_enable")  # transformers renamed it after 5.17
        enable = self.student.activation_checkpointing_enable if new_name else self.student.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def _terms(
        self, methods: Mapping[str, Method], batch: Batch, teacher: Features, counts: Mapping[str, float], added_BTW: Tensor | None
    ) -> Terms:
        keys: frozenset[FeatureKey] = frozenset().union(*(method.student_keys for method in methods.values()))
        with ExitStack() as around:
            for method in methods.values() if self.training else ():
                around.enter_context(method.running(self.loaded, batch))
            student = run(self.loaded, batch, keys, added_BTW) if keys else {}
        terms: Terms = {}
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            for name, method in methods.items():
                for term, total in method(student, self.of_teacher(name, teacher), batch).items():
                    full = f"{name}/{term}"
                    terms[full] = total * (self.weight(name) / (counts[full] or 1.0))
        return terms

    def _perturbation(self, methods: Mapping[str, Method], batch: Batch, teacher: Features, counts: Mapping[str, float]) -> Tensor:
        """The unit vectors [B, T, W] along which the loss grows fastest at each token's embedding; zero on padding.

        Taken with autograd.grad, so that no weight's gradient is touched and DDP reduces nothing (LRC-BERT, Fu et al.
        2021, section 3.4).
        """
        zero_BTW = torch.zeros(*batch.mask.shape, self.loaded.shape.width, device=batch.mask.device, requires_grad=True)
        loss = torch.stack(list(self._terms(methods, batch, teacher, counts, zero_BTW).values())).sum()
        (slope_BTW,) = torch.autograd.grad(loss, zero_BTW)
        return F.normalize(slope_BTW, dim=-1) * batch.mask[..., None]

    def _norms(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Term -> norm of its gradient in the student's weights, of this micro-batch on this rank."""
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        norms = {}
        for name, term in terms.items():
            slopes = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True) if term.requires_grad else ()
            found = [slope.float().norm() for slope in slopes if slope is not None]
            norms[name] = torch.stack(found).norm() if found else torch.zeros(())
        return norms

    def learned(self, sums: Mapping[str, float]) -> None:
        """Tell the methods that watch the means of their terms, of those of an optimiser step as they entered its loss."""
        for name, method in self._named():
            if method.watches and (weight := self.weight(name)):
                own = {term.removeprefix(f"{name}/"): value / weight for term, value in sums.items() if term.startswith(f"{name}/")}
                if own:
                    method.learned(own)

    def watched(self, term: str) -> bool:
        """Whether a method wants to know the mean of ``term``."""
        method = self.methods[term.partition("/")[0]]
        assert isinstance(method, Method)
        return method.watches

    def survey(self, rows: Callable[[], Survey]) -> None:
        """Tell the methods that ask which rows they will learn from."""
        asking = [method for _, method in self._named() if type(method).survey is not Method.survey]
        if asking:
            known = rows()
            for method in asking:
                method.survey(known)

    def _named(self) -> list[tuple[str, Method]]:
        return [(name, method) for name, method in self.methods.items() if isinstance(method, Method)]


def _due(method: Method) -> bool:
    step = method.moment.step
    return method.look_back > 0 and step > 0 and step % method.look_back == 0


def method_names(specs: Sequence[MethodSpec]) -> list[str]:
    """What each method of a phase is called in logs, checkpoints and ``carry``: its name, and ``NAME-2`` for a second of the kind."""
    names: list[str] = []
    for spec in specs:
        names.append(next(name for name in (spec.name, *(f"{spec.name}-{n}" for n in range(2, 999))) if name not in names))
    return names
