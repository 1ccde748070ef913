"""What ``student-train evaluate`` and ``mean`` refuse, with one message; tasks are the recipes'; ReCoRD's scores and means by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from store.strict import load_yaml
from student_train.record import record_score
from student_train.tasks import TASKS, rows_spec
from teacher_dump.recipe import DumpRecipe

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two sentences of SST-2."""
    path = tmp_path / "sst2.jsonl"
    path.write_text('{"sentence1": "a good film", "label": 1}\n{"sentence1": "a bad film", "label": 0}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"stsb", "mlm", "causal"}))
def test_tasks_by_name_have_the_rows_of_their_recipes(task: str) -> None:
    suite = TASKS[task].benchmarks[0]
    dump = load_yaml(DumpRecipe, ROOT / "recipes" / "tasks" / suite / task / "dump.yaml")
    sources, spans, slots = dump.rows.sources, dump.rows.spans, dump.rows.slot_tokens
    found = rows_spec(TASKS[task], ["x.parquet"])
    assert found.model_copy(update={"sources": sources, "spans": spans, "slot_tokens": slots}) == dump.rows
    assert dump.teacher.head in TASKS[task].heads


def test_the_benchmarks_have_all_their_tasks() -> None:
    of = {name: {task for task, rows in TASKS.items() if name in rows.benchmarks} for name in ("superglue", "glue")}
    assert of["superglue"] == {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}
    assert of["glue"] == {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"}


def test_record_compares_words_without_articles_and_punctuation_with_the_nearest_right_entity() -> None:
    logits = np.array([[0.0, 3.0], [0.0, 1.0], [4.0, 0.0], [1.0, 1.5], [0.0, 0.1], [2.0, 0.0]])
    labels, groups = np.array([0.0, 1.0, 1.0, 0.0, 0.0, 1.0]), np.array([4, 4, 4, 9, 9, 9])
    entities = ["the Hague court", "Hague", "U.N. court, The Hague", "Bob", "Ann", "bob!"]
    # query 4: "hague court" against "hague" (2 * 1 / 3) and "un court hague" (2 * 2 / 5); query 9: "bob" is "bob"
    assert record_score("record_f1", logits, labels, groups, entities) == pytest.approx((0.8 + 1) / 2)
    assert record_score("record_em", logits, labels, groups, entities) == pytest.approx((0 + 1) / 2)
    with pytest.raises(ValueError, match="none of the entities of a query is right"):
        record_score("record_em", logits, np.zeros(6), groups, entities)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "a good film", "label": 1}', "sentence1"),
        ('{"sentence1": "a good film", "label": 2}', "column 'label' holds the label 2; expected one of"),
        ('{"sentence1": " ", "label": 1}', "empty text"),
        ("", "no rows to measure on"),
        ("{", "sst2.jsonl"),
    ],
)
def test_bad_data_is_one_message(line: str, message: str, program: Run, stores: ModuleType, file: Path, tmp_path: Path) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification")
    file.write_text(line + "\n" if line else "", encoding="utf-8")
    code, _, err = program("evaluate", model, "--task", "sst2", "--data", file)
    assert (code, err.startswith("error: "), message in err) == (2, True, True), err


def test_models_that_do_not_answer_the_task_are_refused(program: Run, stores: ModuleType, file: Path, tmp_path: Path) -> None:
    good, three, words = (
        stores.write_teacher(tmp_path / name, head, labels=labels)
        for name, head, labels in (("good", "classification", 2), ("three", "classification", 3), ("words", "masked_lm", 2))
    )
    other = stores.write_teacher(tmp_path / "other", "classification")
    tokenizer = stores.tokenizer()
    tokenizer.add_tokens(["brilliant"])
    tokenizer.save_pretrained(other)
    common = ("--task", "sst2", "--data", file, "--repeats", "0")
    for arguments, message in (
        ((three, *common), "expected 2 outputs of the task head, for the classes negative, positive; found 3"),
        ((words, *common), "the task needs a model with the head classification, found masked_lm"),
        ((tmp_path / "absent", *common), "expected the folder of a student, found none at"),
        ((good, "--teacher", other, *common), "the teacher has another tokenizer than the student"),
        ((good, "--task", "sst3", "--data", file), "unknown task 'sst3'; did you mean 'sst2'?"),
        ((good, "--task", "sst2", "--data", tmp_path / "absent.parquet"), "absent.parquet"),
        ((good, *common, "--set", "max_lenght=9"), "did you mean 'max_length'?"),
        ((good, *common, "--set", "max_length=1"), "max_length"),
        ((good, *common, "--set", "max_length"), "expected key.path=value"),
        ((good, *common, "--save", tmp_path / "no" / "such.json"), "--save: expected a folder"),
        ((good, *common, "--limit", "0"), "0"),
        ((*common,), "MODEL"),
    ):
        code, _, err = program("evaluate", *arguments)
        assert (code, message in err, "Traceback" in err) == (2, True, False), err


def test_rows_that_a_model_cannot_take_are_refused_and_a_limit_keeps_groups_whole(
    program: Run, stores: ModuleType, file: Path, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification")
    file.write_text(json.dumps({"sentence1": "good " * 40, "label": 1}) + "\n", encoding="utf-8")
    code, _, err = program("evaluate", model, "--task", "sst2", "--data", file)
    assert (code, "takes rows of up to 32 tokens, found 42" in err) == (2, True), err
    lines = [{"paragraph": "a film", "question": f"{n // 4}", "answer": "good", "label": n % 2} for n in range(16)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    save = tmp_path / "results.json"
    code, out, err = program("evaluate", model, "--task", "multirc", "--data", file, "--limit", "5", "--repeats", "0", "--save", save)
    assert (code, json.loads(save.read_text())["models"][0]["rows"]) == (0, 8), err
    assert " - " in out


def test_the_mean_is_over_tasks_whose_metrics_and_files_were_averaged_first(
    program: Run, stores: ModuleType, file: Path, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification")
    saved = tmp_path / "results.json"
    assert program("evaluate", model, model, "--task", "sst2", "--data", file, "--repeats", "0", "--save", saved)[0] == 0
    tree = json.loads(saved.read_text(encoding="utf-8"))
    files = []
    for name, task, scores in (("a", "mnli", (0.5, 0.1)), ("b", "mnli", (0.7, 0.3)), ("c", "sst2", (0.9, 0.2))):
        models = [{**one, "score": score} for one, score in zip(tree["models"], scores, strict=True)]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({**tree, "task": task, "models": models}), encoding="utf-8")
    code, out, err = program("mean", *files)
    assert code == 0, err
    rows = {line.split()[0]: line.split()[-2:] for line in out.splitlines()}
    assert rows["mnli"] == ["60.00", "20.00"]
    assert rows["sst2"] == ["90.00", "20.00"]
    assert rows["mean"] == ["75.00", "20.00"]
    assert "glue: without cola, mrpc, qnli, qqp, rte, stsb" in out
    assert "superglue" not in out
    one = tmp_path / "one.json"
    one.write_text(json.dumps({**tree, "models": tree["models"][:1]}), encoding="utf-8")
    for arguments, message in (
        ((*files, one), "one.json has 1 models"),
        ((tmp_path / "absent.json",), "no such results"),
        ((file,), "is no JSON of student-train evaluate"),
        ((model / "config.json",), "unknown key"),
        ((), "RESULTS"),
    ):
        code, _, err = program("mean", *arguments)
        assert (code, message in err, "Traceback" in err) == (2, True, False), err
