"""Teachers that run in the training job: what a recipe says of them, and their models, each sharded over the job's ranks."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Discriminator, Field, Tag

from online.fingerprints import tokenizer_fingerprint
from online.models import LoadedModel, ModelSpec, check_length, load_config, load_model, load_tokenizer, model_shape
from online.ranks import talking
from online.sharding import Sharding, Whole
from online.teacher import LiveTeacher, Teacher, Teachers
from online.tensor_parallel import Split
from online.turns import TakingTurns
from store.errors import FingerprintMismatch
from store.features import FeatureKey
from store.intervention import Intervention
from store.manifest import RowsInfo
from store.shape import ModelShape
from store.strict import MEMBER, Strict


class LiveSpec(ModelSpec):
    """A teacher on disk, and how it lies over the ranks of the job."""

    sharding: Sharding = Sharding()
    """``size`` is 1 or all ranks of the job: the student learns on every one of them. Under ``tp`` all ranks answer the rows of one after
    those of another."""
    intervention: Intervention | None = None
    """Answer with hidden states of each row's partner written in (DIITO), as in a dump's recipe."""


def _number(value: object) -> str:
    one = isinstance(value, LiveSpec) or (isinstance(value, dict) and isinstance(value.get("model"), str | Path))
    return _ONE if one else _SEVERAL


_ONE, _SEVERAL = f"{MEMBER}one", f"{MEMBER}several"


class Online(Strict):
    """Teachers at work in the job, instead of a store's answers."""

    online: Annotated[
        Annotated[LiveSpec, Tag(_ONE)]
        | Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], LiveSpec], Field(min_length=1), Tag(_SEVERAL)],
        Discriminator(_number),
    ]
    """One model, or several by name, from small to large; metrics compare with the last one."""

    @property
    def teachers(self) -> dict[str, LiveSpec]:
        """By name; the only one has none."""
        return {"": self.online} if isinstance(self.online, LiveSpec) else self.online


def plain(spec: LiveSpec) -> LiveSpec:
    """``spec`` without an intervention: specs that agree so share one model."""
    return spec.model_copy(update={"intervention": None})


def teacher_kind(value: object) -> str:
    """The member of the union of a phase's ``teacher`` that ``value`` can only be."""
    return f"{MEMBER}online" if isinstance(value, dict | Online) else f"{MEMBER}word"


def live_shapes(specs: Mapping[str, LiveSpec]) -> dict[str, ModelShape]:
    """Shapes of live teachers by name, from their configurations alone.

    Raises:
        ValueError: no model folder, a head that the family lacks, or an intervention in blocks that are not there.
    """
    shapes = {name: model_shape(load_config(spec.model, spec.trust_remote_code), spec.head, spec.modules) for name, spec in specs.items()}
    for name, spec in specs.items():
        if spec.intervention is not None:
            spec.intervention.check(f"teacher {name}" if name else "teacher", shapes[name].layers)
    return shapes


def check_live(spec: LiveSpec, rows: RowsInfo, store: str) -> None:
    """The tokenizer of a live teacher must be that of the ``rows`` it is to answer, and its sharding one that a training job can have.

    Raises:
        FingerprintMismatch: it is another.
        ValueError: a sharding that does not take all ranks.
    """
    found = tokenizer_fingerprint(load_tokenizer(spec))
    if found != rows.tokenizer:
        raise FingerprintMismatch(
            f"{store} was built with another tokenizer than that of the teacher {spec.model}: rows.tokenizer is {rows.tokenizer[:12]}, "
            f"the teacher's {found[:12]}; build rows with this tokenizer (teacher-dump rows). A student of another tokenizer than its "
            "teacher's learns from text that it has written (teacher-dump generate) and from "
            "its task logits (teacher-dump graft): docs/causal.md"
        )
    sharding, ranks = spec.sharding, int(os.environ.get("WORLD_SIZE", "1"))
    if sharding.kind == "auto":
        raise ValueError("sharding: a training job says how its teacher lies; expected kind none, zero3, fsdp or tp, found auto")
    if "RANK" in os.environ and sharding.size not in (1, ranks):
        raise ValueError(f"sharding: size {sharding.size} of a job of {ranks} ranks: expected {ranks}, or kind: none")
    if sharding.size > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"sharding: size {sharding.size} needs a launch of as many processes: "
            f"torchrun --standalone --nproc-per-node={sharding.size} -m student_train.cli run RECIPE"
        )


def load_live(specs: Mapping[str, LiveSpec], longest: int, device: torch.device) -> dict[str, LoadedModel]:
    """The models of live teachers by name: frozen, in eval mode; all ranks of the job load them together.

    Two names of one model share it, with or without an intervention.

    Args:
        longest: Tokens of the longest row they will see.

    Raises:
        ValueError: a model that cannot be loaded, or takes shorter rows.
    """
    models: dict[str, LoadedModel] = {}
    for name, spec in specs.items():
        same = next((other for other in models if plain(specs[other]) == plain(spec)), None)
        if same is not None:
            models[name] = models[same]
            continue
        with talking():
            models[name] = load_model(spec, sharding=spec.sharding, device=device)
        models[name].model.requires_grad_(False)
        check_length(models[name], longest)
    return models


def answering(
    models: Mapping[str, LoadedModel], keys: Mapping[str, frozenset[FeatureKey]], specs: Mapping[str, LiveSpec]
) -> Teacher | Teachers:
    """Whoever answers for ``keys`` (by teacher) with ``models``, loaded as ``specs`` say, one after the other.

    Raises:
        ValueError: a model lacks a feature.
    """
    teachers = {name: _teacher(model, keys.get(name, frozenset()), specs[name].intervention) for name, model in models.items()}
    return teachers[""] if "" in teachers else Teachers(teachers)


def takes_all_ranks(models: Mapping[str, LoadedModel]) -> bool:
    """Whether a forward pass of any of them is a collective."""
    return any(not isinstance(model.weights, Whole) for model in models.values())


def _teacher(model: LoadedModel, wanted: frozenset[FeatureKey], intervention: Intervention | None) -> Teacher:
    live = LiveTeacher(model, wanted, intervention=intervention)
    return TakingTurns(live) if isinstance(model.weights, Split) else live
