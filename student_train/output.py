"""The output folder of a run: whose it is, what is finished in it, and that one process at a time writes a phase.

<output>/run.json        that the folder is a run's: command, versions, date
<output>/recipe.yaml     the recipe as resolved
<output>/<phase>/start.json     what the phase is made of, and the scores of its untrained student
<output>/<phase>/checkpoints/ metrics.jsonl tensorboard/     of the training
<output>/<phase>/metrics.parquet    the curves as a table, when training ends
<output>/<phase>/adapter/       the adapters of a student that trained no others, as peft reads them
<output>/<phase>/student/       the result: a Hugging Face folder with a model card
<output>/<phase>/predictions.parquet  its answers to held-out rows, where metrics read some
<output>/<phase>/result.json    written last: scores before and after, fingerprint of the student
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from store.manifest import Json, Provenance
from store.publish import make_folder, replace
from store.reader import Store
from store.strict import parse
from store.together import fingerprint
from student_train import checkpoint
from student_train.arguments import fixed_on_resume
from student_train.recipe import PhaseSpec, TrainRecipe

RUN = "run.json"
RECIPE = "recipe.yaml"
START = "start.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"


def phase_folder(recipe: TrainRecipe, phase: str) -> Path:
    """Where everything of a phase lies."""
    return recipe.output / phase


def student_folder(recipe: TrainRecipe, phase: str) -> Path:
    """Where a phase leaves its student."""
    return recipe.output / phase / "student"


def recipe_yaml(recipe: TrainRecipe) -> str:
    """The recipe as resolved, in its own format."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def refuse_foreign(output: Path) -> None:
    """Raise ValueError where ``output`` exists and is no folder of an earlier run, or cannot be one."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"output: expected a folder or nothing, found a file: {nearest}")
    if output.is_dir() and not (output / RUN).is_file() and any(output.iterdir()):
        raise ValueError(f"output: {output} holds something else than a run of student-train; give another folder")


def write_run(recipe: TrainRecipe, made: Provenance) -> None:
    """Mark the output folder as this run's."""
    make_folder(recipe.output)
    replace(recipe.output / RUN, made.model_dump_json(indent=1).encode())
    replace(recipe.output / RECIPE, recipe_yaml(recipe).encode())


def read_run(output: Path) -> Provenance:
    """How the run in ``output`` was started."""
    return parse(Provenance, _read(output / RUN), str(output / RUN))


def identity(recipe: TrainRecipe, phase: PhaseSpec) -> Json:
    """What a phase's student follows from: options that shape its weights, and fingerprints of rows, teachers and the earlier student."""
    shaping = {"student", "data", "teacher", "methods", "steps", "epochs", "batch_rows", "accumulation", "best", "patience"}
    tree: Json = phase.model_dump(mode="json", include=shaping)
    tree["data"] = [data.model_dump(mode="json", exclude={"follow"}) for data in phase.data]
    tree["trainer"] = json.loads(json.dumps(fixed_on_resume(phase.trainer)))
    tree["seed"] = recipe.seed
    tree["meta"] = None if phase.meta is None else phase.meta.model_dump(mode="json", exclude={"follow"})
    read = (*phase.data, *([phase.meta] if phase.meta else []))
    manifests = {data.store: Store.open(data.store).manifest for data in read}
    tree["rows"] = [f"{manifests[data.store].rows.corpus} {manifests[data.store].rows.building}" for data in read]
    tree["teachers"] = [{name: fingerprint(manifests[data.store].passes, passes) for name, passes in data.answers.items()} for data in read]
    if phase.student.phase is not None:
        result = _read(phase_folder(recipe, phase.student.phase) / RESULT)
        tree["earlier student"] = result["student"] if result else None
    carried = sorted({spec.carry for spec in phase.methods if spec.carry is not None})
    tree["carried"] = {name: _read(phase_folder(recipe, name) / RESULT).get("methods") for name in carried}
    return tree


def finished(recipe: TrainRecipe, phase: PhaseSpec) -> bool:
    """Whether ``phase`` has its result. A phase that failed before its first checkpoint may start over with other options.

    Raises:
        ValueError: the output holds a checkpoint or the result of this phase with other options; the message names them.
    """
    folder = phase_folder(recipe, phase.name)
    done = (folder / RESULT).is_file()
    other = _other_options(recipe, phase)
    if other and (done or checkpoint.exists(folder / CHECKPOINTS)):
        raise ValueError(
            f"phase {phase.name!r} in {recipe.output} was begun with other options ({', '.join(other)}); "
            f"give another output, or remove {folder} to train it again"
        )
    return done


def write_start(recipe: TrainRecipe, phase: PhaseSpec, scores: Mapping[str, float]) -> None:
    """Keep what the phase is made of and what its untrained student scores."""
    tree = {"identity": identity(recipe, phase), "scores": dict(scores)}
    replace(phase_folder(recipe, phase.name) / START, json.dumps(tree, indent=1).encode())


def read_start(recipe: TrainRecipe, phase: PhaseSpec) -> dict[str, float] | None:
    """The scores that an earlier process measured at the start of the phase as it is now."""
    scores = _read(phase_folder(recipe, phase.name) / START).get("scores")
    if not isinstance(scores, dict) or _other_options(recipe, phase):
        return None
    return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}


def write_result(recipe: TrainRecipe, phase: PhaseSpec, result: Json) -> None:
    """Say that the phase is finished; its student is in place."""
    replace(phase_folder(recipe, phase.name) / RESULT, json.dumps(result, indent=1).encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in ``folder`` (made if absent) until the end, also if this process is killed.

    Raises:
        ValueError: another process works there.
    """
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another student-train is training in {folder}; wait for it or end it") from None
        yield


def _other_options(recipe: TrainRecipe, phase: PhaseSpec) -> list[str]:
    """What of the phase's identity is not as it was when the phase was begun; nothing where it was not."""
    found = _read(phase_folder(recipe, phase.name) / START).get("identity")
    if not isinstance(found, dict):
        return []
    now = identity(recipe, phase)
    return sorted(name for name in now.keys() | found.keys() if now.get(name) != found.get(name))


def _read(file: Path) -> Json:
    """A JSON object; empty where there is no such file."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}; remove {file.parent} to train the phase again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is damaged: expected an object; remove {file.parent} to train the phase again")
    return tree


def found_student(folder: Path) -> Path:
    """Where the student of a run, a phase or itself lies."""
    if (folder / "config.json").is_file():
        return folder
    if (folder / "student" / "config.json").is_file():
        return folder / "student"
    found = sorted(path.parent for path in folder.glob("*/student/config.json")) if (folder / RUN).is_file() else []
    if len(found) == 1:
        return found[0]
    hint = f"; its students are {', '.join(str(path) for path in found)}: name one of them" if found else ""
    raise ValueError(f"expected the folder of a student, found none at {folder}{hint}")
