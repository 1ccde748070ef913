"""Every method with its teacher at work in the job: the losses of a run that reads the same teacher's answers from a store."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from case import all_of
from two_ranks import launched

from store.errors import FingerprintMismatch
from store.strict import parse
from student_train.journal import read_journal
from student_train.methods import METHODS
from student_train.output import recipe_yaml, student_folder
from student_train.recipe import TrainRecipe
from student_train.run import run

RUNS: list[tuple[str, dict[str, Any]]] = [
    *all_of("RUNS"),
    ("rw_kd", {"temperature": 2}),
    ("meta_kd", {"domains": 14, "layers": [[1, 2]]}),
    ("hrkd", {"domains": 14, "graph_heads": 2}),
]
NAMES = [f"{method}-{number}" for number, (method, _) in enumerate(RUNS)]
WORDS = {"lm_loss", "lm_kd", "distilbert"}
CLOZES = {"cloze_loss", "cloze_kd"}
CLOCK = ("tokens_per_second", "loader_wait")
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3}
STUDENT = {"random": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0}}
STILL = {"random": {**STUDENT["random"], "attention_probs_dropout_prob": 0.0}}


@pytest.fixture(scope="module")
def folder_of(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> a folder with ``store`` and its ``teacher``: labelled rows with phrases, masked ones for words, or clozes."""
    features, folder = ["hidden.*@all", "attention_scores.*", "value.*"], tmp_path_factory.mktemp("online")
    stores.write_store(
        folder / "labelled",
        "classification",
        [*features, "query.*", "key.*", "task_logits@row"],
        phrases={"words": 2},
        domain={"column": "question", "classes": [str(number) for number in range(14)]},
    )
    stores.write_store(folder / "masked", "masked_lm", [*features, "lm_logits@all"], objective="mlm", mask_probability=0.4)
    stores.write_clozes(folder / "clozes")
    return lambda method: folder / ("clozes" if method in CLOZES else "masked" if method in WORDS else "labelled")


def recipe(
    folder: Path, output: Path, method: str, options: dict[str, Any], *, online: bool, live: dict[str, Any] | None = None, **changes: object
) -> TrainRecipe:
    """One method of 20 rows a step, its features from the store of ``folder`` or from the teacher beside it."""
    several = METHODS[method].several
    head = "masked_lm" if folder.name in ("masked", "clozes") else "classification"
    live = {"model": str(folder / "teacher"), "head": head, **(live or {})}
    answers = {"teachers": {"small": "tiny", "large": "tiny"}} if several else {"pass_name": "tiny"}
    data = {"store": str(folder / "store"), **({} if online else answers)}
    phase = {
        "name": "only", "student": STUDENT, "methods": [{"name": method, "options": options}], "data": [data],
        "evaluate": [{**data, "split": "dev"}], "metrics": ["teacher_kl" if head == "masked_lm" else "task_kl"], "steps": 4,
        "batch_rows": 20,
        "trainer": QUIET, **changes,
    }  # fmt: skip
    if online:
        phase["teacher"] = {"online": {"small": live, "large": live} if several else live}
    phases = [phase]
    if METHODS[method].reads_meta:
        phase["meta"] = {**data, "split": "dev"}
    if options.get("stage") == "distil":
        fitted = {
            **phase,
            "name": "fitted",
            "methods": [{"name": method, "options": {"stage": "classifiers"}}],
            "metrics": [],
            "evaluate": [],
        }
        phase["methods"], phases = [{"name": method, "options": options, "carry": "fitted"}], [fitted, phase]
    return parse(TrainRecipe, {"output": str(output), "phases": phases}, "recipe")


def curve(made: TrainRecipe) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if key not in CLOCK} for entry in read_journal(made.output / "only" / "metrics.jsonl")
    ]


def result(made: TrainRecipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.output / "only" / "result.json").read_text())
    return found


@pytest.mark.parametrize(("method", "options"), RUNS, ids=NAMES)
def test_a_method_learns_online_what_it_learns_from_a_store(
    method: str, options: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = {online: recipe(folder_of(method), tmp_path / str(online), method, options, online=online) for online in (False, True)}
    for one in made.values():
        run(one, ["test"])
    assert curve(made[True]) == curve(made[False])
    stored, live = result(made[False]), result(made[True])
    for name in ("start", "student", "before", "after"):
        assert live[name] == stored[name], name
    assert stored["before"] != stored["after"]


def test_a_student_may_start_from_blocks_of_its_live_teacher_and_its_card_names_it(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("kd")
    made = recipe(
        folder, tmp_path / "out", "kd", {}, online=True, student={"layers": [2, 4]}, steps=1, trainer={**QUIET, "learning_rate": 0.0}
    )
    run(made, ["test"])
    student = AutoModelForSequenceClassification.from_pretrained(student_folder(made, "only"))
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    for block, source in ((0, 1), (1, 3)):
        weights = [model.bert.encoder.layer[number].output.dense.weight for model, number in ((student, block), (teacher, source))]
        assert torch.equal(*weights)
    card = (student_folder(made, "only") / "README.md").read_text()
    assert f"at work in the job: `{folder / 'teacher'}`, bert with 4 blocks" in card


def test_what_does_not_fit_a_live_teacher_is_refused(stores: ModuleType, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("kd")
    with pytest.raises(ValueError, match="its teacher is online, and its data rows alone: leave out pass_name"):
        recipe(folder, tmp_path, "kd", {}, online=True, evaluate=[{"store": str(folder / "store"), "pass_name": "tiny"}])
    for sharding, message in (
        ({"kind": "fsdp", "size": 2}, "size 2 needs a launch of as many processes: torchrun"),
        ({"kind": "auto"}, "expected kind none, zero3, fsdp or tp, found auto"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe(folder, tmp_path / "a", "kd", {}, online=True, live={"sharding": sharding}), ["test"])
    with pytest.raises(ValueError, match="expected a Hugging Face model folder, found nothing"):
        run(recipe(folder, tmp_path / "b", "kd", {}, online=True, live={"model": str(tmp_path / "gone")}), ["test"])
    other = stores.write_teacher(tmp_path / "other", "classification")
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"] = {("movie" if word == "film" else word): number for word, number in tokens["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    start = {"random": {}, "source": str(folder / "teacher")}
    with pytest.raises(FingerprintMismatch, match="built with another tokenizer than that of the teacher"):
        run(recipe(folder, tmp_path / "c", "kd", {}, online=True, live={"model": str(other)}, student=start), ["test"])
    assert not (tmp_path / "c").exists()


SHARDED: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"}, "fsdp": {"kind": "fsdp", "size": 2}, "tp": {"kind": "tp", "size": 2}, "zero3": {"kind": "zero3", "size": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", SHARDED)
def test_two_ranks_with_a_sharded_teacher_train_as_one(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("tinybert")
    options: dict[str, Any] = {"layers": [[1, 2], [2, 4]]}
    made = recipe(folder, tmp_path / "one", "tinybert", options, online=True, student=STILL)
    run(made, ["test"])
    spread = recipe(folder, tmp_path / "two", "tinybert", options, online=True, student=STILL, live={"sharding": SHARDED[kind]})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(spread))
    done = launched("-m", "student_train.cli", "run", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    for entry, expected in zip(curve(spread), curve(made), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), entry["step"]
    assert result(spread)["after"] == pytest.approx(result(made)["after"], rel=1e-4)
