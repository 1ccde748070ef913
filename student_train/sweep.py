"""A sweep: one training recipe, tried with many combinations of values for some of its keys, each with several seeds."""

import hashlib
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from store.strict import Strict, brief, parse, read_yaml, set_value
from student_train.pruning import Pruner
from student_train.recipe import PhaseSpec, TrainRecipe
from student_train.search import Choice, NumberRange, Tried, corners, grid, parameters, set_keys, settings, text

_LONGEST = 100
"""Letters of a trial's name before its hash: file systems take 255."""
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")
_SECRET = re.compile(r"//[^/@]*:[^/]*@|password=", re.IGNORECASE)


class Sweep(Strict):
    """Many trials; each is ``student-train run`` of the recipe with other values."""

    recipe: Path
    """Training recipe that all trials share; its ``output`` and ``seed`` are set for each."""
    output: Path
    """Folder of the sweep; each trial is a run in OUTPUT/trials/NAME."""
    search: dict[str, Tried] = Field(min_length=1)
    """What is tried. KEY.PATH of the recipe (list items by number) -> a list of values, or a range with ``low`` and ``high``; or a name ->
    alternatives by name, each a mapping of KEY.PATH -> value, set together. Set in the order in which they stand here."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """``grid`` tries all combinations of lists and alternatives. ``random`` and ``tpe`` (Bergstra et al. 2011: where it has been good so
    far) propose ``trials`` of them, of ranges too."""
    trials: int | None = Field(default=None, ge=1)
    """How many combinations ``random`` and ``tpe`` propose, all workers together."""
    sampler_seed: int = Field(default=0, ge=0, lt=2**32)
    """What they propose follows from it."""
    pruner: Pruner | None = None
    """Ends combinations early that do badly: ``median``, ``{name: halving, min_steps: N}`` or ``{name: hyperband, min_steps: N,
    max_steps: N}``. It looks at the held-out scores of each combination's first seed; others begin when that is over."""
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
    storage: str | None = None
    """Database of the study, as SQLAlchemy writes its address (``sqlite:///study.db``, ``postgresql://host/name``), or ``$NAME``: the
    environment variable that holds it, for those with passwords. By default a file in OUTPUT."""

    @field_validator("search")
    @classmethod
    def _known_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := {"output", "seed"} & set_keys(value):
            raise ValueError(f"{' and '.join(sorted(taken))} of a trial follow from the sweep: give seeds, and the sweep's output")
        for name, tried in value.items():
            texts = [text(one) for one in tried] if isinstance(tried, tuple) else []
            if len(set(texts)) < len(texts):
                raise ValueError(f"{name}: expected different values, found one of them twice")
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected different seeds")
        return value

    @field_validator("storage")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        if value is not None and _VARIABLE.fullmatch(value) is None:
            if _SECRET.search(value):
                raise ValueError(
                    "expected no password in a file: put the address into an environment variable, and give its $NAME; given: ***"
                )
            if ":" not in value:
                raise ValueError("expected the address of a database, such as sqlite:///study.db, or $NAME of an environment variable")
        return value

    @model_validator(mode="after")
    def _has_a_sampler(self) -> "Sweep":
        ranges = [key for key, tried in self.search.items() if isinstance(tried, NumberRange)]
        if self.sampler == "grid" and ranges:
            raise ValueError(
                f"search: a grid has no end of numbers between low and high, found the range {ranges[0]}: "
                "give sampler: tpe (or random) and trials, or a list of values"
            )
        if self.sampler == "grid" and self.trials is not None:
            raise ValueError(f"trials: a grid is tried as a whole, found {self.trials}; leave it out, or give sampler: tpe (or random)")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"trials: expected how many combinations {self.sampler} proposes, found none")
        return self

    def database(self) -> str | None:
        """The address of the study's database; None: a file in the sweep's folder.

        Raises:
            ValueError: the environment variable that holds it is not set.
        """
        named = _VARIABLE.fullmatch(self.storage or "")
        if named is None:
            return self.storage
        if not os.environ.get(named[1]):
            raise ValueError(f"storage: expected the address of a database in the environment variable {named[1]}, which is not set")
        return os.environ[named[1]]


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
    """All trials of a grid in its order, the seeds of a combination together; of other sweeps those at the corners of what they search,
    which are checked before it begins. No store is looked at.

    Raises:
        ValueError: a combination gives no valid recipe, or a recipe without the phase that is scored; the message names the combination.
    """
    base = read_yaml(sweep.recipe)
    choices = grid(sweep.search) if sweep.sampler == "grid" else corners(sweep.search)
    return [trial for choice in choices for trial in trials_of(sweep, base, choice)]


def trials_of(sweep: Sweep, base: Mapping[str, Any], choice: Choice) -> tuple[Trial, ...]:
    """A combination with each seed; ``base`` is the recipe's plain data. Raises ValueError as ``trials`` does."""
    return tuple(_trial(sweep, base, choice, seed) for seed in sweep.seeds)


def combination(parameters: Mapping[str, object]) -> str:
    """``method=kd learning_rate=5e-05``: keys by their last part, where that tells them apart."""
    return " ".join(f"{short}={_plain(value)}" for short, value in zip(short_keys(parameters), parameters.values(), strict=True))


def short_keys(parameters: Mapping[str, object]) -> list[str]:
    """Each key by its last part, or whole where another one ends alike."""
    last = [key.rpartition(".")[2] for key in parameters]
    return [one if last.count(one) == 1 else key for key, one in zip(parameters, last, strict=True)]


def _trial(sweep: Sweep, base: Mapping[str, Any], choice: Choice, seed: int) -> Trial:
    chosen = parameters(sweep.search, choice)
    set_ = [*settings(sweep.search, choice), ("seed", seed)]
    readable = re.sub(r"[^A-Za-z0-9.=_+-]+", "_", f"{combination(chosen)} seed={seed}".replace(" ", "-"))[:_LONGEST]
    name = f"{readable}-{hashlib.sha256(text(set_).encode()).hexdigest()[:8]}"
    tree = deepcopy(dict(base))
    where = f"{sweep.recipe} with {combination(chosen)}"
    for key, value in [*set_, ("output", str(sweep.output / "trials" / name))]:
        try:
            set_value(tree, key, deepcopy(value), key)
        except ValueError as error:
            raise ValueError(f"{where}: search: {error}") from None
    recipe = parse(TrainRecipe, tree, where)
    try:
        scored = recipe.phases[-1] if sweep.phase is None else recipe.phase(sweep.phase)
    except ValueError as error:
        raise ValueError(f"{where}: phase: {error}") from None
    return Trial(name, chosen, seed, recipe, scored)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else brief(value)
