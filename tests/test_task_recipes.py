"""Recipes of tasks: the published protocols, rows as their columns say, and tiny teachers that teach one task of each kind."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from online.rows import iter_groups
from store.rows import Row
from store.strict import load_yaml
from student_train.recipe import MethodSpec, TrainRecipe
from teacher_dump.recipe import DumpRecipe

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "recipes" / "tasks"
SUPERGLUE = {"record": 5, "copa": 50, "wsc": 50, "rte": 50, "boolq": 20, "wic": 30, "cb": 50, "multirc": 15}
"""Task -> epochs of the published protocol."""
LENGTHS = {"record": 512, "multirc": 512, "wsc": 128}
GLUE = {
    "mnli": (1e-5, 32),
    "qnli": (1e-5, 32),
    "qqp": (1e-5, 32),
    "rte": (2e-5, 16),
    "sst2": (1e-5, 32),
    "mrpc": (1e-5, 16),
    "cola": (1e-5, 16),
}
"""Task -> learning rate and batch of the published protocol."""


@pytest.mark.parametrize("task", SUPERGLUE)
def test_superglue_has_the_lengths_epochs_and_optimiser_of_the_study(task: str) -> None:
    dump, train = (
        load_yaml(kind, TASKS / "superglue" / task / f"{name}.yaml") for kind, name in ((DumpRecipe, "dump"), (TrainRecipe, "train"))
    )
    assert isinstance(dump, DumpRecipe)
    assert dump.rows.max_length == LENGTHS.get(task, 256)
    (phase,) = train.phases
    assert (phase.epochs, phase.batch_rows) == (SUPERGLUE[task], 16)
    expected = {"learning_rate": 1e-5, "warmup_steps": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.1, "lr_scheduler_type": "linear"}
    assert phase.trainer.items() >= expected.items()


@pytest.mark.parametrize("task", GLUE)
def test_glue_has_the_rates_batches_and_warm_up_of_the_study(task: str) -> None:
    (phase,) = load_yaml(TrainRecipe, TASKS / "glue" / task / "train.yaml").phases
    assert (phase.trainer["learning_rate"], phase.batch_rows) == GLUE[task]
    assert (phase.epochs, phase.trainer["warmup_steps"]) == (10, 0.25 if task == "qqp" else 0.06)
    assert phase.methods == (MethodSpec(name="kd", options={"alpha": 0.5, "temperature": 2.0}),)


def built(folder: str, tokenizer: PreTrainedTokenizerBase, *overrides: str) -> list[list[Row]]:
    """The groups of rows that a task's dump recipe makes."""
    return list(iter_groups(load_yaml(DumpRecipe, TASKS / folder / "dump.yaml", overrides).rows, tokenizer))


@pytest.fixture
def tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "teachers" / "mlm")


@pytest.mark.parametrize(
    "folder",
    [
        "superglue/copa",
        "superglue/wsc",
        "superglue/rte",
        "superglue/boolq",
        "superglue/wic",
        "superglue/cb",
        "glue/rte",
        "glue/sst2",
        "glue/mrpc",
    ],
)
def test_rows_of_real_tasks_carry_the_words_and_labels_of_their_records(
    folder: str, beside_shared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside_shared)
    task = folder.rpartition("/")[2]
    train = "boolq_train1k5" if task == "boolq" else f"{task}_train"
    groups = built(
        folder, tokenizer, f"rows.sources.0.files=data/tasks/{train}.parquet", "rows.sources.0.limit=40", "rows.sources.1.limit=10"
    )
    records = [
        record
        for file, limit in ((train, 40), (f"{task}_dev", 10))
        for record in pq.read_table(f"data/tasks/{file}.parquet").slice(0, limit).to_pylist()
    ]
    assert len(groups) == len(records) == 50
    for group, record in zip(groups, records, strict=True):
        text = tokenizer.decode(group[0].input_ids, skip_special_tokens=True)
        start = tokenizer.decode(tokenizer(record["sentence1"][:60], add_special_tokens=False)["input_ids"][:5])
        assert text.startswith(start)
        if task == "copa":
            assert [row.label for row in group] == [float(choice == record["label"]) for choice in (0, 1)]
            assert record["choice2"].lower()[:20].split()[0] in tokenizer.decode(group[1].input_ids)
        else:
            assert [row.label for row in group] == [record["label"]]


def marked(task: str, record: dict[str, Any]) -> list[str]:
    """The stretches of a record that its spans mark."""
    if task == "wic":
        return [record[f"sentence{n}"][record[f"start{n}"] : record[f"end{n}"]] for n in (1, 2)]
    words = record["sentence1"].split()
    return [" ".join(words[i : i + len(t.split())]) for i, t in ((record[f"span{n}_index"], record[f"span{n}_text"]) for n in (1, 2))]


