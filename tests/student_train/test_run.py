"""Whole runs: from a store to exported students, what is skipped, refused and gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from online.collate import collate
from online.models import ModelSpec, forward, load_model
from store.errors import MissingFeature
from store.reader import Store
from store.strict import parse
from student_train.output import locked, recipe_yaml, student_folder
from student_train.recipe import TrainRecipe
from student_train.run import PhaseError, run, smoke

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1}


def recipe(output: Path, *phases: dict[str, object], store: Path, **changes: object) -> TrainRecipe:
    """Phases with short runs over ``store``."""
    data = {"store": str(store), "pass_name": "tiny"}
    common = {
        "student": {"layers": [2, 4]}, "data": [data], "evaluate": [{**data, "split": "dev"}], "steps": 3, "batch_rows": 8,
        "trainer": QUIET,
    }  # fmt: skip
    named = [{"name": f"phase{number}", **common, **phase} for number, phase in enumerate(phases, 1)]
    return parse(TrainRecipe, {"output": str(output), "phases": named, **changes}, "recipe")


def result(made: TrainRecipe, phase: str = "phase1") -> dict[str, dict[str, float]]:
    return json.loads((made.output / phase / "result.json").read_text())


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


KD = {"methods": [{"name": "kd"}, {"name": "hid_seq"}], "metrics": ["accuracy", "agreement", "task_kl"]}


def test_a_student_is_trained_measured_and_exported_without_the_teachers_folder(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", {**KD, "steps": 12, "trainer": {**QUIET, "learning_rate": 3e-3}}, store=sentiment)
    run(made, ["student-train", "run", "it"])
    found = result(made)
    assert found["after"].keys() == {"accuracy", "agreement", "task_kl", "loss", "kd/soft", "kd/hard", "hid_seq/hidden"}
    assert found["after"]["hid_seq/hidden"] < found["before"]["hid_seq/hidden"]
    folder = student_folder(made, "phase1")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    store = Store.open(sentiment)
    rows = store.rows.select("dev")
    batch = collate(store, rows)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.mask, token_type_ids=batch.segments).logits
    accuracy = (logits.argmax(1).numpy() == store.rows.label[rows]).mean()
    assert found["after"]["accuracy"] == pytest.approx(accuracy)
    assert "student-train run it" in (folder / "README.md").read_text()


def test_what_is_finished_is_skipped_and_what_was_begun_goes_on(sentiment: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe(tmp_path / "out", {**KD, "steps": 2, "trainer": {**QUIET, "save_steps": 1}}, store=sentiment)
    run(made, ["first"])
    before = files(tmp_path / "out")
    weights = (student_folder(made, "phase1") / "model.safetensors").read_bytes()
    with caplog.at_level("INFO", "student_train"):
        run(made, ["second"])
    assert files(tmp_path / "out") == before
    assert "phase 'phase1' is finished" in caplog.text

    (tmp_path / "out" / "phase1" / "result.json").unlink()  # as if killed after the last checkpoint
    shutil.rmtree(student_folder(made, "phase1"))
    run(made, ["third"])
    assert (student_folder(made, "phase1") / "model.safetensors").read_bytes() == weights

    with pytest.raises(ValueError, match=r"was begun with other options \(seed, steps\)"):
        run(made.model_copy(update={"seed": 1, "phases": (made.phases[0].model_copy(update={"steps": 9}),)}), ["fourth"])
    watched = made.phases[0].model_copy(update={"workers": 1, "metrics": ("accuracy",)})
    run(made.model_copy(update={"phases": (watched,)}), ["fifth"])


def test_a_phase_that_failed_before_its_first_checkpoint_starts_over_with_other_options(sentiment: Path, tmp_path: Path) -> None:
    wild = {**QUIET, "learning_rate": 1e30, "max_grad_norm": 0}
    with pytest.raises(ValueError, match=r"loss term .* is nan"):
        run(recipe(tmp_path / "out", {**KD, "trainer": wild}, store=sentiment), ["first"])
    made = recipe(tmp_path / "out", {**KD, "student": {"layers": [4, 2]}}, store=sentiment)
    run(made, ["second"])
    again = recipe(tmp_path / "again", {**KD, "student": {"layers": [4, 2]}}, store=sentiment)
    run(again, ["as if there had been no first"])
    assert result(made)["before"] == result(again)["before"]
    assert result(made)["after"] == result(again)["after"]


@pytest.mark.slow
def test_phases_run_in_processes_of_their_own_and_follow_each_other(
    sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    first = {"methods": [{"name": "hid_cls"}], "steps": 1}
    second = {"student": {"phase": "phase1"}, "methods": [{"name": "kd"}], "metrics": ["accuracy"], "steps": 2}
    diverging = recipe(tmp_path / "out", first, {**second, "trainer": {**QUIET, "learning_rate": 1e30}}, store=sentiment)
    with pytest.raises(PhaseError, match="phase 'phase2' ended with exit code 2") as caught:
        run(diverging, ["it"])
    assert caught.value.code == 2
    assert "error: step 2: the loss term kd/" in capfd.readouterr().err

    made = recipe(tmp_path / "out", first, second, store=sentiment)
    run(made, ["it"])
    one, two = (load_model(ModelSpec(model=student_folder(made, name), head="classification")) for name in ("phase1", "phase2"))
    assert one.fingerprint == result(made)["student"]
    assert two.fingerprint == result(made, "phase2")["student"]
    assert one.fingerprint != two.fingerprint

    shutil.rmtree(made.output / "phase1")  # phase 2 was made from it
    with pytest.raises(ValueError, match=r"phase 'phase2' .* was begun with other options \(earlier student\)"):
        run(made, ["it"])


@pytest.mark.slow
def test_two_ranks_train_a_phase_together(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", {**KD, "trainer": {"report_to": "none", "disable_tqdm": True, "logging_steps": 1}}, store=sentiment)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(made))
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "student_train.cli",
        "run",
        str(file),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(ranks, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'kd/soft'") == 3, "rank 0 alone speaks"
    assert sorted(path.name for path in (made.output / "phase1" / "checkpoints" / "checkpoint-3").glob("rng_state*")) == [
        "rng_state_0.pth", "rng_state_1.pth",
    ]  # fmt: skip
    assert result(made)["after"]["loss"] < result(made)["before"]["loss"]


def test_all_phases_are_checked_before_the_first_trains(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", KD, {"methods": [{"name": "hid_seq", "options": {"layers": [[1, 1], [2, 3]]}}]}, store=sentiment)
    with pytest.raises(MissingFeature) as caught:
        run(made, ["it"])
    assert all(f"  - {key}\n" in str(caught.value) for key in ("hidden.1@all", "hidden.3@all", "hidden.4@all", "task_logits@row"))
    assert not (tmp_path / "out").exists()


def test_a_phase_without_a_teacher_opens_no_features(sentiment: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(sentiment, bare)
    shutil.rmtree(bare / "tiny")
    alone = {"teacher": "none", "methods": [{"name": "task_loss"}], "metrics": ["accuracy", "matthews"], "steps": 1}
    made = recipe(tmp_path / "out", alone, store=bare)
    run(made, ["it"])
    assert result(made)["after"].keys() == {"accuracy", "matthews", "loss", "task_loss/hard"}


def test_the_same_seed_gives_the_same_student(sentiment: Path, tmp_path: Path) -> None:
    projected = {"student": {"random": {"num_hidden_layers": 2, "hidden_size": 8}}, "methods": [{"name": "hid_seq"}], "steps": 2}
    found = []
    for number, seed in enumerate((3, 3, 4)):
        made = recipe(tmp_path / str(number), projected, store=sentiment, seed=seed)
        run(made, ["it"])
        found.append(result(made)["student"])
    assert found[0] == found[1] != found[2]


def test_masked_words_are_learned_and_compared_with_the_teacher(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words.parent, tmp_path / "with")
    (tmp_path / "with" / "teacher").rename(tmp_path / "with" / "gone")
    phase = {
        "methods": [{"name": "lm_kd", "options": {"positions": "labels"}}, {"name": "lm_loss"}],
        "metrics": ["perplexity", "teacher_kl", "similarity_spearman"],
        "student": {"layers": [2, 4, 4]},
        "evaluate_rows": 10,
    }
    made = recipe(tmp_path / "out", phase, store=tmp_path / "with" / "store")
    run(made, ["it"])
    scores, before = result(made)["after"], result(made)["before"]
    assert 1 < scores["perplexity"] != before["perplexity"]
    assert scores["teacher_kl"] > 0
    assert -1 <= scores["similarity_spearman"] <= 1
    assert AutoModelForMaskedLM.from_pretrained(student_folder(made, "phase1")).config.num_hidden_layers == 3


def test_a_student_that_is_its_teacher_agrees_with_it(words: Path, tmp_path: Path) -> None:
    same = {"model": {"model": str(words.parent / "teacher"), "head": "masked_lm"}}
    phase = {
        "student": same,
        "teacher": "none",
        "methods": [{"name": "lm_loss"}],
        "metrics": ["teacher_kl", "similarity_spearman"],
        "steps": 1,
    }
    made = recipe(tmp_path / "out", phase, store=words)
    run(made, ["it"])
    before = result(made)["before"]
    assert before["teacher_kl"] == pytest.approx(0, abs=1e-5)
    assert before["similarity_spearman"] == pytest.approx(1, abs=1e-4)


def test_perplexity_is_that_of_transformers_own_loss(words: Path, tmp_path: Path) -> None:
    same = {"model": {"model": str(words.parent / "teacher"), "head": "masked_lm"}}
    phase = {"student": same, "teacher": "none", "methods": [{"name": "lm_loss"}], "metrics": ["perplexity"], "steps": 1}
    made = recipe(tmp_path / "out", phase, store=words)
    run(made, ["it"])
    store = Store.open(words)
    batch = collate(store, store.rows.select("dev", copy=0))
    loaded = load_model(ModelSpec.model_validate(same["model"]))
    with torch.no_grad():
        logits = forward(loaded, batch).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch.token_labels.flatten())
    assert result(made)["before"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert result(made)["before"]["lm_loss/nll" if "lm_loss/nll" in result(made)["before"] else "loss"] == pytest.approx(
        loss.item(), rel=1e-5
    )


def test_two_evaluated_splits_have_names(sentiment: Path, tmp_path: Path) -> None:
    data = {"store": str(sentiment), "pass_name": "tiny"}
    both = {**KD, "evaluate": [{**data, "split": "dev"}, {**data, "split": "train"}], "best": "-dev/task_kl", "steps": 2}
    made = recipe(tmp_path / "out", {**both, "trainer": {**QUIET, "eval_steps": 1}}, store=sentiment)
    run(made, ["it"])
    assert {"dev/accuracy", "train/accuracy", "dev/kd/soft", "train/loss"} <= result(made)["after"].keys()
    assert result(made)["best_step"] in (1, 2)


def test_smoke_tries_the_recipe_and_leaves_nothing(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", {**KD, "steps": 100000, "patience": 2, "best": "accuracy"}, store=sentiment)
    smoke(made, ["it"])
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_writes_a_phase(sentiment: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", KD, store=sentiment)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    with locked(tmp_path / "out" / "phase1"), pytest.raises(ValueError, match="another student-train is training"):
        run(made, ["it"])


def test_a_recipe_chooses_and_orders_its_rows(sentiment: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Store.open(sentiment).rows
    data = {"store": str(sentiment), "pass_name": "tiny"}
    where = {"length": {"max": 6}, "label": {"values": ["positive"]}, "source": ["train*"], "confidence": {"min": 0.01}}
    dev = {**data, "split": "dev"}
    phase = {
        "methods": [{"name": "kd"}], "metrics": ["accuracy"], "batch_rows": 4,
        "data": [{**data, "where": where, "shuffle": "block", "window": 1, "by_length": 2}],
        "evaluate": [{**dev, "where": {"label": {"values": [number]}}} for number in (0, 1)],
    }  # fmt: skip
    made = recipe(tmp_path / "out", phase, store=sentiment)
    assert parse(TrainRecipe, yaml.safe_load(recipe_yaml(made)), "again") == made
    with caplog.at_level("INFO", "student_train"):
        run(made, ["it"])
    kept = [row for row in rows.select("train") if rows.columns.length[row] <= 6 and rows.label[row] == 1]
    assert f"where leaves {len(kept)} rows of split train" in caplog.text
    parts = [result(made)["after"][f"store.dev.{number}/accuracy"] for number in (1, 2)]
    whole = recipe(tmp_path / "whole", {**phase, "evaluate": [dev]}, store=sentiment)
    run(whole, ["it"])
    sizes = [int((rows.label[rows.select("dev")] == number).sum()) for number in (0, 1)]
    assert np.average(parts, weights=sizes) == pytest.approx(result(whole)["after"]["accuracy"])
    (made.output / "phase1" / "result.json").unlink()
    other = recipe(tmp_path / "out", {**phase, "data": [{**data, "where": where}]}, store=sentiment)
    with pytest.raises(ValueError, match="data"):
        run(other, ["it"])


def test_groups_reach_the_metrics(stores: ModuleType, tmp_path: Path) -> None:
    store = stores.write_store(tmp_path / "questions", "classification", ["task_logits@row"], group="question")
    phase = {"methods": [{"name": "kd"}], "metrics": ["f1a", "exact_match", "accuracy"], "batch_rows": 6, "steps": 1}
    made = recipe(tmp_path / "out", phase, store=store)
    run(made, ["it"])
    scores = result(made)["after"]
    opened = Store.open(store)
    rows = opened.rows.select("dev")
    model = AutoModelForSequenceClassification.from_pretrained(student_folder(made, "phase1")).eval()
    batch = collate(opened, rows)
    with torch.no_grad():
        found = model(input_ids=batch.input_ids, attention_mask=batch.mask, token_type_ids=batch.segments).logits.argmax(1).numpy()
    true, groups = opened.rows.label[rows], opened.rows.columns.group[rows]
    assert scores["exact_match"] == pytest.approx(np.mean([(found == true)[groups == group].all() for group in set(groups)]))
    hits = ((found == 1) & (true == 1)).sum()
    assert scores["f1a"] == pytest.approx(2 * hits / ((found == 1).sum() + (true == 1).sum()))


def test_choices_are_learned_and_measured(stores: ModuleType, tmp_path: Path) -> None:
    features = ["task_logits@row"]
    store = stores.write_store(
        tmp_path / "choices", "multiple_choice", features, text=["{text}"], choices=["{text}", "{other}"], label={"column": "label"}
    )
    phase = {"methods": [{"name": "kd"}], "metrics": ["choice_accuracy"], "steps": 1}
    made = recipe(tmp_path / "out", phase, store=store)
    run(made, ["it"])
    assert 0 <= result(made)["after"]["choice_accuracy"] <= 1
    assert {"kd/soft", "kd/hard"} <= result(made)["after"].keys()


def test_labels_that_the_task_head_cannot_give_are_refused_before_anything_is_written(stores: ModuleType, tmp_path: Path) -> None:
    teacher = stores.write_teacher(tmp_path / "start", "token_classification", labels=2)
    labelled = {"column": "label", "score": True}
    scores = stores.write_store(tmp_path / "scores", "base", ["final@mean"], label=labelled)
    tags = tmp_path / "tags.jsonl"
    tags.write_text(json.dumps({"text": "the film", "tags": ["x", "z"]}) + "\n")
    words = {"sources": [{"files": [str(tags)]}], "label": {"column": "tags", "classes": ["x", "y", "z"], "tokens": True}}
    tagged = stores.write_store(tmp_path / "tagged", "base", ["final@mean"], **words)
    for head, store, said in (
        ("classification", scores, "the student has 2 outputs, the labels of .* are scores, which take one"),
        ("token_classification", tagged, "the student has 2 outputs, the labels of .* have 3 classes"),
        ("multiple_choice", scores, "of kind regression; a multiple_choice head takes rows built with choices"),
    ):
        start = {"model": {"model": str(teacher), "head": head, "new_head": True}}
        phase = {"teacher": "none", "student": start, "methods": [{"name": "task_loss"}], "evaluate": []}
        with pytest.raises(ValueError, match=said):
            run(recipe(tmp_path / "out", phase, store=store), ["it"])
    assert not (tmp_path / "out").exists()


def test_a_new_head_is_named_after_the_classes_of_its_rows(stores: ModuleType, sentiment: Path, tmp_path: Path) -> None:
    teacher = stores.write_teacher(tmp_path / "start", "masked_lm")
    start = {"model": {"model": str(teacher), "head": "classification", "new_head": True}}
    made = recipe(tmp_path / "out", {"teacher": "none", "student": start, "methods": [{"name": "task_loss"}]}, store=sentiment)
    run(made, ["it"])
    config = AutoModelForSequenceClassification.from_pretrained(student_folder(made, "phase1")).config
    assert config.id2label == {0: "negative", 1: "positive"}
    assert config.label2id == {"negative": 0, "positive": 1}


def test_rows_that_no_method_can_learn_from_are_refused_before_anything_is_written(sentiment: Path, tmp_path: Path) -> None:
    data = [{"store": str(sentiment), "pass_name": "tiny"}, {"store": str(sentiment)}]
    with pytest.raises(ValueError, match=r"phase 'phase1': no method can learn from .*store: its data has no pass_name"):
        run(recipe(tmp_path / "out", {"methods": [{"name": "hid_cls"}], "data": data}, store=sentiment), ["it"])
    assert not (tmp_path / "out").exists()
