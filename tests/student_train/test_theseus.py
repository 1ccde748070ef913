"""BERT-of-Theseus: what each step computes, what moves, and what its ends are equal to."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from two_ranks import launched

from online.collate import collate
from online.models import ModelSpec, load_model
from store.reader import Store
from store.strict import parse
from student_train import checkpoint
from student_train.bundle import Bundle
from student_train.journal import read_journal
from student_train.methods.theseus import Theseus
from student_train.moment import Moment
from student_train.output import recipe_yaml, student_folder
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import run

QUIET: dict[str, Any] = {
    "disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-2, "weight_decay": 0.1,
}  # fmt: skip
CLOCK = ("tokens_per_second", "loader_wait")
SEED = 3


@pytest.fixture(scope="module")
def folder(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store`` with labelled rows and its ``teacher`` of 4 blocks beside it."""
    made: Path = tmp_path_factory.mktemp("theseus")
    stores.write_store(made, "classification", ["task_logits@row"])
    return made


def recipe(folder: Path, output: Path, options: dict[str, Any] | None, **changes: object) -> TrainRecipe:
    """Theseus with ``options``; with None the labels alone."""
    rows = {"store": str(folder / "store")}
    phase = {
        "name": "only", "student": {"layers": [1, 2], "source": str(folder / "teacher")}, "data": [rows],
        "methods": [{"name": "task_loss"} if options is None else {"name": "theseus", "options": options}],
        "teacher": "none" if options is None else {"online": {"model": str(folder / "teacher"), "head": "classification"}},
        "evaluate": [{**rows, "split": "dev"}], "metrics": ["accuracy"], "steps": 6, "batch_rows": 20, "trainer": QUIET, **changes,
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "seed": SEED, "phases": [phase]}, "recipe")


def curve(made: TrainRecipe) -> list[dict[str, float]]:
    entries = read_journal(made.output / "only" / "metrics.jsonl")
    return [{name.split("/")[-1]: value for name, value in entry.items() if name not in CLOCK} for entry in entries]


def weights(made: TrainRecipe) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSequenceClassification.from_pretrained(student_folder(made, "only")).state_dict())


def test_at_rate_1_it_is_plain_fine_tuning_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    plain = recipe(folder, tmp_path / "plain", None)
    last = recipe(folder, tmp_path / "last", {"rate": 1.0, "train": "all"})
    for made in (plain, last):
        run(made, ["test"])
    assert curve(last) == curve(plain)
    for name, weight in weights(plain).items():
        assert torch.equal(weights(last)[name], weight), name


def test_at_rate_0_the_students_blocks_get_no_gradient_and_stay(folder: Path, tmp_path: Path) -> None:
    start = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").state_dict()
    for train, still in (("all", False), ("blocks", True)):
        made = recipe(folder, tmp_path / train, {"rate": 0.0, "train": train}, gradient_norms=1)
        run(made, ["test"])
        for entry in curve(made):
            if "loss" in entry and "block.1" in entry:
                assert entry["block.1"] == entry["block.2"] == 0
                assert entry["embeddings"] > 0
        for name, weight in weights(made).items():
            if ".layer." in name or still:
                assert torch.equal(weight, start[name]), name
        assert torch.equal(weights(made)["classifier.weight"], start["classifier.weight"]) == still


def loaded_bundle(folder: Path, options: dict[str, Any]) -> tuple[Bundle, Theseus, Any]:
    """A student of blocks 1 and 2 of the teacher, the method, and the teacher."""
    spec = ModelSpec(model=folder / "teacher", head="classification")
    teacher, student = load_model(spec), load_model(spec)
    student.model.bert.encoder.layer = student.model.bert.encoder.layer[:2]
    student.model.config.num_hidden_layers = 2
    student = type(student).of(student.model, "classification")
    method = Theseus(student.shape, teacher.shape, **options)
    bundle = Bundle(student, [(MethodSpec(name="theseus"), method)])
    teacher.model.requires_grad_(False)
    bundle.attach({"": teacher})
    return bundle, method, teacher


def step_with(method: Theseus, chosen: list[bool]) -> Moment:
    """A step that draws ``chosen``."""
    for step in range(200):
        method.moment = Moment(step, 200, 10.0, SEED)
        if method.chosen() == chosen:
            return method.moment
    raise AssertionError(f"no step draws {chosen}")


