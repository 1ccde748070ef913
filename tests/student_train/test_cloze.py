"""A task as a cloze: what is learned and measured of the words that stand for classes, from real rows, and what is refused."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from transformers import AutoModelForMaskedLM

from online.collate import collate
from store.reader import Store
from store.strict import parse
from student_train.outline import outline
from student_train.output import student_folder
from student_train.recipe import TrainRecipe
from student_train.run import run

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 0.0}
STILL = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPARSE = {"positions": "all", "temperature": 15.0, "row_length": 16}
GLMD = [{"name": "lm_kd", "options": SPARSE}, {"name": "cloze_kd", "weight": 3.0}, {"name": "cloze_loss", "weight": 0.5}]


@pytest.fixture(scope="module")
def store(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clozes to train on and 20 to measure on, answered by a masked language model of 4 blocks."""
    made: Path = stores.write_clozes(tmp_path_factory.mktemp("cloze"))
    return made


def recipe(store: Path, output: Path, methods: list[dict[str, Any]], **changes: object) -> TrainRecipe:
    data = {"store": str(store), "pass_name": "tiny"}
    phase = {
        "name": "only", "student": {"random": STILL}, "data": [data], "evaluate": [{**data, "split": "dev"}], "methods": methods,
        "metrics": [], "steps": 1, "batch_rows": 40, "trainer": QUIET, **changes,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def result(made: TrainRecipe) -> dict[str, Any]:
    return dict(json.loads((made.output / "only" / "result.json").read_text()))


def answers(folder: Path, store: Path, split: str) -> tuple[Tensor, Tensor]:
    """[R, T, V] float64 word logits of a folder's model, and [R] the place of each row's mask."""
    read = Store.open(store)
    batch = collate(read, read.rows.select(split))
    model = AutoModelForMaskedLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.mask, token_type_ids=batch.segments).logits
    return logits, (batch.input_ids == 4).long().argmax(1)


def test_losses_and_metrics_are_those_of_the_classes_words_by_hand(store: Path, stores: ModuleType, tmp_path: Path) -> None:
    made = recipe(store, tmp_path / "out", GLMD, metrics=["accuracy", "f1", "agreement", "task_kl"])
    run(made, ["it"])  # at rate 0, so that the student that is exported is the one that was measured
    words = stores.tokenizer().convert_tokens_to_ids(["bad", "good"])
    (student, place), (teacher, _) = (answers(folder, store, "dev") for folder in (student_folder(made, "only"), store.parent / "teacher"))
    read = Store.open(store)
    rows = read.rows.select("dev")
    labels, lengths = torch.from_numpy(read.rows.label[rows]).long(), read.rows.at(rows).length
    z_s, z_t = (logits[torch.arange(20), place][:, words] for logits in (student, teacher))
    p, q = torch.softmax(z_t, 1), torch.softmax(z_s, 1)
    sparse = 0.0
    for row in range(20):
        for token in range(int(lengths[row])):
            a, b = (torch.softmax(logits[row, token] / 15, 0) for logits in (teacher, student))
            sparse += 15**2 * float((a * (a / b).log()).sum())
    expected = {
        "lm_kd/words": sparse / (20 * 16),
        "cloze_kd/soft": 3 * float((p * (p / q).log()).sum(1).mean()),
        "cloze_loss/hard": 0.5 * float(-q[torch.arange(20), labels].log().mean()),
        "accuracy": float((z_s.argmax(1) == labels).double().mean()),
        "f1": f1_score(labels.numpy(), z_s.argmax(1).numpy(), zero_division=0.0),
        "agreement": float((z_s.argmax(1) == z_t.argmax(1)).double().mean()),
        "task_kl": float((p * (p / q).log()).sum(1).mean()),
    }
    assert {name: result(made)["after"][name] for name in expected} == pytest.approx(expected, rel=2e-4)
    assert 0 < expected["agreement"] < 1


