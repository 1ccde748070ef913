"""A phase with two teachers: what each method learns, from the store's own logits, and what is refused."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from online.collate import collate
from store.errors import MissingFeature
from store.features import FeatureKey
from store.reader import Store
from store.strict import parse
from student_train.needs import needs
from student_train.outline import outline
from student_train.output import student_folder
from student_train.recipe import DataSpec, TrainRecipe
from student_train.run import run
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 0.0}
STILL = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOGITS = FeatureKey("task_logits", positions="row")
KD = {"name": "kd", "teacher": "large", "options": {"alpha": 0.3, "temperature": 2.0}}
DGKD = {"name": "dgkd", "weight": 2.0, "options": {"alpha": 0.6, "temperature": 3.0, "survival": 1.0}}


@pytest.fixture(scope="module")
def store(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows to train on and 20 to measure on, answered by the passes two (2 blocks) and four (4 blocks)."""
    folder = tmp_path_factory.mktemp("teachers")
    train, dev = stores.write_text(folder)
    for name, layers in (("four", 4), ("two", 2)):
        model = stores.write_teacher(folder / name, "classification", layers=layers)
        tree = {
            "store": folder / "store",
            "pass_name": name,
            "teacher": {"model": model, "head": "classification"},
            "rows": {
                "sources": [{"files": [str(train)], "split": "train"}, {"files": [str(dev)], "split": "dev"}],
                "max_length": 16,
                "slot_tokens": 256,
                "label": {"column": "label", "classes": ["negative", "positive"]},
            },
            "features": ["task_logits@row", *(f"hidden.{block}@all" for block in range(1, layers + 1))],
            "ship_layers": list(range(1, layers + 1)),
            "device": "cpu",
        }
        dump(DumpRecipe.model_validate(tree), ("tests",))
        model.rename(folder / f"{name} is gone")
    return folder / "store"


