"""``student-train evaluate`` from outside: a task of each kind against its definition, worked out row by row."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from online.rows import iter_groups
from online.rows_spec import RowsSpec
from student_train.cli import main

Lines = list[dict[str, Any]]
SENTENCES = (
    "the film was very good",
    "a dull plot",
    "I liked it",
    "we hated the long scene and the actor was bad",
    "great actor but dull film",
    "it is not bad",
    "a short film",
    "the scene is fine",
)


@pytest.fixture
def measured(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run ``evaluate`` on lines of a Parquet file: the saved results and what was printed."""

    def run(task: str, lines: Lines, *arguments: str | Path) -> tuple[dict[str, Any], str]:
        file, save = tmp_path / "rows.parquet", tmp_path / "results.json"
        pq.write_table(pa.Table.from_pylist(lines), file)
        capfd.readouterr()
        given = ("--task", task, "--data", file, "--save", save, "--repeats", "2", "--set", "max_length=24")
        main(["evaluate", *map(str, arguments), *map(str, given)])
        out = capfd.readouterr().out
        return json.loads(save.read_text(encoding="utf-8")), out

    return run


def answers(folder: Path, texts: list[tuple[str, ...]], kind: type = AutoModelForSequenceClassification) -> np.ndarray:
    """[R, C] logits of transformers itself, row by row, without padding."""
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(*text, truncation="longest_first", max_length=24, return_tensors="pt")
        if kind is AutoModelForMultipleChoice:
            inputs = {name: value[None] for name, value in inputs.items()}
        with torch.no_grad():
            found.append(model(**inputs).logits[0].double().numpy())
    return np.array(found)


