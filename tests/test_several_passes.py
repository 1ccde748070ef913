"""Several passes of one teacher are read as one: bit for bit what a single pass gives."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "teacher_dump"))

from tiny_dump import WORDS, make_teacher

from online.batch import dense
from online.collate import collate
from online.models import LoadedModel, ModelSpec, load_model
from online.teacher import LiveTeacher
from store import FeatureKey, FingerprintMismatch, MissingFeature, Store
from store.strict import parse
from student_train.methods import parse_method
from student_train.needs import needs
from student_train.output import student_folder
from student_train.recipe import DataSpec, TrainRecipe
from student_train.run import run
from student_train.teacher import StoredTeacher
from teacher_dump.add import add
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

ALL = ["hidden.*@all", "attention_scores.*", "value.2@all", "task_logits"]
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the passes whole, part and part-2 of one teacher, and other of another."""
    folder, draw = tmp_path_factory.mktemp("several"), random.Random(3)
    words = [word for word in WORDS if not word.startswith("#")]
    lines = [{"text": " ".join(draw.choices(words, k=draw.randint(4, 24))), "label": draw.choice("ab")} for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_teacher(folder / "teacher", "classification", 1)
    make_teacher(folder / "another", "classification", 2)
    dump(recipe(folder, "whole", ALL), ["test"])
    dump(recipe(folder, "part", ["hidden.1@all", "query.2@all"]), ["test"])
    said = add(recipe(folder, "part", ALL), ["test"])
    assert "part-2 is for what is not in part: hidden.0@all, hidden.2@all, attention_scores.1@all" in said
    dump(recipe(folder, "query", ["query.2@all"]), ["test"])
    dump(recipe(folder, "key", ["key.2@all"]), ["test"])
    dump(recipe(folder, "other", ["value.2@all"], teacher="another"), ["test"])
    dump(recipe(folder, "half", ["hidden.2@all", "task_logits"], dtype="float16"), ["test"])
    return folder


def recipe(folder: Path, name: str, features: list[str], teacher: str = "teacher", **options: object) -> DumpRecipe:
    tree: dict[str, Any] = {
        "store": str(folder / "store"),
        "pass_name": name,
        "teacher": {"model": str(folder / teacher), "head": "classification"},
        "rows": {
            "sources": [{"files": str(folder / "text.jsonl")}],
            "label": {"column": "label", "classes": ["a", "b"]},
            "max_length": 32,
            "hold_out": 0.2,
            "slot_tokens": 256,
        },
        "features": features,
        "batch_tokens": 256,
        "device": "cpu",
        "ship_layers": "all",
        "logs": str(folder / "logs"),
        **options,
    }
    return parse(DumpRecipe, tree, "test")


def keys(*texts: str) -> frozenset[FeatureKey]:
    return frozenset(map(FeatureKey.parse, texts))


def rows_of(store: Store) -> np.ndarray:
    """Rows of one padded length."""
    return np.flatnonzero(store.rows.columns.length > 16)[:8]


@pytest.mark.parametrize(
    ("method", "options"),
    [("kd", {}), ("hid_seq", {}), ("att_kl", {}), ("minilm", {}), ("minilmv2", {"relation_heads": 4}), ("tinybert", {})],
)
def test_a_method_learns_from_two_passes_what_it_learns_from_one(folder: Path, method: str, options: dict[str, Any]) -> None:
    store = Store.open(folder / "store")
    loaded = load_model(ModelSpec(model=folder / "teacher", head="classification"))
    batch, found = collate(store, rows := rows_of(store)), []
    for source in ("whole", ("part", "part-2"), ("part-2", "part"), "live"):
        student = load_model(ModelSpec(model=folder / "another", head="classification"))
        built = parse_method(method, options, student.shape, loaded.shape)
        wanted = built.teacher_keys
        teacher = LiveTeacher(loaded, wanted) if source == "live" else StoredTeacher(store, source, wanted)
        features = teacher.features(batch, teacher.fetch(rows))
        found.append({key: dense(features, key) for key in wanted} | {"loss": losses(built, student, features, batch)})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            assert torch.equal(value, other[key]), key


def losses(built: Any, student: LoadedModel, features: Any, batch: Any) -> torch.Tensor:  # noqa: ANN401
    from online.capture import Capture
    from online.models import forward

    torch.manual_seed(0)
    with Capture(student, built.student_keys, grad=True) as capture:
        forward(student, batch)
    terms = built(capture.features(batch), features, batch)
    total = sum(terms.values())
    total.backward()
    gradients = [weight.grad.flatten() for weight in student.model.parameters() if weight.grad is not None]
    return torch.cat([total.detach().reshape(1), *gradients])


def test_what_no_pass_has_alone_follows_from_several(folder: Path) -> None:
    store, wanted = Store.open(folder / "store"), keys("attention_scores.2")
    (batch, rows) = collate(store, rows_of(store)), rows_of(store)
    for name in ("query", "key"):
        with pytest.raises(MissingFeature, match="pass_name: \\[NAME, NAME-2\\]"):
            StoredTeacher(store, name, wanted)
    both = StoredTeacher(store, ("query", "key"), wanted)
    assert both.passes == ("key", "query")
    whole = StoredTeacher(store, "whole", wanted)
    (key,) = wanted
    found, expected = (dense(one.features(batch, one.fetch(rows)), key) for one in (both, whole))
    scored = batch.mask[:, None, :, None].expand_as(found)
    assert torch.equal(found[scored], expected[scored])


def test_of_a_feature_that_passes_share_the_most_exact_one_is_read(folder: Path) -> None:
    store = Store.open(folder / "store")
    assert StoredTeacher(store, ("half", "part-2"), keys("hidden.2")).passes == ("part-2",)
    assert StoredTeacher(store, ("half", "part"), keys("hidden.2", "hidden.1")).passes == ("half", "part")


def test_passes_of_different_teachers_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="pass other is not of the teacher of pass part: its teacher is"):
        StoredTeacher(folder / "store", ("part", "other"), keys("hidden.1"))
    with pytest.raises(MissingFeature, match="has no pass 'prt'; it has half, key, other, part, part-2, query, whole"):
        StoredTeacher(folder / "store", ("part", "prt"), keys("hidden.1"))
    for wrong in ([], ["part", "part"]):
        with pytest.raises(ValueError, match="different passes of one teacher such as"):
            parse(DataSpec, {"store": "s", "pass_name": wrong}, "test")
    assert parse(DataSpec, {"store": "s", "pass_name": ["part"]}, "test").pass_name == "part"


