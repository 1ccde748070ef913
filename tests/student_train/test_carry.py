"""What methods learned goes on into later phases where the recipe says so, and gradients are measured as they are."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from online.batch import Batch
from store.features import FeatureKey
from store.strict import parse
from student_train import gradients
from student_train.journal import read_journal
from student_train.recipe import TrainRecipe
from student_train.run import run
from student_train.step import run as run_student

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1}
SEQ = {"name": "hid_seq", "options": {"layers": [[1, 2], [2, 4]]}}
NARROW = {"layers": [2, 4], "width": {"hidden_size": 8, "intermediate_size": 12}}


def recipe(store: Path, output: Path, *phases: dict[str, Any], **common: object) -> TrainRecipe:
    data = {"store": str(store), "pass_name": "tiny"}
    shared = {"student": NARROW, "data": [data], "evaluate": [{**data, "split": "dev"}], "steps": 3, "batch_rows": 8, "trainer": QUIET}
    named = [{"name": f"phase{number}", **shared, **common, **phase} for number, phase in enumerate(phases, 1)]
    return parse(TrainRecipe, {"output": str(output), "phases": named}, "recipe")


def follow(**changes: object) -> dict[str, Any]:
    return {"student": {"phase": "phase1"}, "methods": [{**SEQ, **changes}]}


def test_a_projection_that_is_carried_starts_as_the_earlier_phase_left_it(sentiment: Path, tmp_path: Path) -> None:
    still = {**QUIET, "learning_rate": 1e-30}
    made = recipe(
        sentiment,
        tmp_path / "out",
        {"methods": [SEQ], "trainer": {**QUIET, "learning_rate": 1e-2}},
        {**follow(carry="phase1"), "name": "carried", "trainer": still},
        {**follow(), "name": "fresh", "trainer": still},
    )
    for phase in made.phases:
        run(made, ["test"], phase.name)
    left, carried, fresh = (load_file(tmp_path / "out" / phase.name / "methods.safetensors") for phase in made.phases)
    assert left.keys() == carried.keys() == fresh.keys() == {"hid_seq.projection.weight", "hid_seq.projection.bias"}
    for name, weight in left.items():
        torch.testing.assert_close(carried[name], weight, rtol=0, atol=1e-6)
        assert (fresh[name] - weight).abs().max() > 1e-3
    results = {phase.name: json.loads((tmp_path / "out" / phase.name / "result.json").read_text()) for phase in made.phases}
    assert results["carried"]["carried"] == {"hid_seq": "phase1"}
    assert results["fresh"]["carried"] == {}
    assert results["fresh"]["dropped"] == ["hid_seq"]
    assert results["carried"]["before"]["hid_seq/hidden"] == pytest.approx(results["phase1"]["after"]["hid_seq/hidden"], rel=1e-5)
    assert "went on from phase phase1" in (tmp_path / "out" / "carried" / "student" / "README.md").read_text()
    assert results["carried"]["start"] == results["phase1"]["student"] != results["phase1"]["start"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (follow(carry="phase0"), "hid_seq carries from 'phase0', which is no earlier phase; did you mean 'phase1'"),
        ({**follow(), "methods": [{"name": "kd", "carry": "phase1"}]}, "kd carries from 'phase1', which has no method kd; it has hid_seq"),
        (
            {"student": {"layers": [2, 4]}, "methods": [{**SEQ, "carry": "phase1"}]},
            "but has no parameters to carry; leave carry out",
        ),
        (
            {"student": {**NARROW, "width": {"hidden_size": 4, "intermediate_size": 12}}, "methods": [{**SEQ, "carry": "phase1"}]},
            r"projection.weight: expected \[16, 4\], found \[16, 8\]",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused_before_anything_trains(
    second: dict[str, Any], message: str, sentiment: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(recipe(sentiment, tmp_path / "out", {"methods": [SEQ]}, second), ["test"])
    assert not (tmp_path / "out").exists()


def test_a_method_that_must_go_on_from_an_earlier_phase_says_so(sentiment: Path, tmp_path: Path) -> None:
    distil = {"methods": [{"name": "universal_kd", "options": {"stage": "distil"}}], "student": {"layers": [2, 4]}}
    with pytest.raises(ValueError, match="universal_kd goes on with what an earlier phase of it learned: name that phase with carry"):
        run(recipe(sentiment, tmp_path / "out", distil), ["test"])


def test_the_norms_of_gradients_are_logged_where_the_recipe_asks(sentiment: Path, tmp_path: Path) -> None:
    methods = [SEQ, {"name": "kd", "weight": 2.0, "options": {"alpha": 1.0}}]
    made = recipe(sentiment, tmp_path / "out", {"methods": methods, "steps": 4, "gradient_norms": 2})
    run(made, ["test"])
    logs = [entry for entry in read_journal(tmp_path / "out" / "phase1" / "metrics.jsonl") if "loss" in entry]
    parts = {"gradient/embeddings", "gradient/block.1", "gradient/block.2", "gradient/head"}
    terms = {"gradient/hid_seq/hidden", "gradient/kd/soft"}
    for entry in logs:  # steps 1 and 3 are the first and third to be taken
        found = {name for name in entry if name.startswith("gradient/")}
        assert found == ((parts | terms) if entry["step"] in (1, 3) else set())
        if found:
            assert all(entry[name] > 0 for name in found)
            whole = sum(entry[name] ** 2 for name in parts) ** 0.5
            assert whole <= sum(entry[name] for name in terms) * (1 + 1e-5)  # the triangle's inequality: terms add up to the gradient


def test_norms_of_parts_are_those_of_their_gradients(tiny: ModuleType) -> None:
    student = tiny.model(1, layers=2, width=16, dropout=0.0)
    ids = torch.arange(3, 11)[None]
    batch = Batch(torch.zeros(1).long(), ids, torch.ones(1, 8).bool(), None, None, None, None, None, torch.zeros(1).long())
    run_student(student, batch, [FeatureKey("hidden", 1)])[FeatureKey("hidden", 1)].square().sum().backward()
    found = gradients.norms(student)
    names = dict(student.model.named_parameters())
    for part, prefix in (("embeddings", "bert.embeddings."), ("block.1", "bert.encoder.layer.0."), ("block.2", "bert.encoder.layer.1.")):
        grads = [weight.grad.flatten() for name, weight in names.items() if name.startswith(prefix) and weight.grad is not None]
        assert found[part] == pytest.approx(float(torch.cat(grads).norm()) if grads else 0.0, rel=1e-5)
    assert found["head"] == 0.0
    assert set(gradients.parts(student)) == {"embeddings", "block.1", "block.2", "head"}


def test_held_out_rows_that_were_built_anew_make_a_phase_another_one(stores: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    held_out = {"store": str(tmp_path / "meta"), "split": "dev", "pass_name": "tiny"}
    stores.write_store(tmp_path / "first", "classification", ["task_logits@row"]).rename(tmp_path / "meta")
    made = recipe(sentiment, tmp_path / "out", {"methods": [{"name": "rw_kd"}], "student": {"layers": [2, 4]}, "meta": held_out})
    run(made, ["test"])
    run(made, ["again: nothing is left to do"])
    (tmp_path / "meta").rename(tmp_path / "away")
    stores.write_store(tmp_path / "second", "classification", ["task_logits@row"], max_length=8).rename(tmp_path / "meta")
    with pytest.raises(ValueError, match=r"was begun with other options \(rows\)"):
        run(made, ["test"])
