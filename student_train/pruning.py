"""When a sweep gives up a combination: Optuna's pruners, and the curve that they look at."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from store.strict import Strict
from student_train.curves import JOURNAL
from student_train.journal import read_journal

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

OPTIONS = {"median": ("startup", "warmup"), "halving": ("min_steps", "reduction"), "hyperband": ("min_steps", "max_steps", "reduction")}
"""Pruner -> its options."""


class Pruner(Strict):
    """One of Optuna's pruners; ``median`` by itself is short for ``{name: median}``.

    ``median`` ends what is worse than the median of finished combinations at the same step (MedianPruner). ``halving`` lets the best of
    each ``reduction`` combinations pass ``min_steps``, ``min_steps * reduction`` and so on (SuccessiveHalvingPruner; Li et al. 2020,
    ASHA, arXiv 1810.05934). ``hyperband`` divides combinations among several such ``min_steps`` (HyperbandPruner; Li et al. 2018, JMLR 18).
    """

    name: Literal["median", "halving", "hyperband"]
    startup: int = Field(default=5, ge=0)
    """Of median: combinations that must be finished before any is ended."""
    warmup: int = Field(default=0, ge=0)
    """Of median: optimiser steps in which none is ended."""
    min_steps: int = Field(default=1, ge=1)
    """Of halving and hyperband, required there: optimiser steps that each combination trains for."""
    max_steps: int = Field(default=1, ge=1)
    """Of hyperband, required there: optimiser steps of a whole run."""
    reduction: int = Field(default=3, ge=2)
    """Of halving and hyperband: one in so many goes on."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_its_options(self) -> "Pruner":
        known, given = OPTIONS[self.name], self.model_fields_set - {"name"}
        if other := given - set(known):
            raise ValueError(f"{self.name} takes {' and '.join(known)}, found {', '.join(sorted(other))}")
        if lacking := [name for name in known if name.endswith("_steps") and name not in given]:
            raise ValueError(f"{self.name} needs {' and '.join(lacking)}, found {', '.join(sorted(given)) or 'no options'}")
        if self.name == "hyperband" and self.max_steps < self.min_steps:
            raise ValueError(f"expected max_steps to be at least min_steps, found {self.max_steps} and {self.min_steps}")
        return self


def made(pruner: Pruner | None) -> "BasePruner":
    """Optuna's pruner."""
    from optuna import pruners

    if pruner is None:
        return pruners.NopPruner()
    if pruner.name == "median":
        return pruners.MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup)
    if pruner.name == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=pruner.min_steps, reduction_factor=pruner.reduction)
    return pruners.HyperbandPruner(pruner.min_steps, pruner.max_steps, pruner.reduction)


def curve(phase: Path, metric: str) -> dict[int, float]:
    """Optimiser step -> held-out score of ``metric`` (its leading minus aside), as the run in a phase's folder has logged it so far."""
    name = f"eval_{metric.removeprefix('-')}"
    return {int(entry["step"]): entry[name] for entry in read_journal(phase / JOURNAL) if name in entry}


def best(scores: Mapping[int, float], metric: str) -> float | None:
    """The best number of a curve; None where there is none."""
    finite = [score for score in scores.values() if math.isfinite(score)]
    return (min if metric.startswith("-") else max)(finite, default=None)
