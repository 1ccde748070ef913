"""Students that keep only some words: losses, labels and metrics in their own order, later phases, resumption, and what is refused."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from online.batch import IGNORED
from online.collate import collate
from online.kept_words import FILE, KeptWords, kept_words, map_words, read_kept_words
from online.models import ModelSpec, forward, load_model
from store.reader import Store
from store.strict import parse
from student_train.bundle import Bundle
from student_train.init import build
from student_train.methods import parse_method
from student_train.outline import outline
from student_train.output import student_folder
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import check, run
from student_train.teacher import StoredTeacher
from student_train.vocabulary import take_rows

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3}
KEEP = {"rate": 0.3, "keep": ["Great"]}
STARTS: dict[str, dict[str, Any]] = {
    "random": {"random": {"num_hidden_layers": 1}},
    "blocks": {"layers": [2]},
    "narrow": {"layers": "first 1", "width": {"hidden_size": 8, "num_attention_heads": 1}},
}


def recipe(output: Path, folder: Path, *phases: dict[str, Any], features: list[str] | None = None) -> TrainRecipe:
    """Phases that learn GLMD's L_sp and masked words from the store in ``folder``."""
    data = {"store": str(folder / "store"), "pass_name": "tiny"}
    common = {
        "data": [data], "evaluate": [{**data, "split": "dev"}], "steps": 4, "batch_rows": 8, "trainer": QUIET,
        "methods": [{"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}, {"name": "lm_loss"}],
        "metrics": ["perplexity", "teacher_kl"],
    }  # fmt: skip
    named = [{"name": f"phase{number}", **common, **phase} for number, phase in enumerate(phases, 1)]
    return parse(TrainRecipe, {"output": str(output), "phases": named}, "recipe")


def result(made: TrainRecipe, phase: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.output / phase / "result.json").read_text())
    return found


@pytest.mark.parametrize("start", STARTS)
def test_any_start_keeps_the_frequent_words_and_later_phases_go_on_with_them(start: str, many_words: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, many_words, {"student": {**STARTS[start], "vocabulary": KEEP}}, {"student": {"phase": "phase1"}})
    first = build(outline(made, made.phases[0]).blueprint, made.seed)
    embedding = first.student.model.get_input_embeddings()
    words = kept_words(first.student.model)
    assert words is not None
    assert (words.words, len(words.kept), first.student.shape.vocab) == (410, 128, 128)
    assert {0, 1, 2, 3, 4, 398, 399} <= set(words.kept.tolist()), "special tokens, Great and great"
    assert (
        first.notices[-1]
        == f"vocabulary: 128 of 410 words are kept; {words.representatives} different ones of them stand for the 282 others"
    )
    if start == "blocks":
        teacher = load_file(many_words / "teacher" / "model.safetensors")
        assert torch.equal(embedding.weight, teacher["bert.embeddings.word_embeddings.weight"][words.kept])
        assert torch.equal(first.student.model.get_output_embeddings().bias, teacher["cls.predictions.bias"][words.kept])
    assert first.student.model.get_output_embeddings().weight is embedding.weight, "still tied"
    assert build(outline(made, made.phases[0]).blueprint, made.seed).fingerprint == first.fingerprint
    for phase in made.phases:
        run(made, ["tests"], phase.name)
    one, two = result(made, "phase1"), result(made, "phase2")
    assert one["start"] == first.fingerprint
    assert (two["start"], two["before"]) == (one["student"], one["after"])
    assert one["after"]["loss"] < one["before"]["loss"]
    kept = [read_kept_words(student_folder(made, phase)) for phase in ("phase1", "phase2")]
    assert all(found is not None and found.fingerprint == words.fingerprint for found in kept)
    assert load_file(student_folder(made, "phase2") / "model.safetensors")["bert.embeddings.word_embeddings.weight"].shape[0] == 128


def losses(student_folder: Path, words: KeptWords | None, folder: Path, rows: list[int]) -> dict[str, torch.Tensor]:
    """The terms of one step of the model in ``student_folder`` with the words ``words`` alone."""
    spec = ModelSpec.model_validate({"model": str(student_folder), "head": "masked_lm"})
    loaded = load_model(spec)
    store = Store.open(folder / "store")
    shape = store.manifest.passes["tiny"].shape
    if words is not None:
        take_rows(loaded.model, "masked_lm", words.kept)
        loaded = type(loaded).of(loaded.model, "masked_lm", loaded.tokenizer)
        map_words(loaded.model, words)
    seen = shape.model_copy(update={"vocab": loaded.shape.vocab})
    named = {"lm_kd": {"positions": "all", "temperature": 15.0}, "lm_loss": {}}
    methods = [(MethodSpec(name=name), parse_method(name, options, loaded.shape, seen)) for name, options in named.items()]
    bundle = Bundle(loaded, methods).eval()
    batch = collate(store, store.rows.select("train")[rows])
    keys = frozenset(key for _, method in methods for key in method.teacher_keys)
    teacher = StoredTeacher(store, "tiny", keys)
    with torch.no_grad():
        return bundle(batch, teacher.features(batch, teacher.fetch(batch.rows.numpy())), bundle.counts(batch, True), True)[1]


def test_all_words_in_any_order_give_the_plain_loss(many_words: Path, tiny_words: ModuleType, tmp_path: Path) -> None:
    student = tiny_words.write_model(tmp_path / "student", num_hidden_layers=1)
    plain = losses(student, None, many_words, [0, 1, 2, 3])
    order = torch.randperm(410, generator=torch.Generator().manual_seed(1))
    everything = KeptWords(order, order.argsort())
    for name, value in losses(student, everything, many_words, [0, 1, 2, 3]).items():
        assert float(value) == pytest.approx(float(plain[name]), rel=1e-5), name


def test_the_order_of_kept_words_is_of_no_account(many_words: Path, tiny_words: ModuleType, tmp_path: Path) -> None:
    student = tiny_words.write_model(tmp_path / "student", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    kept = torch.randperm(410, generator=generator)[:128]
    places = torch.randint(128, (410,), generator=generator)
    places[kept] = torch.arange(128)
    order = torch.randperm(128, generator=generator)
    one = losses(student, KeptWords(kept, places), many_words, [4, 5])
    other = losses(student, KeptWords(kept[order], order.argsort()[places]), many_words, [4, 5])
    for name, value in one.items():
        assert float(value) == pytest.approx(float(other[name]), rel=1e-4), name


def test_the_losses_are_those_of_the_formulas_over_kept_words(many_words: Path, tiny_words: ModuleType, tmp_path: Path) -> None:
    student = tiny_words.write_model(tmp_path / "student", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(4)
    kept = torch.randperm(410, generator=generator)[:128]
    places = torch.randint(128, (410,), generator=generator)
    places[kept] = torch.arange(128)
    found = losses(student, KeptWords(kept, places), many_words, [0, 3, 7])

    store = Store.open(many_words / "store")
    batch = collate(store, store.rows.select("train")[[0, 3, 7]])
    plain = load_model(ModelSpec.model_validate({"model": str(student), "head": "masked_lm"}))
    teacher = load_model(ModelSpec.model_validate({"model": str(many_words / "teacher"), "head": "masked_lm"}))
    assert batch.token_labels is not None
    with torch.no_grad():
        teacher_logits = forward(teacher, batch).logits.double()
        read_as = kept[places[batch.input_ids]]  # a dropped word is read as its stand-in, and its row is that one's
        mapped = type(batch)(**{**{name: getattr(batch, name) for name in batch.__dataclass_fields__}, "input_ids": read_as})
        student_logits = forward(plain, mapped).logits.double()
    kl, tokens, nll, labelled = 0.0, 0, 0.0, 0
    for row in range(3):
        for place in range(batch.mask.shape[1]):
            if not batch.mask[row, place]:
                continue
            t, s = (logits[row, place][kept] for logits in (teacher_logits, student_logits))
            p, q = (t / 15).softmax(0), (s / 15).softmax(0)
            kl += 225 * float((p * (p / q).log()).sum())
            tokens += 1
            if (label := int(batch.token_labels[row, place])) != IGNORED:
                nll -= float(s.log_softmax(0)[places[label]])
                labelled += 1
    assert float(found["lm_kd/words"]) == pytest.approx(kl / tokens, rel=1e-4)
    assert float(found["lm_loss/words"]) == pytest.approx(nll / labelled, rel=1e-5)
    assert (places[batch.token_labels[batch.labelled]] != batch.token_labels[batch.labelled]).any()


def test_a_run_that_was_killed_goes_on_with_the_same_words_and_losses(many_words: Path, tmp_path: Path) -> None:
    phase = {"student": {**STARTS["random"], "vocabulary": KEEP}, "trainer": {**QUIET, "save_steps": 2}}
    made = recipe(tmp_path / "out", many_words, phase)
    run(made, ["first"])
    weights = (student_folder(made, "phase1") / "model.safetensors").read_bytes()
    before = result(made, "phase1")["after"]
    (tmp_path / "out" / "phase1" / "result.json").unlink()
    shutil.rmtree(student_folder(made, "phase1"))
    shutil.rmtree(tmp_path / "out" / "phase1" / "checkpoints" / "checkpoint-4")
    run(made, ["second"])
    assert (student_folder(made, "phase1") / "model.safetensors").read_bytes() == weights
    assert result(made, "phase1")["after"] == before


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [{"student": {"layers": [1], "vocabulary": KEEP}}, {"student": {"phase": "phase1", "vocabulary": KEEP}}],
            "phase 'phase2': student.vocabulary: what the student starts from keeps 128 of 410 words already, and their map is made once",
        ),
        ([{"student": {"layers": [1], "vocabulary": {"keep": ["terrible"]}}}], "does not know 'terrible'"),
        ([{"student": {"layers": [1], "vocabulary": {"rates": 0.5}}}], "rates"),
        (
            [{"student": {"layers": [1], "vocabulary": KEEP}, "methods": [{"name": "lm_kd", "options": {"top": 4, "tail": "none"}}]}],
            "methods: lm_kd: the student keeps 128 of 410 words, and the teacher's distribution over them needs the logits of all of them, "
            "which top4 does not hold",
        ),
    ],
)
def test_what_does_not_fit_is_refused(phases: list[dict[str, Any]], message: str, many_words: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, many_words, *phases)


