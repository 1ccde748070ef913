"""The figures of a rank as a file for the textfile collector of Prometheus's node exporter."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_dump.totals import Totals

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_FIGURES = (
    ("rows", "counter", "Rows that the teacher has answered in this run."),
    ("tokens", "counter", "Tokens of these rows, without padding."),
    ("padded_tokens", "counter", "Tokens that the teacher was run on, with padding."),
    ("committed_shards", "counter", "Shards that this rank has committed in this run."),
    ("written_bytes", "counter", "Bytes of the files of these shards."),
    ("floating_point_operations", "counter", "Operations of the teacher's forward passes; 0 where they are not counted."),
    ("answering_seconds", "counter", "Time since the teacher began to answer."),
    ("disk_wait_seconds", "counter", "Time of this that the teacher waited for the disk."),
    ("queue_bytes", "gauge", "Answers that wait for the disk."),
    ("queue_limit_bytes", "gauge", "Answers that may wait for the disk."),
    ("mfu_ratio", "gauge", "Share of the GPU's arithmetic that the operations are."),
    ("running", "gauge", "1 during a run, 0 after it."),
    ("pass_shards", "gauge", "Shards of the pass."),
    ("pass_committed_shards", "gauge", "Shards of the pass that are committed, by whichever run."),
)
"""Name without prefix and unit suffix ``_total``, type, and what it is."""

PREFIX = "teachercache_dump_"
LABELS = ("store", "pass", "rank")


class Textfile:
    """One file, replaced as a whole each time.

    Args:
        folder: The one that the collector reads; made if absent.

    Raises:
        ValueError: prometheus_client is not installed, or the folder cannot be made.
    """

    def __init__(self, folder: Path, store: Path, pass_name: str, rank: int) -> None:
        try:
            import prometheus_client  # noqa: F401
        except ImportError:
            raise ValueError("prometheus: needs a library; install it with: pip install 'teachercache[observe]'") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"prometheus: cannot make the folder {folder}: {error.strerror}") from None
        self.path = folder / f"teacher-dump-{store.absolute().name}-{pass_name}-rank{rank}.prom"
        self._labels = (str(store.absolute()), pass_name, str(rank))
        self._values: dict[str, float] = {}

    def write(self, totals: Totals, job: tuple[int, int] | None, running: bool) -> None:
        """Put the figures into the file; ``job`` has the shards of the pass that are committed, and all, where this rank tells of it.

        Raises:
            OSError: it cannot be written.
        """
        from prometheus_client import CollectorRegistry, write_to_textfile

        self._values = {
            "rows": totals.rows,
            "tokens": totals.tokens,
            "padded_tokens": totals.padded_tokens,
            "committed_shards": totals.shards,
            "written_bytes": totals.bytes,
            "floating_point_operations": totals.operations,
            "answering_seconds": totals.seconds,
            "disk_wait_seconds": totals.disk_wait,
            "queue_bytes": totals.queue_bytes,
            "queue_limit_bytes": totals.queue_limit,
            "running": int(running),
        }
        if totals.mfu is not None:
            self._values["mfu_ratio"] = totals.mfu
        if job is not None:
            self._values |= {"pass_committed_shards": job[0], "pass_shards": job[1]}
        registry = CollectorRegistry()
        registry.register(self)
        write_to_textfile(str(self.path), registry)

    def collect(self) -> Iterator["Metric"]:
        """What prometheus_client asks for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, kind, meaning in _FIGURES:
            if name in self._values:
                family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(PREFIX + name, meaning, labels=LABELS)
                family.add_metric(self._labels, self._values[name])
                yield family