def recipe(store: Path, output: Path, methods: list[dict[str, Any]], data: dict[str, Any] | None = None, **changes: object) -> TrainRecipe:
    read = {"store": str(store), **(data or {"teachers": {"small": "two", "large": "four"}})}
    phase = {
        "name": "only", "student": {"random": STILL}, "data": [read], "evaluate": [{**read, "split": "dev"}], "methods": methods,
        "metrics": ["agreement"], "steps": 1, "batch_rows": 40, "trainer": QUIET, **changes,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def logits_of(made: TrainRecipe, split: str) -> tuple[dict[str, Tensor], Tensor]:
    """Float64 logits of both passes and of the exported student, and the labels, of all rows of a split."""
    read = Store.open(made.phases[0].data[0].store)
    rows = read.rows.select(split)
    found = {name: torch.from_numpy(np.array(read.read(LOGITS.of(name), rows)[""])).double() for name in ("two", "four")}
    model, batch = AutoModelForSequenceClassification.from_pretrained(student_folder(made, "only")).eval(), collate(read, rows)
    with torch.no_grad():
        found["student"] = model(input_ids=batch.input_ids, attention_mask=batch.mask, token_type_ids=batch.segments).logits.double()
    return found, torch.from_numpy(read.rows.label[rows]).long()


def by_hand(logits: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """The means of the two methods' terms, times their weights."""

    def divergence(teacher: str, temperature: float) -> float:
        p, q = (torch.softmax(logits[name] / temperature, 1) for name in (teacher, "student"))
        return temperature**2 * float((p * (p / q).log()).sum(1).mean())

    hard = -float(torch.softmax(logits["student"], 1)[torch.arange(len(labels)), labels].log().mean())
    return {
        "kd/soft": 0.3 * divergence("four", 2),
        "kd/hard": 0.7 * hard,
        "dgkd/soft": 2 * 0.6 * (divergence("two", 3) + divergence("four", 3)),
        "dgkd/hard": 2 * 0.4 * hard,
    }


def test_losses_are_those_of_the_stores_logits_by_hand(store: Path, tmp_path: Path) -> None:
    made = recipe(store, tmp_path / "out", [KD, DGKD])
    run(made, ["it"])  # at rate 0, so that the student that is exported is the one that was measured and trained
    expected = by_hand(*logits_of(made, "dev"))
    measured = json.loads((tmp_path / "out" / "only" / "result.json").read_text())["after"]
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert measured["loss"] == pytest.approx(sum(expected.values()), rel=1e-4)
    logits, _ = logits_of(made, "dev")
    same = (logits["student"].argmax(1) == logits["four"].argmax(1)).double().mean()  # metrics compare with the last
    assert measured["agreement"] == pytest.approx(float(same))

    (journal,) = (tmp_path / "out" / "only").rglob("metrics.jsonl")
    trained = next(entry for entry in map(json.loads, journal.read_text().splitlines()) if "kd/soft" in entry)
    expected = by_hand(*logits_of(made, "train"))  # one step took all 40 rows
    assert {name: trained[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_student_of_blocks_starts_from_the_last_teacher(store: Path, tmp_path: Path) -> None:
    for last, others in (("four", "two"), ("two", "four")):
        data = {"teachers": {"one": others, "other": last}}
        made = recipe(store, tmp_path / "out", [DGKD], data, student={"layers": [1, 2]})
        assert outline(made, made.phases[0]).blueprint.source.folder == Store.open(store).shipped(last)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dgkd", "uncertainty", "tmkd", "mt_bert"])
def test_loader_processes_bring_every_teachers_answers(method: str, store: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 1):
        made = recipe(
            store, tmp_path / str(workers), [{"name": method}], student={"layers": [1, 3]}, batch_rows=8, steps=4, workers=workers,
            trainer={**QUIET, "learning_rate": 1e-3},
        )  # fmt: skip
        run(made, ["it"])
        found.append((student_folder(made, "only") / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_needs_names_the_features_of_each_pass(store: Path, tmp_path: Path) -> None:
    deep = {"name": "mt_bert", "options": {"layers": "last"}}
    lines = list(yaml.safe_load_all(needs([recipe(store, tmp_path / "out", [deep])])))
    assert {(one["pass_name"], *one["features"]) for one in lines} == {
        ("two", "hidden.2@all", "task_logits@row"),
        ("four", "hidden.4@all", "task_logits@row"),
    }
    alone = list(yaml.safe_load_all(needs([recipe(store, tmp_path / "out", [KD])])))
    assert [one["pass_name"] for one in alone] == ["four"]


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ({"name": "kd"}, None, "methods: kd learns from one teacher, and the data has small, large: name it with teacher"),
        ({"name": "kd", "teacher": "larg"}, None, "methods: kd: no teacher 'larg'; did you mean 'large'"),
        ({"name": "dgkd", "teacher": "large"}, None, "methods: dgkd: it learns from all teachers; leave teacher out"),
        ({"name": "task_loss", "teacher": "large"}, None, "methods: task_loss: it learns from no teacher; leave teacher out"),
        ({"name": "dgkd"}, {"pass_name": "four"}, "methods: dgkd learns from several teachers; expected data with teachers"),
        (KD, {"teachers": {"small": "tow", "large": "four"}}, "has no pass 'tow'; did you mean 'two'"),
    ],
)
def test_what_fits_no_teacher_is_refused(
    method: dict[str, Any], data: dict[str, Any] | None, message: str, store: Path, tmp_path: Path
) -> None:
    made = recipe(store, tmp_path / "out", [method], data)
    with pytest.raises((ValueError, MissingFeature), match=message):
        outline(made, made.phases[0])


def test_data_that_lacks_one_of_the_teachers_is_refused(store: Path, tmp_path: Path) -> None:
    named = ({"small": "two", "large": "four"}, {"large": "four"})
    phase = recipe(store, tmp_path / "out", [DGKD]).phases[0]
    phase = phase.model_copy(update={"data": tuple(DataSpec(store=store, teachers=teachers) for teachers in named)})
    with pytest.raises(ValueError, match="its data has teachers of different names or shapes; all data of a phase that has teachers"):
        outline(recipe(store, tmp_path / "out", [DGKD]), phase)


def test_one_teacher_or_several_are_given_not_both(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected pass_name .* or teachers .*, found both"):
        recipe(store, tmp_path / "out", [KD], data={"pass_name": "four", "teachers": {"small": "two"}})
