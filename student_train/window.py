"""What has been summed since the last log."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from online.ranks import Ranks

Counts = dict[str, float]


class Window:
    """What has been summed since the last log, on this rank."""

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.steps: Counts = {}
        self.tokens = 0.0
        self.waited = 0.0
        self.paused = 0.0
        self.norms: Counts = {}
        self.started = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a micro-batch."""
        for name, term in terms.items():
            self.terms[name] = self.terms[name] + term if name in self.terms else term

    def add_step(self, counts: Counts) -> None:
        """Add the counts of an optimiser step, over all ranks."""
        self.tokens += counts["tokens"]
        for name, count in counts.items():
            if name != "tokens" and count > 0:
                self.steps[name] = self.steps.get(name, 0) + 1

    def logs(self, ranks: Ranks) -> dict[str, float]:
        """The means of terms and gradient norms over all ranks, and this run's speed; a collective."""
        elapsed = time.perf_counter() - self.started - self.paused
        names = sorted(self.terms)
        terms = torch.stack([self.terms[name].double() for name in names]).tolist()
        summed = ranks.sum([*terms, *self.norms.values(), self.waited])
        sums, of_norms, waited = summed[: len(names)], summed[len(names) : -1], summed[-1]
        means = {name: value / self.steps[name] for name, value in zip(names, sums, strict=True) if name in self.steps}
        means |= {name: norm / ranks.count for name, norm in zip(self.norms, of_norms, strict=True)}
        return {**means, "tokens_per_second": self.tokens / elapsed, "loader_wait": waited / ranks.count / elapsed}
