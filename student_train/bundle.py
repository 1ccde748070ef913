"""The wrapped model of a training run: student and methods together, and one forward pass that is the whole step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from online.batch import Batch, Features
from online.capture import Capture
from online.models import LoadedModel, forward
from store.features import FeatureKey
from student_train.methods.base import Method, Terms
from student_train.recipe import MethodSpec


class Bundle(nn.Module):
    """Student and methods under one ``forward``, so that DDP reduces the gradients of all their passes once.

    Teachers never live in here: they neither train nor reach a checkpoint.
    """

    accepts_loss_kwargs = True
    """Tells transformers.Trainer that the loss is divided by counts over all accumulation steps already."""

    def __init__(self, student: LoadedModel, methods: Sequence[tuple[MethodSpec, Method]]) -> None:
        super().__init__()
        self.loaded = student
        self.student = student.model
        self.methods = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for spec, method in methods:
            name = next(name for name in (spec.name, *(f"{spec.name}-{n}" for n in range(2, 99))) if name not in self.weights)
            self.methods[name] = method
            self.weights[name] = spec.weight

    def taking_part(self, taught: bool) -> dict[str, Method]:
        """The methods of a step by name: all where the rows have a teacher (``taught``), else those that read none of its features."""
        return {name: method for name, method in self._named() if taught or not method.teacher_keys}

    def counts(self, batch: Batch, taught: bool) -> dict[str, float]:
        """Term -> how many tokens, rows or pairs of ``batch`` it sums over; the names of ``forward``'s terms."""
        methods = self.taking_part(taught).items()
        return {f"{name}/{term}": float(count) for name, method in methods for term, count in method.counts(batch).items()}

    def forward(self, batch: Batch, teacher: Features, counts: Mapping[str, float], taught: bool) -> tuple[Tensor, Terms]:
        """The loss of ``batch`` and its terms, as they enter it: weight * sum / count.

        ``counts`` are those of the whole optimiser step, over ranks and accumulation; the losses of its micro-batches
        add up to that of the step. A step without a term's units (count 0) gives 0. The student runs under the caller's
        autocast; what the methods make of its features is float32.
        """
        methods = self.taking_part(taught)
        keys: frozenset[FeatureKey] = frozenset().union(*(method.student_keys for method in methods.values()))
        with Capture(self.loaded, keys, grad=True) as capture:
            forward(self.loaded, batch)
            student = capture.features(batch)  # float32
        terms: Terms = {}
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            for name, method in methods.items():
                for term, total in method(student, teacher, batch).items():
                    full = f"{name}/{term}"
                    terms[full] = total * (self.weights[name] / (counts[full] or 1.0))
            loss = torch.stack(list(terms.values())).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def checkpoint_activations(self, where: str) -> None:
        """Recompute the student's activations in the backward pass; not re-entrant, or captured features lose their gradient."""
        if not self.student.supports_gradient_checkpointing:
            raise ValueError(f"{where}: trainer: gradient_checkpointing: {type(self.student).__name__} does not support it")
        new_name = hasattr(self.student, "activation_checkpointing_enable")  # transformers renamed it after 5.17
        enable = self.student.activation_checkpointing_enable if new_name else self.student.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def _named(self) -> list[tuple[str, Method]]:
        return [(name, method) for name, method in self.methods.items() if isinstance(method, Method)]
