"""Clozes and a student that keeps only some words: classes are told apart by the same words on both sides, or the phase is refused."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from online.collate import collate
from online.models import ModelSpec, load_model
from store.reader import Store
from store.strict import parse
from student_train.output import student_folder
from student_train.recipe import TrainRecipe
from student_train.run import run

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 0.0}
STILL = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RARE = ["w7", "great"]
"""Words that hardly come in the text, and the second not at all."""


@pytest.fixture(scope="module")
def clozes(tiny_words: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``store`` of clozes and its ``teacher``."""
    folder: Path = tmp_path_factory.mktemp("clozes")
    label = {"column": "label", "classes": ["a", "b"]}
    tiny_words.write_store(folder, ["lm_logits@all"], text="{text} {mask}", cloze={"words": RARE}, label=label)
    return folder


def recipe(text: Path, clozes: Path, output: Path, keep: list[str]) -> TrainRecipe:
    """Words are chosen in the first phase, whose rows know nothing of the task."""
    common: dict[str, Any] = {"steps": 1, "batch_rows": 60, "trainer": QUIET}
    task = {"store": str(clozes / "store"), "pass_name": "tiny"}
    sparse = {"positions": "all", "temperature": 15.0}
    phases = [
        {
            "name": "words",
            "student": {"random": STILL, "vocabulary": {"rate": 0.3, "keep": keep}},
            "data": [{"store": str(text / "store"), "pass_name": "tiny"}],
            "methods": [{"name": "lm_kd", "options": sparse}],
            **common,
        },
        {
            "name": "task",
            "student": {"phase": "words"},
            "data": [task],
            "methods": [{"name": "cloze_kd"}, {"name": "cloze_loss"}, {"name": "lm_kd", "options": sparse}],
            "evaluate": [{**task, "split": "dev"}],
            "metrics": ["agreement"],
            **common,
        },
    ]
    return parse(TrainRecipe, {"output": str(output), "phases": phases}, "recipe")


def test_classes_are_the_same_words_on_both_sides(many_words: Path, clozes: Path, tiny_words: ModuleType, tmp_path: Path) -> None:
    made = recipe(many_words, clozes, tmp_path / "out", RARE)
    for phase in ("words", "task"):  # at rate 0, so that the student that is exported is the one that was measured
        run(made, ["it"], phase)
    folder = student_folder(made, "task")
    kept = load_file(folder / "vocabulary.safetensors")["kept"].tolist()
    ids = tiny_words.tokenizer().convert_tokens_to_ids(RARE)
    store = Store.open(clozes / "store")
    rows = store.rows.select("dev")
    batch = collate(store, rows)
    place, lengths = (batch.input_ids == 4).long().argmax(1), batch.lengths.tolist()
    logits = []
    for where in (folder, clozes / "teacher"):
        model = load_model(ModelSpec(model=where, head="masked_lm")).model.double()
        with torch.no_grad():
            logits.append(model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), token_type_ids=batch.segments).logits)
    student, teacher = logits[0], logits[1][..., kept]
    assert student.shape[-1] == len(kept) == tiny_words.KEPT
    places = [kept.index(number) for number in ids]
    z_s, z_t = (side[torch.arange(len(rows)), place][:, places] for side in (student, teacher))
    p, q = torch.softmax(z_t, 1), torch.softmax(z_s, 1)
    labels = torch.from_numpy(store.rows.label[rows]).long()
    words = 0.0
    for row, length in enumerate(lengths):
        for token in range(length):
            a, b = (torch.softmax(side[row, token] / 15, 0) for side in (teacher, student))
            words += 15**2 * float((a * (a / b).log()).sum())
    expected = {
        "cloze_kd/soft": float((p * (p / q).log()).sum(1).mean()),
        "cloze_loss/hard": float(-q[torch.arange(len(rows)), labels].log().mean()),
        "lm_kd/words": words / sum(lengths),
        "agreement": float((z_s.argmax(1) == z_t.argmax(1)).double().mean()),
    }
    measured = json.loads((tmp_path / "out" / "task" / "result.json").read_text())["after"]
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=2e-4)


def test_a_word_of_a_class_that_was_dropped_is_refused(many_words: Path, clozes: Path, tmp_path: Path) -> None:
    made = recipe(many_words, clozes, tmp_path / "out", RARE[:1])
    run(made, ["it"], "words")
    with pytest.raises(ValueError, match="are the words great, which the student does not keep: name them with"):
        run(made, ["it"], "task")
