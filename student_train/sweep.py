"""A sweep: one training recipe, tried with every combination of values for some of its keys, each with several seeds."""

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from store.strict import MEMBER, Strict, brief, parse, read_yaml, set_value
from student_train.recipe import PhaseSpec, TrainRecipe

_LONGEST = 100
"""Letters of a trial's name before its hash: file systems take 255."""

Values = Annotated[tuple[object, ...], Field(min_length=1)]
Alternatives = Annotated[dict[str, Annotated[dict[str, object], Field(min_length=1)]], Field(min_length=1)]


def _list_or_mapping(value: object) -> object:
    if not isinstance(value, list | tuple | dict):
        raise ValueError("expected a list of values, or alternatives by name")
    return value


def _kind(value: object) -> str:
    """The member of the union that is meant."""
    return f"{MEMBER}{'alternatives' if isinstance(value, dict) else 'values'}"


Tried = Annotated[
    Annotated[Values, Tag(f"{MEMBER}values")] | Annotated[Alternatives, Tag(f"{MEMBER}alternatives")],
    Discriminator(_kind),
    BeforeValidator(_list_or_mapping),
]


class Sweep(Strict):
    """A grid of trials; each is ``student-train run`` of the recipe with other values."""

    recipe: Path
    """Training recipe that all trials share; its ``output`` and ``seed`` are set for each."""
    output: Path
    """Folder of the sweep; each trial is a run in OUTPUT/trials/NAME."""
    search: dict[str, Tried] = Field(min_length=1)
    """What is tried, in all combinations. KEY.PATH of the recipe (list items by number) -> a list of values; or a name -> alternatives by
    name, each a mapping of KEY.PATH -> value, set together. Set in the order in which they stand here."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(0,), min_length=1)
    """Every combination is trained once with each of these seeds."""
    metric: str
    """Held-out score that ranks combinations, such as ``accuracy``; a leading minus means lower is better."""
    phase: str | None = None
    """Phase whose student is scored; the last one by default."""
    devices: tuple[Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")], ...] = ()
    """``cpu`` or ``cuda:N``: one trial at a time on each; named twice, two at once. By default one trial at a time, where ``run`` would
    train it."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each trial (OMP_NUM_THREADS); by default those of the environment."""

    @field_validator("search")
    @classmethod
    def _known_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        set_keys = [
            key for name, tried in value.items() for key in ([name] if isinstance(tried, tuple) else {k for o in tried.values() for k in o})
        ]
        if taken := {"output", "seed"} & set(set_keys):
            raise ValueError(f"{' and '.join(sorted(taken))} of a trial follow from the sweep: give seeds, and the sweep's output")
        for name, tried in value.items():
            texts = [_text(one) for one in tried] if isinstance(tried, tuple) else []
            if len(set(texts)) < len(texts):
                raise ValueError(f"{name}: expected different values, found one of them twice")
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected different seeds")
        return value


@dataclass(frozen=True)
class Trial:
    """One combination with one seed."""

    name: str
    """Follows from what is set, so that a sweep that is started again finds what it has done."""
    parameters: Mapping[str, object]
    """Key of ``search`` -> its value, or the name of the alternative."""
    seed: int
    recipe: TrainRecipe
    scored: PhaseSpec

    def __str__(self) -> str:
        return f"{combination(self.parameters)} seed={self.seed}"


def trials(sweep: Sweep) -> list[Trial]:
    """All trials in the order of the grid, the seeds of a combination together; no store is looked at.

    Raises:
        ValueError: a combination gives no valid recipe, or a recipe without the phase that is scored; the message names the combination.
    """
    base = read_yaml(sweep.recipe)
    labels = [list(tried) if isinstance(tried, dict) else range(len(tried)) for tried in sweep.search.values()]
    return [_trial(sweep, base, chosen, seed) for chosen in product(*labels) for seed in sweep.seeds]


def combination(parameters: Mapping[str, object]) -> str:
    """``method=kd learning_rate=5e-05``: keys by their last part, where that tells them apart."""
    return " ".join(f"{short}={_plain(value)}" for short, value in zip(short_keys(parameters), parameters.values(), strict=True))


def short_keys(parameters: Mapping[str, object]) -> list[str]:
    """Each key by its last part, or whole where another one ends alike."""
    last = [key.rpartition(".")[2] for key in parameters]
    return [one if last.count(one) == 1 else key for key, one in zip(parameters, last, strict=True)]


def _trial(sweep: Sweep, base: Mapping[str, Any], chosen: tuple[Any, ...], seed: int) -> Trial:
    parameters: dict[str, object] = {}
    settings: list[tuple[str, object]] = []
    for (key, tried), label in zip(sweep.search.items(), chosen, strict=True):
        parameters[key] = label if isinstance(tried, dict) else tried[label]
        settings += list(tried[label].items()) if isinstance(tried, dict) else [(key, tried[label])]
    settings.append(("seed", seed))
    readable = re.sub(r"[^A-Za-z0-9.=_+-]+", "_", f"{combination(parameters)} seed={seed}".replace(" ", "-"))[:_LONGEST]
    name = f"{readable}-{hashlib.sha256(_text(settings).encode()).hexdigest()[:8]}"
    tree = deepcopy(dict(base))
    where = f"{sweep.recipe} with {combination(parameters)}"
    for key, value in [*settings, ("output", str(sweep.output / "trials" / name))]:
        try:
            set_value(tree, key, deepcopy(value), key)
        except ValueError as error:
            raise ValueError(f"{where}: search: {error}") from None
    recipe = parse(TrainRecipe, tree, where)
    try:
        scored = recipe.phases[-1] if sweep.phase is None else recipe.phase(sweep.phase)
    except ValueError as error:
        raise ValueError(f"{where}: phase: {error}") from None
    return Trial(name, parameters, seed, recipe, scored)


def _text(value: object) -> str:
    """Plain data as text that is the same whenever the data is."""
    return json.dumps(value, sort_keys=True, default=str)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else brief(value)