def checked(output: Path, folder: Path, *phases: dict[str, Any]) -> None:
    made = recipe(output, folder, *phases)
    check(made, made.phases)


def test_a_folder_with_fewer_words_starts_students_and_cannot_be_compressed_again(many_words: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path / "one", many_words, {"student": {"layers": [1, 2], "vocabulary": KEEP}, "steps": 1})
    run(made, ["tests"])
    folder = student_folder(made, "phase1")
    words = read_kept_words(folder)
    assert words is not None
    for start in (
        {"model": {"model": str(folder), "head": "masked_lm"}},
        {"layers": [2], "source": str(folder)},
        {"random": {}, "source": str(folder)},
    ):
        again = recipe(tmp_path / "two", many_words, {"student": start})
        loaded = build(outline(again, again.phases[0]).blueprint, 0).student
        found = kept_words(loaded.model)
        assert found is not None
        assert found.fingerprint == words.fingerprint
        assert loaded.shape.vocab == 128
    with pytest.raises(ValueError, match="keeps 128 of 410 words already"):
        checked(tmp_path / "three", many_words, {"student": {"layers": [2], "source": str(folder), "vocabulary": KEEP}})
    (folder / FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(ModelSpec.model_validate({"model": str(folder), "head": "masked_lm"}))


def test_dropped_words_can_all_be_read_as_unknown(many_words: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, many_words, {"student": {"layers": [1], "vocabulary": {"rate": 0.3, "map": "unk"}}})
    words = kept_words(build(outline(made, made.phases[0]).blueprint, 0).student.model)
    assert words is not None
    dropped = sorted(set(range(410)) - set(words.kept.tolist()))
    assert set(words.kept[words.places[dropped]].tolist()) == {1}
    assert words.representatives == 1


def test_a_student_with_fewer_words_learns_from_a_store_what_it_learns_from_the_live_teacher(many_words: Path, tmp_path: Path) -> None:
    student = {"layers": [2], "source": str(many_words / "teacher"), "vocabulary": KEEP}
    store = {"store": str(many_words / "store")}
    methods = [
        {"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0, "divergence": name}} for name in ("forward_kl", "jsd")
    ]
    live = {
        "data": [store], "evaluate": [{**store, "split": "dev"}],
        "teacher": {"online": {"model": str(many_words / "teacher"), "head": "masked_lm"}},
    }  # fmt: skip
    found = []
    for name, changes in {"stored": {}, "live": live}.items():
        made = recipe(tmp_path / name, many_words, {"student": student, "methods": methods, "metrics": ["teacher_kl"], **changes})
        run(made, ["tests"])
        ended = result(made, "phase1")
        found.append({part: ended[part] for part in ("start", "student", "before", "after")})
    assert found[0] == found[1]
    assert found[0]["student"] != found[0]["start"]