@pytest.mark.parametrize("chosen", [[True, False], [False, True], [True, True], [False, False]])
def test_loss_and_gradients_are_those_of_the_mixed_stack_by_hand(chosen: list[bool], folder: Path) -> None:
    bundle, method, teacher = loaded_bundle(folder, {"rate": 0.5, "dropout": False})
    store = Store.open(folder / "store")
    batch = collate(store, store.rows.select("train")[:20])
    bundle.begin(step_with(method, chosen))
    bundle.train()
    for module in bundle.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, _ = bundle(batch, {}, bundle.counts(batch, True), True)
    loss.backward()
    own = {name: weight.grad for name, weight in bundle.student.named_parameters()}

    spec = ModelSpec(model=folder / "teacher", head="classification")
    whole = load_model(spec, attention="eager").model.double()
    blocks = torch.nn.ModuleList(load_model(spec, attention="eager").model.double().bert.encoder.layer[:2])
    stack = [[blocks[i]] if chosen[i] else [whole.bert.encoder.layer[2 * i], whole.bert.encoder.layer[2 * i + 1]] for i in range(2)]
    hidden = whole.bert.embeddings(input_ids=batch.input_ids, token_type_ids=batch.segments)
    mask = torch.zeros(batch.mask.shape, dtype=torch.float64).masked_fill(~batch.mask, -1e30)[:, None, None, :]
    for block in [block for module in stack for block in module]:
        hidden = block(hidden, attention_mask=mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = whole.classifier(whole.bert.pooler(hidden))
    expected = torch.nn.functional.cross_entropy(logits, batch.row_labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for i in range(2):
        for name, weight in blocks[i].named_parameters():
            grad = own[f"bert.encoder.layer.{i}.{name}"]
            if not chosen[i]:
                assert grad is None, name
                continue
            torch.testing.assert_close(grad.double(), weight.grad, rtol=1e-3, atol=1e-6)
    assert all(weight.grad is None for weight in teacher.model.parameters())


def test_a_block_that_a_step_does_not_choose_does_not_move_and_the_others_do(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, tmp_path / "out", {"rate": 0.5}, trainer={**QUIET, "save_steps": 1, "save_total_limit": 9})
    run(made, ["test"])
    _, method, _ = loaded_bundle(folder, {"rate": 0.5})
    saved = [load_start(folder), *(checkpoint.load(path) for path in checkpoints(made))]
    seen = set()
    for step, (before, after) in enumerate(pairwise(saved)):
        method.moment = Moment(step, 6, 2.0, SEED)
        chosen = method.chosen()
        seen.add(tuple(chosen))
        for name, weight in after.items():
            block = next((i for i in range(2) if f".layer.{i}." in name), None)
            moves = block is not None and chosen[block] and "weight" in name
            if block is None or not chosen[block]:
                assert torch.equal(weight, before[name]), (step, name)
            elif moves:
                assert not torch.equal(weight, before[name]), (step, name)
    assert len(seen) > 1


def checkpoints(made: TrainRecipe) -> list[Path]:
    folders = sorted((made.output / "only" / "checkpoints").glob("checkpoint-*"), key=checkpoint.step_of)
    return [folder / "model.safetensors" for folder in folders]


def load_start(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    return {f"student.{name}": weight for name, weight in model.state_dict().items()}


def test_a_curriculum_resumed_in_the_middle_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    options = {"rate": {"kind": "linear", "start": 0.3, "end": 1.0, "until": 0.66}}
    trainer = {**QUIET, "save_steps": 3, "save_total_limit": 9}
    whole, resumed = (recipe(folder, tmp_path / name, options, trainer=trainer) for name in ("whole", "resumed"))
    run(whole, ["test"])
    shutil.copytree(whole.output, resumed.output)
    for gone in ("student", "checkpoints/checkpoint-6"):
        shutil.rmtree(resumed.output / "only" / gone)
    (resumed.output / "only" / "result.json").unlink()
    run(resumed, ["test"])
    assert [entry for entry in curve(resumed) if entry["step"] > 3] == [entry for entry in curve(whole) if entry["step"] > 3]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_the_teachers_blocks_drop_out_where_asked_and_rest_in_eval_mode(folder: Path) -> None:
    store = Store.open(folder / "store")
    batch = collate(store, store.rows.select("train")[:20])
    for dropout in (True, False):
        bundle, method, teacher = loaded_bundle(folder, {"rate": 0.5, "dropout": dropout})
        bundle.begin(step_with(method, [False, False]))
        bundle.train()
        for module in bundle.student.modules():  # of the student nothing drops out
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses = {bundle(batch, {}, bundle.counts(batch, True), True)[0].item() for _ in range(3)}
        assert len(losses) == (3 if dropout else 1)
        assert not teacher.model.training


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("sharding", [{"kind": "none"}, {"kind": "zero3", "size": 2}], ids=["whole", "zero3"])
def test_two_ranks_train_as_one(sharding: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    still = {"random": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    student = {**still, "rest": "source", "source": str(folder / "teacher")}
    options = {"rate": 0.5, "dropout": False}
    one = recipe(folder, tmp_path / "one", options, student=student)
    run(one, ["test"])
    live = {"online": {"model": str(folder / "teacher"), "head": "classification", "sharding": sharding}}
    two = recipe(folder, tmp_path / "two", options, student=student, teacher=live)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(two))
    done = launched("-m", "student_train.cli", "run", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-4000:]
    for entry, expected in zip(curve(two), curve(one), strict=True):
        assert entry == pytest.approx(expected, rel=2e-4, abs=5e-6), entry["step"]


def test_what_cannot_be_mixed_is_refused(folder: Path, stores: ModuleType, tmp_path: Path) -> None:
    stored = [{"store": str(folder / "store"), "pass_name": "tiny"}]
    with pytest.raises(ValueError, match="theseus needs its teacher at work"):
        run(recipe(folder, tmp_path / "a", {}, teacher="store", data=stored), ["test"])
    narrow = {"random": {"hidden_size": 8, "num_hidden_layers": 2}, "source": str(folder / "teacher")}
    with pytest.raises(ValueError, match="expected equal width of student and teacher, found 8 and 16"):
        run(recipe(folder, tmp_path / "b", {}, student=narrow), ["test"])
    deep = {"random": {"num_hidden_layers": 5}, "source": str(folder / "teacher")}
    with pytest.raises(ValueError, match="at most the teacher's 4 blocks, found 5"):
        run(recipe(folder, tmp_path / "c", {}, student=deep), ["test"])
    with pytest.raises(ValueError, match=r"rate: expected numbers 0 to 1, found 1\.5"):
        run(recipe(folder, tmp_path / "d", {"rate": 1.5}), ["test"])
    with pytest.raises(ValueError, match="theseus changes what runs in a forward pass"):
        run(recipe(folder, tmp_path / "e", {}, trainer={**QUIET, "gradient_checkpointing": True}), ["test"])
