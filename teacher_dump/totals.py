"""What one rank did in one run, in figures."""

from dataclasses import asdict, dataclass

from pydantic import JsonValue

from online.figures import duration, size


@dataclass
class Totals:
    """What one rank did in this run so far."""

    rows: int = 0
    tokens: int = 0
    """Without padding."""
    padded_tokens: int = 0
    """Of the batches that the teacher was run on."""
    shards: int = 0
    """Committed ones."""
    bytes: int = 0
    """Of their files."""
    operations: int = 0
    """Floating-point operations of the teacher; 0 where they are not counted."""
    seconds: float = 0.0
    """Since it began to answer."""
    disk_wait: float = 0.0
    """Seconds of these that the teacher waited for the disk."""
    queue_bytes: int = 0
    """Answers that wait for the disk now."""
    queue_limit: int = 0
    """Bytes that may wait."""
    mfu: float | None = None
    """Share of the GPU's arithmetic that the operations are; None where unknown."""

    @property
    def padding(self) -> float:
        """Padding tokens that were computed for each real one."""
        return self.padded_tokens / self.tokens - 1 if self.tokens else 0.0

    def facts(self) -> dict[str, JsonValue]:
        """All of it for an event."""
        found: dict[str, JsonValue] = {**asdict(self), "padding": self.padding}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}

    @property
    def efficiency(self) -> str:
        """What was lost to padding and to the disk, for people."""
        arithmetic = "" if self.mfu is None else f", MFU {self.mfu:.0%}"
        return f"padding added {self.padding:.1%} tokens, {duration(self.disk_wait)} were spent waiting for the disk{arithmetic}"

    def __str__(self) -> str:
        done = f"{self.rows:,} rows, {self.tokens:,} tokens answered; {self.shards:,} shards, {size(self.bytes)} committed"
        return f"{done}; {duration(self.seconds)}; {self.efficiency}"