def training(folder: Path, name: str, pass_name: object) -> TrainRecipe:
    data = {"store": str(folder / "store"), "pass_name": pass_name, "where": {"confidence": {"min": 0.0}}}
    phase = {
        "name": "p", "student": {"layers": [2]}, "data": [data], "evaluate": [{**data, "split": "dev"}], "steps": 3, "batch_rows": 8,
        "methods": [{"name": "kd"}, {"name": "hid_seq"}, {"name": "att_kl"}], "metrics": ["agreement"], "trainer": QUIET,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(folder / name), "phases": [phase]}, "recipe")


def test_a_run_on_two_passes_makes_the_student_that_a_run_on_one_makes(folder: Path) -> None:
    weights, results = [], []
    for name, pass_name in (("out-1", "whole"), ("out-2", ["part", "part-2"])):
        made = training(folder, name, pass_name)
        run(made, ["test"])
        weights.append((student_folder(made, "p") / "model.safetensors").read_bytes())
        results.append(json.loads((folder / name / "p" / "result.json").read_text())["after"])
    assert weights[0] == weights[1]
    assert results[0] == results[1]
    readme = (student_folder(made, "p") / "README.md").read_text()
    assert "passes `part`, `part-2` of" in readme
    with pytest.raises(FingerprintMismatch, match="phase 'p': pass other is not of the teacher of pass part"):
        run(training(folder, "out-3", ["part", "other"]), ["test"])
    (document,) = yaml.safe_load_all(needs([training(folder, "out-2", ["part", "part-2"])]))
    assert document["pass_name"] == "part"
    assert {"task_logits@row", "attention_scores.2@all"} <= set(document["features"])
