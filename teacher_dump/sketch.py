"""A teacher known by its configuration alone: its weights and where they are, and what its answers take beside them.

The model is built of tensors that have a shape and no data: one of a hundred billion weights takes a second and no memory, and it
can be run, by the code that runs the real one.

Shapes: B rows, T padded tokens, U tokens that are not padding, N labelled tokens.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from online.allocations import Allocations, blank_batch
from online.capture import check_key
from online.flops import ForwardFlops, forward_flops
from online.models import check_length, load_config
from online.planner import Units
from online.sizes import Sizes
from online.skeleton import of_config
from online.statics import live_statics
from store.manifest import Provenance
from teacher_dump.recipe import DumpRecipe
from teacher_dump.selection import Request
from teacher_dump.teacher import TeacherPass, pass_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sketch(Sizes):
    """A teacher without its weights, with what a recipe keeps of its answers."""

    teacher: TeacherPass
    """Its tensors have no data; its shape, wiring and stored features are those of the real one."""
    flops: ForwardFlops
    _fake: FakeTensorMode
    _known: dict[tuple[int, int, int], int] = field(default_factory=dict)

    @cached_property
    def statics(self) -> int:
        """Bytes of the weights that derivations need."""
        return sum(weight.nbytes + 4 for weight in live_statics(self.loaded, self.teacher.plan.statics).values())

    def words(self, tokens: float, rows: float, labelled: float) -> float:
        """Tokens that go through the language-model head, of so many with their padding."""
        counts = {"all": tokens, "mean": tokens, "masked": labelled, "labels": labelled}
        asked = {spec.feature.positions for spec in self.teacher.specs if spec.feature.site == "lm_logits"}
        return sum(counts.get(positions, rows) for positions in asked)

    def batch_bytes(self, rows: int, tokens: int, labelled: int) -> int:
        """Peak bytes that the answers to a batch take on the device beside the weights: activations and what is captured.

        They are counted by answering it: every tensor that is made counts until it is dropped.

        Args:
            rows: B, each of ``tokens`` padded tokens, T, of which none is padding.
            labelled: N, of all rows.
        """
        key = (rows, tokens, labelled)
        if key not in self._known:
            with self._fake, torch.inference_mode(False):
                paired = self.teacher.info.intervention is not None
                batch = blank_batch(rows + rows % 2 if paired else rows, tokens, labelled, paired)
                present = [
                    *self.loaded.model.parameters(),
                    *self.loaded.model.buffers(),
                    *(value for value in vars(batch).values() if isinstance(value, torch.Tensor)),
                ]
                with Allocations(present) as made:
                    self.teacher.start(batch)
            self._known[key] = made.peak
        return self._known[key]


def sketch(recipe: DumpRecipe, requests: tuple[Request, ...], units: Units, longest: int, made: Provenance) -> Sketch:
    """The teacher of ``recipe``, of which only config.json is read.

    Args:
        longest: Tokens of the longest row.

    Raises:
        ValueError: there is none, it cannot give a feature, or it takes shorter rows.
    """
    spec = recipe.teacher
    config = load_config(spec.model, spec.trust_remote_code)
    if spec.labels is not None:
        config.num_labels = spec.labels
    fake = FakeTensorMode()
    with fake:
        loaded = of_config(spec, copy.deepcopy(config))
        for request in requests:
            check_key(loaded, replace(request.key, form=""))
        check_length(loaded, longest)
        teacher = pass_of(recipe, requests, loaded, "", _CPU, units, made)
    return Sketch(teacher.loaded, teacher, forward_flops(config, spec.head, spec.modules, spec.trust_remote_code), fake)
