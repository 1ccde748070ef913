"""A probe in a run: when it looks, what it leaves, and that the student is none the wiser."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from two_ranks import launched

from online.teacher import Teachers
from store.errors import MissingFeature
from store.reader import Store
from store.strict import parse
from student_train.bundle import Bundle
from student_train.curves import curves
from student_train.distances import comparisons
from student_train.evaluate import HeldOut, held_out_rows
from student_train.journal import read_journal
from student_train.needs import needs
from student_train.probe import measured
from student_train.probe_table import probe_table
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import check
from student_train.teacher import StoredTeacher

KD = MethodSpec(name="kd")
HID = MethodSpec(name="hid_seq", weight=0.5, options={"layers": [[1, 2]]})
PROBE: dict[str, Any] = {"every": 5, "rows": 40, "distances": ["hidden_relation", "soft"], "layers": [[1, 2]], "temperatures": [1, 10]}
NAMES = {"hidden_relation.1-2", "soft.T1", "soft.T10"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def score(bundle: Bundle) -> dict[str, float]:
    return {"width": float(bundle.loaded.shape.width)}


def distances(folder: Path) -> list[dict[str, float]]:
    return read_journal(folder / "probe.jsonl")


def test_a_probed_run_ends_in_the_same_student_to_the_bit(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    options = {"methods": [KD, HID], "turns": True, "accumulation": 2, "workers": 1, "trainer": {"max_grad_norm": 0.5}}
    plain, without = tiny.run([taught], tmp_path / "a", **options)
    probed, looked = tiny.run([taught], tmp_path / "b", **options, probe={**PROBE, "every": 1})
    assert [entry["step"] for entry in distances(tmp_path / "b")] == list(range(13))
    assert [entry["loss"] for entry in looked.history] == [entry["loss"] for entry in without.history]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(probed.state_dict()[name], tensor), name
    assert not (tmp_path / "a" / "probe.parquet").exists()


def test_it_looks_before_and_after_at_evaluations_and_every_so_many_steps(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    tiny.run(
        [taught], tmp_path, methods=[KD, HID], steps=11, evaluate=score, probe=PROBE,
        trainer={"logging_steps": 100, "save_steps": 100, "eval_steps": 4},
    )  # fmt: skip
    assert [entry["step"] for entry in distances(tmp_path)] == [0, 4, 5, 8, 10, 11]
    assert all(entry.keys() == NAMES | {"step"} for entry in distances(tmp_path))
    table = parquet.read_table(tmp_path / "probe.parquet")
    assert [(field.name, field.type) for field in table.schema] == [
        ("step", pa.int64()), ("kind", pa.string()), ("name", pa.string()), ("distance", pa.string()), ("student_layer", pa.int64()),
        ("teacher_layer", pa.int64()), ("temperature", pa.float64()), ("value", pa.float64()),
    ]  # fmt: skip
    rows = table.to_pylist()
    first = {row["name"]: row for row in rows if row["step"] == 0}
    assert first.keys() == NAMES
    assert first["hidden_relation.1-2"] == {
        "step": 0, "kind": "distance", "name": "hidden_relation.1-2", "distance": "hidden_relation", "student_layer": 1, "teacher_layer": 2,
        "temperature": None, "value": distances(tmp_path)[0]["hidden_relation.1-2"],
    }  # fmt: skip
    assert (first["soft.T10"]["distance"], first["soft.T10"]["temperature"], first["soft.T10"]["student_layer"]) == ("soft", 10.0, None)
    logged = {(row["step"], row["name"]): row["value"] for row in curves(tmp_path).to_pylist()}
    losses = {row["step"]: row["value"] for row in rows if row["kind"] == "loss"}
    assert losses == {step: logged[step, "loss"] for step in (4, 5, 8, 10, 11)}
    scores = {row["step"]: (row["name"], row["value"]) for row in rows if row["kind"] == "score"}
    assert scores == dict.fromkeys((4, 8, 11), ("eval_width", 16.0))
    assert len(rows) == 6 * 3 + 5 + 3


def test_a_run_that_goes_on_neither_repeats_nor_lacks_a_look(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": [KD, HID], "probe": {**PROBE, "every": 3}, "trainer": {"eval_steps": 5}}
    _, whole = tiny.run([taught], tmp_path / "whole", evaluate=score, **options)

    def failing(bundle: Bundle) -> dict[str, float]:
        if len(distances(tmp_path / "cut")) > 3:  # at step 5, behind the checkpoint of step 4
            raise ValueError("cut off")
        return score(bundle)

    with pytest.raises(ValueError, match="cut off"):
        tiny.run([taught], tmp_path / "cut", evaluate=failing, **{**options, "probe": {**options["probe"], "every": 2}})
    assert [entry["step"] for entry in distances(tmp_path / "cut")] == [0, 2, 4, 5]
    assert probe_table(tmp_path / "cut").equals(parquet.read_table(tmp_path / "cut" / "probe.parquet"))
    _, resumed = tiny.run([taught], tmp_path / "cut", evaluate=score, **options)
    assert resumed.resumed == 4
    assert resumed.history[-1]["step"] == whole.history[-1]["step"] == 12
    of_whole = {entry["step"]: entry for entry in distances(tmp_path / "whole")}
    assert list(of_whole) == [0, 3, 5, 6, 9, 10, 12]
    # what the first process saw up to its checkpoint stays, though it looked at other steps
    assert [entry["step"] for entry in distances(tmp_path / "cut")] == [0, 2, 4, 5, 6, 9, 10, 12]
    for entry in distances(tmp_path / "cut"):
        if entry["step"] not in (2, 4):
            assert entry == of_whole[entry["step"]]
    again, _ = tiny.run([taught], tmp_path / "cut", evaluate=score, **options)  # nothing left to do
    assert not again.training
    assert [entry["step"] for entry in distances(tmp_path / "cut")] == [0, 2, 4, 5, 6, 9, 10, 12]


def test_its_time_is_no_part_of_the_speed(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, looked = tiny.run([taught], tmp_path, methods=[KD], steps=4, probe={**PROBE, "every": 1})
    assert all(entry["tokens_per_second"] > 0 and 0 < entry["loader_wait"] < 1 for entry in looked.history)


@pytest.mark.slow
def test_two_ranks_look_as_one_also_where_each_has_part_of_the_student(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "bank": False, "batch_rows": 8, "steps": 4, "probe": {**PROBE, "every": 2}}
    run = {"stores": [str(taught)], "methods": [KD.model_dump(), HID.model_dump()], **options}
    two = [{**run, "output": str(tmp_path / "DDP")}, {**run, "output": str(tmp_path / "zero"), "zero": {"stage": 3}}]
    done = launched(str(tiny.__file__), json.dumps(two), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    tiny.run([taught], tmp_path / "one", methods=[KD, HID], **options)
    for name in ("DDP", "zero"):
        for found, expected in zip(distances(tmp_path / name), distances(tmp_path / "one"), strict=True):
            assert found == pytest.approx(expected, abs=1e-6), name


def recipe(store: Path, output: Path, probe: dict[str, Any] | None, **changes: object) -> TrainRecipe:
    data = {"store": str(store), "pass_name": "tiny"}
    phase = {
        "name": "p", "student": {"layers": [2, 4]}, "data": [data], "methods": [{"name": "kd"}], "steps": 4, "batch_rows": 8,
        "evaluate": [{**data, "split": "dev"}], "trainer": {"use_cpu": True, "disable_tqdm": True}, "probe": probe, **changes,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def test_a_dump_must_hold_what_a_probe_compares(sentiment: Path, tmp_path: Path) -> None:
    one = recipe(sentiment, tmp_path / "out", {"distances": ["hidden", "query_relation", "embedding"]})
    (document,) = yaml.safe_load_all(needs([one]))
    assert document["features"] == ["hidden.0@all", "hidden.2@all", "hidden.4@all", "query.2@all", "query.4@all", "task_logits@row"]
    with pytest.raises(MissingFeature, match=r"hidden\.0@all, query\.2@all.*neither stored nor to be derived(.|\n)*- hidden\.0@all"):
        check(one, one.phases)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("probe", "changes", "message"),
    [
        ({"distances": ["hiden"]}, {}, r"phase 'p': probe: unknown distance 'hiden'; did you mean 'hidden'"),
        ({"distances": ["words"]}, {}, r"probe: words: lm_logits needs a student with a head"),
        ({"layers": [[1, 5]]}, {}, r"probe: layers: the teacher has blocks 1 to 4, found 5"),
        ({"distances": ["hidden"]}, {"student": {"random": {"hidden_size": 8}}}, r"probe: hidden: expected equal widths .* found 8 and 16"),
        ({"data": {"split": "test"}}, {}, r"has no split 'test'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    sentiment: Path, tmp_path: Path, probe: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    if "data" in probe:
        probe = {"data": {"store": str(sentiment), "pass_name": "tiny", **probe["data"]}}
    one = recipe(sentiment, tmp_path / "out", probe, **changes)
    with pytest.raises(ValueError, match=message):
        check(one, one.phases)


def test_a_probe_without_a_teacher_is_refused(sentiment: Path, tmp_path: Path) -> None:
    rows, student = {"store": str(sentiment)}, {"layers": [2, 4], "source": str(Store.open(sentiment).shipped("tiny"))}
    methods, evaluate = [{"name": "task_loss"}], [{**rows, "split": "dev"}]
    one = recipe(sentiment, tmp_path / "out", {}, student=student, data=[rows], evaluate=evaluate, teacher="none", methods=methods)
    with pytest.raises(ValueError, match=r"probe: it compares the student with a teacher: give probe.data, or the data of .*, a pass_name"):
        check(one, one.phases)


@pytest.mark.slow
def test_a_run_of_the_program_leaves_a_table_that_joins_with_its_curves(
    program: Callable[..., tuple[int, str, str]], sentiment: Path, tmp_path: Path
) -> None:
    one = recipe(
        sentiment, tmp_path / "out", {"rows": 9, "distances": ["hidden", "hidden_relation", "soft"]}, teacher="none",
        methods=[{"name": "task_loss"}], metrics=["accuracy"],
    )  # fmt: skip
    file = tmp_path / "train.yaml"
    file.write_text(json.dumps(one.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    code, _, error = program("run", file)
    assert code == 0, error
    rows = parquet.read_table(tmp_path / "out" / "p" / "probe.parquet").to_pylist()
    assert {row["step"] for row in rows} == {0, 1, 2, 3, 4}
    names = {row["name"] for row in rows if row["kind"] == "distance"}
    assert names == {"hidden.1-2", "hidden.2-4", "hidden_relation.1-2", "hidden_relation.2-4", *(f"soft.T{t}" for t in (1, 5, 10, 15, 20))}
    before = [row["value"] for row in rows if row["step"] == 0 and row["kind"] == "distance"]
    after = [row["value"] for row in rows if row["step"] == 4 and row["kind"] == "distance"]
    assert all(0 <= value < float("inf") for value in before + after)
    assert before != after
    curve = parquet.read_table(tmp_path / "out" / "p" / "metrics.parquet").to_pylist()
    logged = {(row["step"], row["name"]): row["value"] for row in curve}
    assert all(logged[row["step"], row["name"]] == row["value"] for row in rows if row["kind"] != "distance")
    assert {row["name"] for row in rows if row["kind"] == "score"} >= {"eval_accuracy", "eval_loss"}


def test_of_several_teachers_the_last_one_is_compared(tiny: ModuleType, taught: Path) -> None:
    student, store = tiny.model(1, layers=2, width=16), Store.open(taught)
    teacher = store.manifest.passes["bert"].shape
    compared = comparisons(("hidden_relation", "soft"), [(1, 2)], (1.0,), student.shape, teacher, labelled=False)
    keys = frozenset(one.teacher_key for one in compared)
    rows = held_out_rows(store, "train", 20)
    last = StoredTeacher(store, "bert", keys)
    both = Teachers({"small": StoredTeacher(store, "bert", frozenset()), "large": last})
    bundle = Bundle(student, [])
    found = measured(bundle, HeldOut(store, rows, both, False, "", "large"), compared)
    assert found == measured(bundle, HeldOut(store, rows, last, False, ""), compared)
    assert found.keys() == {"hidden_relation.1-2", "soft.T1"}


@pytest.mark.slow
def test_a_teacher_at_work_is_as_far_away_as_its_store(
    program: Callable[..., tuple[int, str, str]], sentiment: Path, tmp_path: Path
) -> None:
    probe = {"distances": ["hidden", "hidden_relation", "soft"]}
    folder = sentiment.parent / "renamed away"
    rows = {"store": str(sentiment)}
    online = {
        "teacher": {"online": {"model": str(folder), "head": "classification"}}, "data": [rows], "evaluate": [{**rows, "split": "dev"}],
    }  # fmt: skip
    for name, changes in (("stored", {}), ("live", online)):
        one = recipe(sentiment, tmp_path / name, probe, **changes)
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(one.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        code, _, error = program("run", file)
        assert code == 0, error
    live, stored = (distances(tmp_path / name / "p") for name in ("live", "stored"))
    assert live[0] == stored[0]
    assert [entry["step"] for entry in live] == [0, 1, 2, 3, 4]
    for entry, expected in zip(live, stored, strict=True):  # batches of 8 rows round differently (docs/design.md)
        assert entry == pytest.approx(expected, rel=1e-4)
