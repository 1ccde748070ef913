"""Whether a store of a teacher's features is worth making: the time to read a token's features against the time to compute them again.

With F the teacher's operations for a token, s those that its device does in a second, b the bytes of a token's features and w the bytes
that are read in a second, a pass over t tokens takes t F / s to compute and t b / w to read. A dump takes the longer of the two, for it
writes while the teacher goes on (writing as fast as reading: an assumption). n passes (students times epochs) then take

    live:   n t F / s        from a store:   t max(F / s, b / w) + n t b / w

so that a store has paid after n = max(F / s, b / w) / (F / s - b / w) passes, and never where b / w >= F / s. Both are upper bounds where
the student's own work hides a part of them, as readers that read ahead do. What the student computes is the same in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a machine reaches."""

    flops: float
    """The teacher's operations in a second."""
    bandwidth: float
    """Bytes of features that are read in a second."""


USUAL = Rates(0.4 * 312e12, 3e9)
"""Where nothing is said: 40 % of an A100's peak in 16 bits, and the disk of a node (assumptions, those of online.machines)."""


@dataclass(frozen=True)
class Passes:
    """Answers of a teacher to the same rows, again and again."""

    tokens: float
    """Of one pass."""
    count: float
    """Passes of all students together."""
    flops: float
    """Of the teacher for a token, F."""
    bytes: float
    """Of the features of a token, b; what rows have as a whole is spread over their tokens."""
    rates: Rates

    @property
    def compute(self) -> float:
        """Seconds in which the teacher answers one pass."""
        return self.tokens * self.flops / self.rates.flops

    @property
    def read(self) -> float:
        """Seconds in which one pass is read."""
        return self.tokens * self.bytes / self.rates.bandwidth

    @property
    def dump(self) -> float:
        """Seconds in which the store is made."""
        return max(self.compute, self.read)

    @property
    def live(self) -> float:
        """Seconds of the teacher with all passes computed."""
        return self.count * self.compute

    @property
    def stored(self) -> float:
        """Seconds of the dump and of reading for all passes."""
        return self.dump + self.count * self.read

    @property
    def even(self) -> float | None:
        """Passes after which a store has paid; None where it never does."""
        return self.dump / (self.compute - self.read) if self.compute > self.read else None

    @property
    def pays(self) -> bool:
        """Whether the passes take less time with a store."""
        return self.stored < self.live

    @property
    def least_bandwidth(self) -> float:
        """Bytes a second below which reading takes longer than computing: b s / F."""
        return self.bytes * self.rates.flops / self.flops
