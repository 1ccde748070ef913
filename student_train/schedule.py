"""Numbers that change in the course of a phase: weights, temperatures and whatever else a recipe gives a schedule."""

import math
from bisect import bisect_right
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from store.strict import MEMBER, Strict
from student_train.moment import Moment

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Strict):
    """A number as a function of the share of the phase that is behind it.

    - ``linear`` and ``cosine`` go from ``start`` to ``end`` while the share goes from ``begin`` to ``until``, and stay there.
    - ``steps`` is ``values[i]`` between ``at[i - 1]`` and ``at[i]``, shares in ascending order.
    - ``annealing`` is Annealing-KD's factor Phi(T) = 1 - (T - 1) / T_max with T falling from T_max = ``levels`` to 1 in equal stretches
      (Jafari et al. 2021, arXiv 2104.07163, section 3): 1 / levels, 2 / levels, ... 1.
    - ``continuation`` is Continuation-KD's psi: 0 to 1/2 in the first two thirds, then 1 (Jafari et al. 2022, arXiv 2212.05998:
      i / 40 up to epoch 20 of 30).

    With ``by: epoch`` it changes between epochs only: the share is that of whole epochs.
    """

    kind: Literal["linear", "cosine", "steps", "annealing", "continuation"]
    start: float = 1.0
    end: float = 0.0
    begin: Share = 0.0
    until: Share = 1.0
    values: tuple[float, ...] = ()
    at: tuple[Share, ...] = ()
    levels: int = Field(default=10, ge=1)
    by: Literal["step", "epoch"] = "step"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = {"linear": {"start", "end", "begin", "until"}, "steps": {"values", "at"}, "annealing": {"levels"}, "continuation": set()}
        known = own["linear" if self.kind == "cosine" else self.kind] | {"kind", "by"}
        if foreign := sorted(self.model_fields_set - known):
            raise ValueError(f"a schedule of kind {self.kind} takes {', '.join(sorted(known - {'kind'}))}, found {foreign[0]}")
        if self.kind in ("linear", "cosine") and self.begin >= self.until:
            raise ValueError(f"begin lies before until, found {self.begin} and {self.until}")
        if self.kind == "steps" and (len(self.values) != len(self.at) + 1 or list(self.at) != sorted(set(self.at))):
            raise ValueError("steps: expected one more value than shares in at, and at in ascending order")
        return self

    def __str__(self) -> str:
        """As a recipe says it."""
        return f"{{{', '.join(f'{name}: {value}' for name, value in self.model_dump(mode='json', exclude_unset=True).items())}}}"

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number that it takes."""
        taken = {"steps": self.values, "annealing": (1 / self.levels, 1.0), "continuation": (0.0, 1.0)}.get(
            self.kind, (self.start, self.end)
        )
        return min(taken), max(taken)

    def at_share(self, share: float) -> float:
        """The number when ``share`` of the phase is over."""
        if self.kind == "steps":
            return self.values[bisect_right(self.at, share)]
        if self.kind == "annealing":
            return min(self.levels, 1 + math.floor(share * self.levels)) / self.levels
        if self.kind == "continuation":
            return 0.75 * share if share <= 2 / 3 else 1.0
        way = min(1.0, max(0.0, (share - self.begin) / (self.until - self.begin)))
        if self.kind == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way


def kind_of(value: object) -> str:
    """The member of a union with Schedule that ``value`` can only be."""
    return f"{MEMBER}schedule" if isinstance(value, dict | Schedule) else f"{MEMBER}number"


NUMBER, SCHEDULE = Tag(kind_of(0)), Tag(kind_of({}))

Scheduled = Annotated[Annotated[float, NUMBER] | Annotated[Schedule, SCHEDULE], Discriminator(kind_of)]
"""A number, or how it changes."""


def at(value: Scheduled, moment: Moment) -> float:
    """``value`` at ``moment``."""
    if not isinstance(value, Schedule):
        return value
    return value.at_share(min(1.0, moment.epoch / moment.epochs) if value.by == "epoch" else moment.share)


def check_range(option: str, value: Scheduled, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse a number or schedule that is not always greater than ``above``, at least ``least`` and at most ``most``."""
    low, high = value.range if isinstance(value, Schedule) else (value, value)
    if not (low > above and low >= least and high <= most):
        bound = f"greater than {above:g}" if low <= above else f"{least:g} to {most:g}"
        raise ValueError(f"{option}: expected numbers {bound}, found {low if low <= above or low < least else high:g}")
