"""DistiLLM's choice of responses, what it keeps of them, and the share that a rising validation loss raises."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from online.batch import Batch, dense
from online.collate import collate
from online.models import LoadedModel, ModelSpec, load_model
from online.rollout import prompt_lengths
from store.reader import Store
from student_train.methods import parse_method
from student_train.methods.distillm import DistiLLM
from student_train.methods.writing import LOGITS
from student_train.moment import Moment
from student_train.step import Step, run

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(__file__).with_name("tiny_answers.py")
    spec = importlib.util.spec_from_file_location("tiny_answers", path)
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    made: Path = tmp_path_factory.mktemp("answers")
    tiny.write_model(made / "teacher", tiny.llama(hidden_size=24), 1)
    tiny.write_model(made / "student", tiny.llama(attention_dropout=0.5), 2)
    tiny.write_rows(made)
    return made


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """Student and teacher."""
    student, teacher = (load_model(ModelSpec(model=folder / name, head="causal_lm")) for name in ("student", "teacher"))
    return student, teacher


def made(models: tuple[LoadedModel, LoadedModel], options: dict[str, Any]) -> DistiLLM:
    student, teacher = models
    method = parse_method("distillm", {"max_new_tokens": 5, **options}, student.shape, teacher.shape)
    assert isinstance(method, DistiLLM)
    method.attach({"": teacher})
    method.moment = Moment(0, STEPS, 10.0, 5)
    return method


def rows(folder: Path, first: int, count: int) -> Batch:
    return collate(Store.open(folder / "store"), np.arange(first, first + count))


def texts(batch: Batch) -> list[tuple[list[int], int]]:
    """Each row's tokens, and how many of them are its prompt."""
    return [
        (batch.input_ids[row, :length].tolist(), prompt)
        for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), prompt_lengths(batch).tolist(), strict=True))
    ]


def test_fresh_responses_come_first_and_kept_ones_as_the_phase_goes_on(folder: Path, models: tuple[LoadedModel, LoadedModel]) -> None:
    method, known = made(models, {"share": 0.8, "capacity": 6}), []
    given = rows(folder, 0, 4)
    kinds = []
    for step in range(STEPS):
        method.moment = Moment(step, STEPS, 10.0, 5)
        drawn, full = float(method.moment.draws("distillm", step).random()), int(method.kept) >= 6
        expected = 0 if drawn >= 0.8 else 1 if not full or drawn < 0.8 * (1 - step / STEPS) else 2
        assert method.decided() == (expected, len(known))
        found = method.rewrite(given, models[0])
        kinds.append(expected)
        if expected == 0:
            assert found is given
        elif expected == 1:
            assert [text[:prompt] for text, prompt in texts(found)] == [text[:prompt] for text, prompt in texts(given)]
            known += texts(found)
        else:
            assert all(text in known[-6:] for text in texts(found))
            assert torch.equal(found.rows, given.rows)
    assert {kinds.count(kind) > 4 for kind in range(3)} == {True}
    assert kinds[-8:].count(1) < kinds[:8].count(1)


def test_responses_are_kept_in_the_order_of_their_rows_and_long_ones_are_not(folder: Path, models: tuple[LoadedModel, LoadedModel]) -> None:
    method, store, expected, long = made(models, {"share": 1.0, "capacity": 50, "longest": 9}), Store.open(folder / "store"), [], 0
    for step in range(3):
        method.moment = Moment(step, STEPS, 10.0, 5)
        numbers = np.arange(4 * step, 4 * step + 4)
        fresh = texts(method.rewrite(collate(store, numbers[[2, 0, 3, 1]]), models[0]))
        fresh = [fresh[place] for place in (1, 3, 0, 2)]
        expected += [one for one in fresh if len(one[0]) <= 9]
        long += sum(len(text) > 9 for text, _ in fresh)
    assert long
    assert int(method.kept) == len(expected) == 12 - long
    assert kept(method)[: len(expected)] == expected


def kept(method: DistiLLM) -> list[tuple[list[int], int]]:
    lengths = method.kept_lengths.tolist()
    return [(method.kept_ids[place, :length].tolist(), int(method.kept_prompts[place])) for place, length in enumerate(lengths)]


def test_a_ring_that_is_full_loses_its_oldest(folder: Path, models: tuple[LoadedModel, LoadedModel]) -> None:
    method, fresh = made(models, {"share": 1.0, "capacity": 3, "longest": 24}), []
    for step, first in enumerate((0, 2)):
        method.moment = Moment(step, STEPS, 10.0, 5)
        found = method.rewrite(rows(folder, first, 2), models[0])
        fresh += texts(found)
    assert kept(method) == [fresh[3], fresh[1], fresh[2]]
    assert int(method.kept) == 4
    many = made(models, {"share": 1.0, "capacity": 3, "longest": 24})
    assert [text for text, _ in texts(many.rewrite(rows(folder, 0, 5), models[0]))]
    assert int(many.kept) == 3


def test_a_rising_validation_loss_raises_the_share(folder: Path, models: tuple[LoadedModel, LoadedModel]) -> None:
    method = made(models, {"every": 2})
    assert method.reads_meta
    assert method.decided() == (0, 0)
    for step, (loss, share) in enumerate(
        [(3.0, 0.0), (3.0, 0.0), (3.05, 0.0), (2.0, 0.0), (9.0, 0.0), (0.65, 0.1), (4.9, 0.1), (5.0, 0.2)]
    ):
        method.moment = Moment(step, STEPS, 10.0, 5)
        method.judged += torch.tensor([4 * loss, 4.0])
        method.learned({})
        assert float(method.phi) == pytest.approx(share), step
    assert float(method.before) == pytest.approx(4.95)


def test_the_share_ends_at_one_and_an_epoch_lies_between_looks(models: tuple[LoadedModel, LoadedModel]) -> None:
    method = made(models, {})
    looks = []
    for step in range(140):
        method.moment = Moment(step, 200, 10.5, 5)
        method.judged += torch.tensor([float(step), 1.0])
        method.learned({})
        if not method.judged.any():
            looks.append(step)
    assert looks == list(range(9, 140, 10))
    assert float(method.phi) == 1.0


def test_the_validation_loss_is_that_of_held_out_words_without_dropout(folder: Path, models: tuple[LoadedModel, LoadedModel]) -> None:
    method, (student, _) = made(models, {"every": 3}), models
    held_out = [rows(folder, 24, 3), rows(folder, 27, 4)]
    student.model.train()
    for batch in held_out:
        method.prepare(Step(student, rows(folder, 0, 2), {}, (batch, {})))
        assert student.model.training
    student.model.eval()
    total, words = 0.0, 0
    for batch in held_out:
        assert batch.token_labels is not None
        with torch.no_grad():
            logits = dense(run(student, batch, [LOGITS]), LOGITS).double()
        for row, label in zip(logits.tolist(), batch.token_labels[batch.labelled].tolist(), strict=True):
            total -= row[label] - math.log(sum(map(math.exp, row)))
            words += 1
    assert method.judged.tolist() == pytest.approx([total, words], rel=1e-5)
    given = made(models, {"share": 0.5})
    assert not given.reads_meta
    given.prepare(Step(student, held_out[0], {}, (held_out[0], {})))
    given.learned({})
    assert not given.judged.any()