@pytest.mark.parametrize("task", ["wic", "wsc"])
def test_spans_of_all_real_rows_are_the_tokens_of_what_is_marked(
    task: str, beside_shared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside_shared)
    groups = built(f"superglue/{task}", tokenizer, "rows.sources.0.limit=300")
    records = pq.read_table(f"data/tasks/{task}_train.parquet").slice(0, 300).to_pylist()
    for (row,), record in zip(groups, records, strict=False):
        found = [tokenizer.decode(row.input_ids[start:end]).replace(" ", "") for start, end in row.spans]
        expected = [
            tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).replace(" ", "") for text in marked(task, record)
        ]
        assert found == expected


COLUMNS = {
    "mnli": {"sentence1": "a man sleeps", "sentence2": "he is awake", "gold_label": "contradiction"},
    "qnli": {"question": "who was it?", "sentence": "it was a man", "label": "entailment"},
    "qqp": {"question1": "who was it?", "question2": "who is it?", "is_duplicate": 0},
    "cola": {"sentence": "a man sleeps", "label": 1},
}
LABELS = {"mnli": 2.0, "qnli": 0.0, "qqp": 0.0, "cola": 1.0}


@pytest.mark.parametrize("task", COLUMNS)
def test_the_official_columns_of_tasks_without_data_become_rows(task: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(COLUMNS[task]) + "\n", encoding="utf-8")
    (row,), *_ = built(f"glue/{task}", tokenizer, *(f"rows.sources.{n}.files={file}" for n in range(3 if task == "mnli" else 2)))
    words = " ".join(str(value) for name, value in COLUMNS[task].items() if name not in ("gold_label", "is_duplicate", "label"))
    assert tokenizer.decode(row.input_ids, skip_special_tokens=True).replace(" ", "") == words.replace(" ", "")
    assert row.label == LABELS[task]


MULTIRC = {
    "passage": {
        "text": "A man sleeps.",
        "questions": [
            {"question": "Who sleeps?", "answers": [{"text": "A man", "label": 1}, {"text": "A dog", "label": 0}]},
            {"question": "Who wakes?", "answers": [{"text": "A dog", "label": 0}]},
        ],
    }
}
RECORD = {
    "passage": {"text": "Ann met Bob. Bob left.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 13, "end": 15}]},
    "qas": [{"id": "7", "query": "@placeholder met a man", "answers": [{"start": 0, "end": 2, "text": "Ann"}]}],
}


@pytest.mark.parametrize(
    ("task", "nested", "expected"),
    [
        (
            "multirc",
            MULTIRC,
            [[("a man sleeps.whosleeps?aman", 1.0), ("a man sleeps.whosleeps?adog", 0.0)], [("a man sleeps.whowakes?adog", 0.0)]],
        ),
        ("record", RECORD, [[("annmetbob.bobleft.annmetaman", 1.0), ("annmetbob.bobleft.bobmetaman", 0.0)]]),
    ],
)
def test_nested_files_become_a_group_of_rows_for_each_question(
    task: str, nested: dict[str, Any], expected: list[list[tuple[str, float]]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("flatten", TASKS / "superglue" / "flatten.py")
    assert spec is not None
    assert spec.loader is not None
    flatten = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flatten)
    source, target = tmp_path / "train.jsonl", tmp_path / "data" / "train.parquet"
    source.write_text(json.dumps(nested) + "\n", encoding="utf-8")
    lines = flatten.flatten(task, source, target)
    groups = built(f"superglue/{task}", tokenizer, *(f"rows.sources.{n}.files={target}" for n in (0, 1)))
    assert lines == sum(map(len, expected))
    found = [
        [(tokenizer.decode(row.input_ids, skip_special_tokens=True).replace(" ", ""), row.label) for row in group if row.split == "train"]
        for group in groups
    ]
    plain = [[(text.replace(" ", ""), label) for text, label in group] for group in expected]
    assert [group for group in found if group] == plain


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
@pytest.mark.parametrize(("task", "head"), [("wic", "classification"), ("copa", "multiple_choice")])
def test_a_tiny_teacher_teaches_a_pair_with_spans_and_a_choice(
    task: str, head: str, tiny_teachers: Callable[..., Path], run_program: Callable[..., str]
) -> None:
    folder = tiny_teachers(6, **{task: head})
    recipes = f"recipes/tasks/superglue/{task}"
    run_program(folder, "teacher_dump", "run", f"{recipes}/dump.yaml", "rows.sources.0.limit=48", "rows.sources.1.limit=24")
    assert "1 phases work" in run_program(folder, "student_train", "run", f"{recipes}/train.yaml", "--smoke")
