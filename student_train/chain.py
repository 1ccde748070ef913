"""A chain: commands of the two programs that follow one another, each in a process of its own.

What one step leaves is what the next one starts from: a store, rows, or the student of a phase, which is the teacher of the next
dump. The contract between steps is command line, exit code and store, so this file knows the other program by its command line alone.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from store.strict import Strict, load_yaml, read_yaml
from student_train.output import student_folder
from student_train.recipe import TrainRecipe

COMMANDS = {
    "rows": ("teacher-dump", "rows"),
    "augment": ("teacher-dump", "augment"),
    "generate": ("teacher-dump", "generate"),
    "dump": ("teacher-dump", "run"),
    "add": ("teacher-dump", "add"),
    "train": ("student-train", "run"),
}
"""What a step may do -> program and command."""
ON_RANKS = ("dump", "add", "train")


def _set_like(value: str) -> str:
    if value.startswith("-") or not value.partition("=")[1]:
        raise ValueError("expected key.path=value")
    return value


class Step(Strict):
    """One command; exactly one of ``rows``, ``augment``, ``generate``, ``dump``, ``add``, ``train`` names its recipe."""

    rows: Path | None = None
    """``teacher-dump rows`` with this recipe."""
    augment: Path | None = None
    """``teacher-dump augment`` with this recipe."""
    generate: Path | None = None
    """``teacher-dump generate`` with this recipe."""
    dump: Path | None = None
    """``teacher-dump run`` with this recipe."""
    add: Path | None = None
    """``teacher-dump add`` with this recipe."""
    train: Path | None = None
    """``student-train run`` with this recipe."""
    phase: str | None = None
    """The phase that ``train`` trains; by default all of its recipe, in their order."""
    set: tuple[Annotated[str, AfterValidator(_set_like)], ...] = ()
    """Options of the recipe as on a command line, such as ["seed=1", "rows.sources.0.limit=100"]."""
    nproc: int = Field(default=1, ge=1)
    """Ranks on this machine that do it together: of ``dump``, of ``add``, and of ``train`` with a ``phase``."""

    @model_validator(mode="after")
    def _one_command(self) -> "Step":
        given = [verb for verb in COMMANDS if getattr(self, verb) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(COMMANDS)}; given: {', '.join(given) or 'none'}")
        if self.phase is not None and self.train is None:
            raise ValueError(f"phase goes with train, not with {given[0]}")
        if self.nproc > 1 and given[0] not in ON_RANKS:
            raise ValueError(f"nproc goes with {', '.join(ON_RANKS)}, not with {given[0]}")
        if self.nproc > 1 and self.train is not None and self.phase is None:
            raise ValueError("several ranks train one phase: give its name, phase: NAME")
        return self

    @property
    def verb(self) -> str:
        """The key of COMMANDS that is given."""
        return next(verb for verb in COMMANDS if getattr(self, verb) is not None)

    @property
    def recipe(self) -> Path:
        """The recipe of the command."""
        path: Path = getattr(self, self.verb)
        return path

    @property
    def words(self) -> list[str]:
        """The command line, as one would type it."""
        program, command = COMMANDS[self.verb]
        arguments = [command, str(self.recipe), *self.set]
        if self.phase is not None:
            arguments += ["--phase", self.phase]
        if self.nproc == 1:
            return [program, *arguments]
        if self.train is None:
            return [program, *arguments, "--nproc", str(self.nproc)]
        return ["torchrun", "--standalone", f"--nproc-per-node={self.nproc}", "-m", "student_train.cli", *arguments]


class Chain(Strict):
    """Steps in their order."""

    steps: tuple[Step, ...] = Field(min_length=1)


def check(chain: Chain) -> None:
    """Refuse what would only fail when its step comes.

    Raises:
        ValueError: a recipe is missing or no YAML, an override does not fit it, a training recipe is wrong or lacks the phase,
            or a teacher's folder is neither there nor made by an earlier step; the message names the step.
    """
    students: list[Path] = []
    for number, step in enumerate(chain.steps, 1):
        try:
            if step.train is None:
                _check_teacher(read_yaml(step.recipe, step.set), students)
                continue
            recipe = load_yaml(TrainRecipe, step.recipe, step.set)
            phases = recipe.phases if step.phase is None else (recipe.phase(step.phase),)
        except ValueError as error:
            raise ValueError(f"step {number} of {len(chain.steps)}: {error}") from None
        students += [student_folder(recipe, phase.name) for phase in phases]


def _check_teacher(tree: dict[str, Any], students: list[Path]) -> None:
    teacher = tree.get("teacher")
    model = teacher.get("model") if isinstance(teacher, dict) else None
    if not isinstance(model, str) or Path(model).is_dir():  # whatever else it is, its program refuses
        return
    if Path(model).resolve() not in [folder.resolve() for folder in students]:
        made = ", ".join(map(str, students)) or "none"
        raise ValueError(f"teacher.model: expected a folder, or the student of an earlier step ({made}); found nothing at {model}")