def test_single_sentences_are_measured_beside_their_teacher(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    teacher, student = (
        stores.write_teacher(tmp_path / name, "classification", layers=layers) for name, layers in (("big", 4), ("small", 2))
    )
    lines = [{"sentence1": text, "label": str(number % 2)} for number, text in enumerate(SENTENCES)]
    results, out = measured("sst2", lines, student, "--teacher", teacher)
    big, small = (answers(folder, [(text,) for text in SENTENCES]) for folder in (teacher, student))
    right = [float(row.argmax() == number % 2) for number, row in enumerate(small)]
    confidences = [float((np.exp(row) / np.exp(row).sum()).max()) for row in small]
    bins: dict[int, list[float]] = {}
    for one, confidence in zip(right, confidences, strict=True):
        bins.setdefault(min(int(confidence * 15), 14), []).append(one - confidence)
    same = [a.argmax() == b.argmax() for a, b in zip(big, small, strict=True)]
    divergences = []
    for a, b in zip(big, small, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        divergences.append(float((p * np.log(p / q)).sum()))
    of_teacher, of_student = results["models"]
    assert of_teacher["folder"] == str(teacher)
    assert of_student["scores"] == {
        "accuracy": pytest.approx(sum(right) / 8),
        "task_ece": pytest.approx(sum(abs(sum(values)) for values in bins.values()) / 8, abs=1e-5),
        "agreement": pytest.approx(sum(same) / 8),
        "task_kl": pytest.approx(sum(divergences) / 8, rel=1e-4),
    }
    assert set(of_teacher["scores"]) == {"accuracy", "task_ece"}
    assert of_student["rows"] == 8
    weights = student / "model.safetensors"
    deployment = of_student["deployment"]
    assert deployment["bytes"] == weights.stat().st_size
    assert deployment["parameters"] == AutoModelForSequenceClassification.from_pretrained(student).num_parameters()
    assert (deployment["rows"], deployment["tokens"], deployment["repeats"]) == (8, 16, 2)
    assert deployment["milliseconds"] > 0
    assert "accuracy*" in out
    assert f"{deployment['parameters']:,}" in out


def test_pairs_have_the_f1_of_the_positive_class(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification")
    pairs = list(zip(SENTENCES, SENTENCES[3:] + SENTENCES[:3], strict=True))
    labels = [1, 1, 0, 1, 0, 1, 1, 0]
    lines = [{"sentence1": a, "sentence2": b, "label": label} for (a, b), label in zip(pairs, labels, strict=True)]
    results, _ = measured("mrpc", lines, model)
    predicted = [int(row.argmax()) for row in answers(model, pairs)]
    hits = sum(one == label == 1 for one, label in zip(predicted, labels, strict=True))
    f1 = 2 * hits / (sum(predicted) + sum(labels)) if hits else 0.0
    accuracy = sum(one == label for one, label in zip(predicted, labels, strict=True)) / 8
    (found,) = results["models"]
    assert (found["scores"]["f1"], found["scores"]["accuracy"]) == (pytest.approx(f1), pytest.approx(accuracy))
    assert found["score"] == pytest.approx((f1 + accuracy) / 2)


def test_regression_has_both_correlations(measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification", labels=1)
    pairs = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
    scores = [0.0, 1.5, 2.25, 3.0, 4.75, 5.0, 0.5, 2.0]
    lines = [{"sentence1": a, "sentence2": b, "label": str(score)} for (a, b), score in zip(pairs, scores, strict=True)]
    results, _ = measured("stsb", lines, model)
    predicted = answers(model, pairs)[:, 0].tolist()

    def correlation(a: list[float], b: list[float]) -> float:
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
        return both / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))

    def ranks(values: list[float]) -> list[float]:
        return [float(sum(other < value for other in values)) for value in values]

    found = results["models"][0]["scores"]
    assert found["pearson"] == pytest.approx(correlation(predicted, scores), abs=1e-5)
    assert found["spearman"] == pytest.approx(correlation(ranks(predicted), ranks(scores)))


def test_a_choice_is_right_where_its_likeliest_row_is(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "multiple_choice")
    lines = [
        {"sentence1": text, "question": "cause", "choice1": SENTENCES[n - 1], "choice2": SENTENCES[n - 3], "label": n % 2}
        for n, text in enumerate(SENTENCES)
    ]
    results, _ = measured("copa", lines, model)
    right = 0
    for line in lines:
        texts = [(line["sentence1"], f"What was the cause?[SEP]{line[name]}") for name in ("choice1", "choice2")]
        right += int(answers(model, texts, AutoModelForMultipleChoice)[:, 0].argmax() == line["label"])
    assert results["models"][0]["scores"] == {"choice_accuracy": pytest.approx(right / 8)}
    assert results["models"][0]["rows"] == 16


def test_groups_of_answers_and_of_entities_are_measured_as_multirc_and_record_are(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "classification")
    generator = np.random.default_rng(1)
    lines = []
    for n in range(24):
        question = f"{'very ' * (n // 3)}good"
        label = int(generator.random() < 0.5)
        lines.append({"paragraph": SENTENCES[n % 8], "question": question, "answer": SENTENCES[-n % 7], "label": label})
    results, _ = measured("multirc", lines, model)
    separated = [(line["paragraph"], f"{line['question']}[SEP]{line['answer']}") for line in lines]
    predicted, labels = [int(row.argmax()) for row in answers(model, separated)], [line["label"] for line in lines]
    hits = sum(one == label == 1 for one, label in zip(predicted, labels, strict=True))
    whole = [all(predicted[n] == labels[n] for n in range(first, first + 3)) for first in range(0, 24, 3)]
    found = results["models"][0]["scores"]
    assert found["f1a"] == pytest.approx(2 * hits / (sum(predicted) + sum(labels)))
    assert found["exact_match"] == pytest.approx(sum(whole) / 8)

    entities = ("the actor", "The actor!", "film", "long plot")
    lines = []
    for n in range(20):
        entity = entities[n % 4]
        row = {"passage": SENTENCES[n // 4], "statement": f"{entity} was fine", "entity": entity, "question": str(n // 4)}
        lines.append({**row, "label": int(n % 4 == 3)})
    lines[4]["label"], lines[7]["label"], lines[14]["label"] = 1, 0, 1  # so that a query has another right entity, or two
    results, _ = measured("record", lines, model)
    logits = answers(model, [(line["passage"], line["statement"]) for line in lines])
    words = {"the actor": {"actor"}, "The actor!": {"actor"}, "film": {"film"}, "long plot": {"long", "plot"}}
    exact = f1 = 0.0
    for first in range(0, 20, 4):
        taken = max(range(first, first + 4), key=lambda row: logits[row][1] - logits[row][0])
        answer = words[lines[taken]["entity"]]
        right = [words[line["entity"]] for line in lines[first : first + 4] if line["label"] == 1]
        exact += max(float(answer == one) for one in right)
        f1 += max(2 * len(answer & one) / (len(answer) + len(one)) for one in right)
    found = results["models"][0]["scores"]
    assert (found["record_em"], found["record_f1"]) == (pytest.approx(exact / 5), pytest.approx(f1 / 5))


def test_perplexity_of_a_causal_model_is_that_of_every_next_word(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    tokenizer = stores.tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results, _ = measured("causal", [{"text": text} for text in SENTENCES], tmp_path / "model", "--teacher", tmp_path / "model")
    losses = []
    for text in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-float(logs[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    found = results["models"][1]["scores"]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["word_agreement"] == 1
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)


def test_perplexity_of_a_masked_model_is_that_of_the_masked_words(
    measured: Callable[..., tuple[dict[str, Any], str]], stores: ModuleType, tmp_path: Path
) -> None:
    model = stores.write_teacher(tmp_path / "model", "masked_lm")
    results, _ = measured("mlm", [{"text": text} for text in SENTENCES], model)
    spec = RowsSpec.model_validate({"sources": [{"files": [str(tmp_path / "rows.parquet")]}], "objective": "mlm", "max_length": 24})
    running, losses = AutoModelForMaskedLM.from_pretrained(model).eval(), []
    for (row,) in iter_groups(spec, stores.tokenizer()):  # which words are masked is tested with the rows
        with torch.no_grad():
            logs = running(torch.tensor(row.input_ids[None].astype(int))).logits[0].double().log_softmax(-1)
        losses += [-float(logs[place, label]) for place, label in enumerate(row.token_labels.tolist()) if label >= 0]
    assert len(losses) >= 8
    assert results["models"][0]["scores"]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
