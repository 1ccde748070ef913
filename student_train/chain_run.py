"""A chain at work: one step after the other, until one fails."""

import logging
import os
import shlex
import sys
import time
from datetime import timedelta

from student_train.chain import Chain
from student_train.child import run_child

MODULES = {"teacher-dump": "teacher_dump.cli", "student-train": "student_train.cli", "torchrun": "torch.distributed.run"}
"""Programs as modules of this Python, which are found wherever the shell looks."""

_log = logging.getLogger(__name__)


class StepError(Exception):
    """A step ended badly, after its process said why; ``code`` is its exit code."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"{step} ended with exit code {code}. The same chain goes on with this step.")
        self.code = code


def run_chain(chain: Chain) -> None:
    """Run the steps of ``chain``, which was checked. What a step finds done already it skips by itself.

    Raises:
        ValueError: this process is a rank of a launch.
        StepError: a step failed, or SIGTERM ended it; none after it is started.
    """
    if "RANK" in os.environ:
        raise ValueError("a chain starts ranks by itself, as many as nproc of a step says; start it once, without a launcher")
    number, begun = len(chain.steps), time.monotonic()
    for place, step in enumerate(chain.steps, 1):
        name, start = f"step {place} of {number}", time.monotonic()
        _log.info("%s: %s", name, shlex.join(step.words))
        program, *arguments = step.words
        code = run_child([sys.executable, "-m", MODULES[program], *arguments])
        if code:
            raise StepError(f"{name} ({shlex.join(step.words)})", code)
        _log.info("%s took %s", name, _since(start))
    _log.info("all %d steps are done, in %s", number, _since(begun))


def _since(start: float) -> str:
    """Hours, minutes and seconds: ``0:03:12``."""
    return str(timedelta(seconds=round(time.monotonic() - start)))
