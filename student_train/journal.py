"""The curves of a run as JSON lines: what TensorBoard shows, for scripts."""

import json
from collections.abc import Mapping
from pathlib import Path


class Journal:
    """``metrics.jsonl``: one object for each log, with its ``step``; a resumed run goes on after its checkpoint's step."""

    def __init__(self, file: Path, step: int) -> None:
        """Keep what was written up to ``step`` (-1 for a run that starts: nothing) and drop what lies after it."""
        self.file = file
        entries = [entry for entry in read_journal(file) if entry["step"] <= step]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")

    def append(self, entry: Mapping[str, float]) -> None:
        """Add one line; it is on its way to the disk when this returns."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def read_journal(file: Path) -> list[dict[str, float]]:
    """The entries of a journal; a last line that a killed process left half written is no entry."""
    if not file.exists():
        return []
    *lines, _unfinished = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
