"""Starts in whole recipes: blocks and widths chosen by a pass, where blocks came from, and students that start students."""

import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from online.fingerprints import tokenizer_fingerprint
from online.models import ModelSpec, load_config, load_model
from store.errors import MissingFeature
from store.manifest import Task
from store.strict import parse
from student_train.blocks import Source
from student_train.blueprint import continued_blueprint, derived_blueprint, folder_blueprint
from student_train.init import build
from student_train.needs import needs
from student_train.outline import outline
from student_train.output import student_folder
from student_train.recipe import StudentSpec, TrainRecipe
from student_train.run import run
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True}
PRUNED = {
    "layers": {"keep": 2, "by": "importance"},
    "width": {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 12},
    "width_by": "importance",
}
NO_TASK = Task(kind="none")


def recipe(output: Path, store: Path, student: dict[str, Any], **changes: object) -> TrainRecipe:
    phase = {
        "name": "p", "student": student, "data": [{"store": str(store), "pass_name": "tiny"}], "methods": [{"name": "kd"}], "steps": 1,
        "batch_rows": 8, "trainer": QUIET, **changes,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def answered(folder: Path, lines: dict[str, Any], stores: ModuleType) -> None:
    """Dump the store that ``lines`` of `student-train needs` describe, of the teacher in ``folder``."""
    text, _ = stores.write_text(folder)
    rows = {"sources": [{"files": [str(text)]}], "max_length": 16, "label": {"column": "label", "classes": ["negative", "positive"]}}
    teacher = {"model": folder / "teacher", "head": "classification"}
    dump(DumpRecipe.model_validate({**lines, "teacher": teacher, "rows": rows, "device": "cpu"}), ("tests",))


def test_a_dump_of_what_is_needed_prunes_and_distils(tmp_path: Path, stores: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    teacher = stores.write_teacher(tmp_path / "teacher", "classification")
    model = load_model(ModelSpec(model=teacher, head="classification"))
    with torch.no_grad():
        for block in (0, 2):  # these two hardly turn what goes through them
            for name, weight in model.block(block + 1).named_parameters():
                weight.mul_(0 if "output.dense" in name else 1)
                if "LayerNorm" in name:
                    weight.fill_(1.0 if name.endswith("weight") else 0.0)
    model.model.save_pretrained(teacher)
    made = recipe(tmp_path / "out", tmp_path / "store", PRUNED)
    (lines,) = yaml.safe_load_all(needs([made], {"": teacher}))
    hidden = [f"hidden.{layer}@all" for layer in range(5)]
    wide = [f"{site}.{layer}@all" for site in ("input", "value") for layer in range(1, 5)]
    assert lines["features"] == sorted(["final@all", *hidden, *wide, "task_logits@row"])
    assert lines["ship_layers"] == [1, 2, 3, 4]
    answered(tmp_path, lines, stores)
    shutil.move(teacher, tmp_path / "away")
    assert yaml.safe_load(needs([made]))["features"] == lines["features"], "whatever the store holds by now"
    blueprint = outline(made, made.phases[0]).blueprint
    assert blueprint.origin == (2, 4)
    with caplog.at_level(logging.WARNING):
        run(made, ["it"])
    assert "blocks 2, 4 of the source were chosen by importance" in caplog.text
    assert "truncated width" in (student_folder(made, "p") / "README.md").read_text()
    config = load_config(student_folder(made, "p"))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size) == (2, 8, 1, 12)


def test_a_pass_without_hidden_states_is_refused_with_the_lines_that_mend_it(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", sentiment, PRUNED)
    assert outline(made, made.phases[0]).blueprint.origin is None
    with pytest.raises(MissingFeature) as caught:
        run(made, ["it"])
    for key in ("hidden.1@all", "input.1@all", "value.4@all", "task_logits@row"):
        assert f"  - {key}\n" in str(caught.value)
    assert not (tmp_path / "out").exists()
    following = made.model_copy(update={"phases": (made.phases[0].model_copy(update={"student": StudentSpec(phase="p"), "name": "q"}),)})
    with pytest.raises(MissingFeature, match="not in the store yet"):
        build(outline(made.model_copy(update={"phases": (*made.phases, *following.phases)}), following.phases[0]).blueprint, 0)


def test_a_width_alone_needs_all_blocks(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", sentiment, {"width": {"hidden_size": 8, "num_attention_heads": 1}})
    (lines,) = yaml.safe_load_all(needs([made]))
    assert lines["ship_layers"] == [1, 2, 3, 4]
    assert lines["features"] == ["task_logits@row"]
    with pytest.raises(ValueError, match="no weights of block 1, 3; dump pass tiny with 'ship_layers: \\[1, 2, 3, 4\\]'"):
        run(made, ["it"])


def test_importance_needs_a_pass(sentiment: Path, tmp_path: Path, stores: ModuleType) -> None:
    teacher = stores.write_teacher(tmp_path / "teacher", "classification")
    data = {"data": [{"store": str(sentiment)}], "teacher": "none", "methods": [{"name": "task_loss"}]}
    made = recipe(tmp_path / "out", sentiment, {"layers": {"keep": 2, "by": "importance"}, "source": str(teacher)}, **data)
    with pytest.raises(ValueError, match="importance is measured by the activations of a pass: give data with a pass_name"):
        run(made, ["it"])
    made = recipe(tmp_path / "out", sentiment, {"layers": {"keep": 5, "by": "importance"}})
    with pytest.raises(ValueError, match="the source has blocks 1 to 4, found keep: 5"):
        run(made, ["it"])


def test_where_blocks_came_from_is_known_through_phases(tmp_path: Path, stores: ModuleType) -> None:
    folder = stores.write_teacher(tmp_path / "teacher", "classification")
    source, config = Source(folder, "classification"), load_config(folder)

    def origin(**spec: object) -> tuple[int, ...] | None:
        first = derived_blueprint(StudentSpec.model_validate(spec), source, config, NO_TASK)
        second = continued_blueprint(StudentSpec(phase="first"), first, folder, NO_TASK)
        third = continued_blueprint(StudentSpec(phase="second", head="masked_lm"), second, folder, NO_TASK)
        assert first.origin == second.origin == third.origin
        return third.origin

    assert origin(layers=[4, 1, 1]) == (4, 1, 1)
    assert origin(layers="every 2") == (2, 4)
    assert origin(width={"intermediate_size": 8}) == (1, 2, 3, 4)
    assert origin(layers=[3], width={"intermediate_size": 8}) == (3,)
    assert origin(random={"num_hidden_layers": 2}) is None
    assert folder_blueprint(StudentSpec.model_validate({"model": {"model": folder, "head": "classification"}}), NO_TASK).origin is None


def test_the_fingerprint_is_that_of_the_first_weights(tmp_path: Path, stores: ModuleType) -> None:
    folder = stores.write_teacher(tmp_path / "teacher", "classification")
    source, config = Source(folder, "classification"), load_config(folder)
    first, again, other = (
        build(derived_blueprint(StudentSpec(layers=layers), source, config, NO_TASK), 0) for layers in ((1, 2), (1, 2), (2, 1))
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint == first.student.fingerprint
    with torch.no_grad():
        again.student.model.classifier.bias.add_(1)
    assert again.student.fingerprint != again.fingerprint, "it was not remembered when the student was made"


def test_an_exported_student_starts_another_with_its_tokenizer_and_head(sentiment: Path, tmp_path: Path) -> None:
    assistant = recipe(tmp_path / "assistant", sentiment, {"layers": [2, 4]}, steps=3)
    run(assistant, ["it"])
    folder = student_folder(assistant, "p")
    whole = recipe(tmp_path / "whole", sentiment, {"model": {"model": str(folder), "head": "classification"}})
    one = outline(whole, whole.phases[0])
    made, trained = build(one.blueprint, 0), load_model(one.blueprint.tokenizer)
    assert made.notices == ()
    assert made.fingerprint == trained.fingerprint
    assert made.student.tokenizer is not None
    assert trained.tokenizer is not None
    assert tokenizer_fingerprint(made.student.tokenizer) == tokenizer_fingerprint(trained.tokenizer)
    run(whole, ["it"])
    assert load_config(student_folder(whole, "p")).architectures == ["BertForSequenceClassification"]

    half = recipe(tmp_path / "half", sentiment, {"layers": [2], "source": str(folder)})
    student = build(outline(half, half.phases[0]).blueprint, 0).student
    assert torch.equal(student.model.classifier.weight, trained.model.classifier.weight)
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(student.model.state_dict()[name.format(0)], trained.model.state_dict()[name.format(1)])
