"""What a rank says before it ends: to people, and to the launcher that started it, which may have heard the same of the others.

torch's launchers name a file to each rank in the environment (torch.distributed.elastic.multiprocessing.errors) and show what is in it.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import click

OURS = "teacher-dump-"
"""Beginning of the name of jobs whose ranks leave the telling to `teacher-dump run --nproc`."""

_FILE, _JOB = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class LastWords:
    """Why a rank has ended before it was done."""

    text: str
    code: int
    """Exit code that says the same."""
    follows: bool = False
    """Whether it is only what the end of another rank brings about."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self | None:
        """Those that a rank has left in its launcher's file, None where it could say nothing."""
        return cls(data["message"]["message"], data["code"], data["follows"]) if "follows" in data else None

    def end(self) -> NoReturn:
        """Say them, and end this process."""
        if file := os.environ.get(_FILE):
            message = {"message": self.text, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message, "code": self.code, "follows": self.follows}))
        if not (file and os.environ.get(_JOB, "").startswith(OURS)):
            rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
            click.echo(f"rank {rank}: {self.text}" if ranks != "1" else self.text, err=True)
        sys.exit(self.code)


class RanksFailed(Exception):
    """Ranks of a job have ended before they were done; the others were stopped.

    Args:
        text: One message for all of them.
        code: Exit code that says the same.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
