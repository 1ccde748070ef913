"""What is counted before an optimiser step, and what has been summed since the last log."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from online.ranks import Ranks
from student_train.bundle import Bundle
from student_train.micro_batch import MicroBatch

Counts = dict[str, float]


class Window:
    """What has been summed since the last log, on this rank."""

    def __init__(self, started: float | None = None) -> None:
        self.terms: dict[str, Tensor] = {}
        self.steps: Counts = {}
        self.tokens = 0.0
        self.waited = 0.0
        self.paused = 0.0
        self.norms: Counts = {}
        self.started = started
        """None until the first step: what a run does before it, reading a checkpoint for instance, is no part of its speed."""

    def begin(self, now: float) -> None:
        """A step begins."""
        if self.started is None:
            self.started, self.paused = now, 0.0

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
        """The means of terms and gradient norms over all ranks, and this run's speed; a collective.

        ``loader_wait`` is the share of the time in which the training loop waited for rows and features (read ahead or not), mean over
        ranks; evaluations and checkpoints are no part of the time, and neither is waiting for other ranks.
        """
        assert self.started is not None, "nothing to log"
        elapsed = time.perf_counter() - self.started - self.paused
        names = sorted(self.terms)
        terms = torch.stack([self.terms[name].double() for name in names]).tolist()
        summed = ranks.sum([*terms, *self.norms.values(), self.waited])
        sums, of_norms, waited = summed[: len(names)], summed[len(names) : -1], summed[-1]
        means = {name: value / self.steps[name] for name, value in zip(names, sums, strict=True) if name in self.steps}
        means |= {name: norm / ranks.count for name, norm in zip(self.norms, of_norms, strict=True)}
        return {**means, "tokens_per_second": self.tokens / elapsed, "loader_wait": waited / ranks.count / elapsed}


def counted(bundle: Bundle, micro_batches: Sequence[MicroBatch], ranks: Ranks, where: str) -> Counts:
    """What each term of an optimiser step sums over, and its ``tokens``, over all ranks; a collective.

    Raises:
        ValueError: there is nothing to learn from: the loss would be 0, and look like success.
    """
    counts: Counts = {"tokens": 0.0}
    for item in micro_batches:
        counts["tokens"] += float(item.batch.lengths.sum())
        for name, count in bundle.counts(item.batch, item.taught).items():
            counts[name] = counts.get(name, 0.0) + count
    counts = dict(zip(counts, ranks.sum(list(counts.values())), strict=True))
    terms = [name for name in counts if name != "tokens"]
    if not any(counts[name] for name in terms):
        raise ValueError(
            f"{where} hold nothing for {', '.join(terms)} to learn from; expected labels or "
            "masked words: build the rows with a label, or with objective mlm or causal"
        )
    return counts
