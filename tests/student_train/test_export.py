"""Exported students: what transformers loads from them, and what their model cards say."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from online.fingerprints import tokenizer_fingerprint
from online.models import HEADS, LoadedModel, ModelSpec, load_model
from store.manifest import Provenance
from store.shape import Head
from student_train.export import Lineage, export
from student_train.recipe import CardSpec, PhaseSpec

PHASE = PhaseSpec.model_validate(
    {
        "name": "kd",
        "student": {"layers": [1]},
        "data": [{"store": "bert-store", "pass_name": "bert"}],
        "methods": [{"name": "kd", "weight": 0.5, "options": {"temperature": 2.0}}, {"name": "hid_seq"}],
        "evaluate": [{"store": "bert-store", "split": "dev", "pass_name": "bert"}],
        "metrics": ["accuracy"],
        "steps": 3,
    }
)
LINEAGE = Lineage(
    phase=PHASE,
    seed=7,
    teachers=["pass `bert`: weights `0123`"],
    data=["trained on split `train`"],
    notices=["classifier starts from random weights"],
    made=Provenance(command=("student-train", "run", "kd.yaml"), versions={"torch": "2"}, created="2026-01-01T00:00:00+00:00"),
    card=CardSpec(license="apache-2.0", base_model="a/teacher", datasets=("sst2",)),
)


def student(stores: ModuleType, folder: Path, head: Head) -> LoadedModel:
    return load_model(ModelSpec.model_validate({"model": stores.write_teacher(folder, head), "head": head}))


@pytest.mark.parametrize("head", ["base", "masked_lm", "classification", "token_classification", "multiple_choice"])
def test_the_folder_loads_under_its_head_with_identical_logits(head: Head, stores: ModuleType, tmp_path: Path) -> None:
    loaded = student(stores, tmp_path / "model", head)
    export(loaded, LINEAGE, {}, {}, tmp_path / "student")
    again, report = HEADS[head].from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values()), "nothing missing, nothing beside the model: methods are not in it"
    ids = torch.arange(5, 17).reshape(2, 6)
    ids = ids[:, None] if head == "multiple_choice" else ids
    with torch.no_grad():
        assert torch.equal(loaded.model(ids)[0], again.eval()(ids)[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loaded.tokenizer)


def test_the_model_card_says_how_the_student_was_made(stores: ModuleType, tmp_path: Path) -> None:
    loaded = student(stores, tmp_path / "model", "classification")
    export(loaded, LINEAGE, {"accuracy": 0.5}, {"accuracy": 0.75, "kd/soft": 0.1}, tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    _, metadata, text = card.split("---\n", 2)
    front = yaml.safe_load(metadata)
    assert front["pipeline_tag"] == "text-classification"
    assert (front["license"], front["base_model"], front["datasets"]) == ("apache-2.0", "a/teacher", ["sst2"])
    assert front["metrics"] == ["accuracy"]
    assert "language" not in front
    for expected in (
        "# kd", "AutoModelForSequenceClassification", "weights `0123`", "trained on split `train`", "- kd, weight 0.5 (temperature: 2.0)",
        "| accuracy | 0.5000 | 0.7500 |", "| kd/soft |  | 0.1000 |", "classifier starts from random weights", "seed 7",
        "student-train run kd.yaml", "torch 2",
    ):  # fmt: skip
        assert expected in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert PhaseSpec.model_validate(recipe) == PHASE


def test_a_licence_that_nobody_gave_is_unknown_and_names_that_nobody_gave_are_left_out(stores: ModuleType, tmp_path: Path) -> None:
    loaded = student(stores, tmp_path / "model", "classification")
    export(loaded, replace(LINEAGE, card=CardSpec()), {}, {}, tmp_path / "student")
    front = yaml.safe_load((tmp_path / "student" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])
    assert front["license"] == "unknown"
    assert not front.keys() & {"base_model", "datasets", "language"}


def test_an_earlier_export_is_replaced_whole(stores: ModuleType, tmp_path: Path) -> None:
    loaded = student(stores, tmp_path / "model", "classification")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "old file").write_text("x")
    (tmp_path / ".student.writing").mkdir()  # as a killed export leaves it
    (tmp_path / ".student.writing" / "half").write_text("x")
    export(loaded, LINEAGE, {}, {}, tmp_path / "student")
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {file.name for file in (tmp_path / "student").iterdir()}
    assert not (tmp_path / "student" / "old file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "student"]