def test_words_on_padding_that_rows_keep_are_learned_too(stores: ModuleType, tmp_path: Path) -> None:
    store = stores.write_clozes(tmp_path / "padded", padding=True)
    made = recipe(store, tmp_path / "out", [{"name": "lm_kd", "options": SPARSE}], metrics=["accuracy"])
    run(made, ["it"])
    read = Store.open(store)
    rows = read.rows.select("dev")
    batch, places = collate(read, rows), 0
    text = (batch.input_ids != 0).long()
    assert batch.mask.all()
    assert 0 < text.sum() < text.numel() == 20 * 16
    found = []
    for folder in (student_folder(made, "only"), store.parent / "teacher"):
        model = AutoModelForMaskedLM.from_pretrained(folder).double().eval()
        with torch.no_grad():
            found.append(model(input_ids=batch.input_ids, attention_mask=text).logits)
    expected = 0.0
    for z_s, z_t in zip(*(logits.flatten(0, 1) for logits in found), strict=True):  # every place of the padded batch
        p, q = torch.softmax(z_t / 15, 0), torch.softmax(z_s / 15, 0)
        expected += 15**2 * float((p * (p / q).log()).sum())
        places += 1
    masked = (batch.input_ids == 4).long().argmax(1)
    good = (found[0][torch.arange(20), masked][:, stores.tokenizer().convert_tokens_to_ids(["bad", "good"])]).argmax(1)
    labels = torch.from_numpy(read.rows.label[rows]).long()
    after = result(made)["after"]
    assert after["lm_kd/words"] == pytest.approx(expected / places, rel=2e-4)
    assert after["accuracy"] == pytest.approx(float((good == labels).double().mean()))


def test_a_masked_language_model_is_tuned_on_labels_and_stays_one(store: Path, tmp_path: Path) -> None:
    start = {"source": str(store.parent / "teacher"), "layers": "every 1"}
    trainer = {**QUIET, "learning_rate": 0.01, "logging_steps": 50}
    changes: dict[str, Any] = {"teacher": "none", "student": start, "steps": 150, "trainer": trainer, "metrics": ["accuracy", "perplexity"]}
    measured = {"store": str(store), "split": "train"}
    made = recipe(store, tmp_path / "out", [{"name": "cloze_loss"}], evaluate=[measured], **changes)
    run(made, ["it"])
    before, after = result(made)["before"], result(made)["after"]
    assert before["cloze_loss/hard"] > math.log(2) / 2
    assert after["cloze_loss/hard"] < 0.2
    assert after["accuracy"] > 0.9
    logits, place = answers(student_folder(made, "only"), store, "train")
    assert logits.shape[-1] == 29
    assert place.min() > 0


def refusal(store: Path, tmp_path: Path, methods: list[dict[str, Any]], **changes: object) -> str:
    made = recipe(store, tmp_path / "out", methods, **changes)
    with pytest.raises(ValueError) as refused:
        outline(made, made.phases[0])
    return str(refused.value)


def test_what_is_no_cloze_or_has_no_head_for_words_is_refused(store: Path, stores: ModuleType, tmp_path: Path) -> None:
    plain = stores.write_store(tmp_path / "plain", "masked_lm", ["lm_logits@all"], objective="mlm")
    for method in ("cloze_kd", "cloze_loss"):
        assert "are no clozes (rows.cloze in the dump's recipe makes them)" in refusal(plain, tmp_path, [{"name": method}])
    assert "needs labels of kind classification" in refusal(plain, tmp_path, [{"name": "lm_kd"}], metrics=["accuracy"])
    tuned = stores.write_store(tmp_path / "tuned", "classification", ["task_logits@row"])
    assert "lm_logits needs a student with a head of masked_lm" in refusal(tuned, tmp_path, [{"name": "cloze_kd"}])
    classes = {"random": STILL, "head": "classification"}
    assert "lm_logits needs a student with a head of masked_lm" in refusal(store, tmp_path, [{"name": "cloze_kd"}], student=classes)
    hot = [{"name": "cloze_kd", "options": {"divergence": "mse", "temperature": 2.0}}]
    assert "the mse of logits has none, found 2.0" in refusal(store, tmp_path, hot)


def test_a_metric_of_classes_compares_clozes_with_clozes(store: Path, tmp_path: Path) -> None:
    classes = {"random": STILL, "head": "classification"}
    message = refusal(store, tmp_path, [{"name": "task_loss"}], student=classes, teacher="none", metrics=["agreement"])
    assert "metric 'agreement' needs a head of classification" in message
    assert "the teacher's is masked_lm" in message
