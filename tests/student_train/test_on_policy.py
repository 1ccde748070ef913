"""Methods that write the responses they learn from, in runs: resumed, on two ranks, beside others; and from a store, where none does."""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from two_ranks import launched

from online.collate import collate
from online.models import ModelSpec, load_model
from online.rollout import has_prompt, prompt_lengths
from store.reader import Store
from student_train import checkpoint
from student_train.bundle import Bundle
from student_train.journal import read_journal
from student_train.methods import parse_method
from student_train.methods.gkd import GKD
from student_train.moment import Moment
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import run

CLOCK = ("tokens_per_second", "loader_wait")
METHODS: dict[str, dict[str, Any]] = {
    "gkd": {"lmbda": 0.7, "max_new_tokens": 6},
    "minillm": {"max_new_tokens": 6},
    "minillm unmixed": {"max_new_tokens": 5, "mix": 0.0},
    "distillm": {"share": 0.9, "capacity": 20, "longest": 24, "max_new_tokens": 6},
    "distillm2": {"max_new_tokens": 6},
    "distillm adaptive": {"every": 1, "capacity": 20, "longest": 24, "max_new_tokens": 6},
}


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_answers", Path(__file__).with_name("tiny_answers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of prompts and responses, a teacher with six words more than its tokenizer, and a student."""
    made: Path = tmp_path_factory.mktemp("answers")
    tiny.write_model(made / "teacher", tiny.llama(30, hidden_size=24, num_hidden_layers=3), 1)
    tiny.write_model(made / "student", tiny.gpt2(resid_pdrop=0.1), 2)
    tiny.write_rows(made)
    return made


def spec(name: str) -> dict[str, Any]:
    return {"name": name.partition(" ")[0], "options": METHODS[name]}


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in history]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(name: str, tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    bundle, whole = tiny.train_once(folder, tmp_path / "whole", [spec(name)])
    weights = {key: tensor.clone() for key, tensor in bundle.state_dict().items()}
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-3", tmp_path / "resumed" / "checkpoints" / "checkpoint-3")
    bundle, resumed = tiny.train_once(folder, tmp_path / "resumed", [spec(name)])
    assert resumed.resumed == 3
    assert timeless(resumed.history) == timeless(whole.history)
    assert len({entry["loss"] for entry in whole.history if "loss" in entry}) == 6
    for key, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_train_as_one(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    still = tmp_path / "still"
    shutil.copytree(folder, still)
    tiny.write_model(still / "student", tiny.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 2)
    runs = [{"folder": str(still), "output": str(tmp_path / name), "methods": [spec(name)]} for name in METHODS]
    done = launched(str(tiny.__file__), json.dumps(runs))
    assert done.returncode == 0, done.stderr[-4000:]
    for name in METHODS:
        bundle, alone = tiny.train_once(still, tmp_path / "alone" / name, [spec(name)])
        together = timeless(read_journal(tmp_path / name / "metrics.jsonl"))
        for entry, expected in zip(together, timeless(alone.history), strict=True):
            assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), (name, entry["step"])
        for rank in (0, 1):
            saved = checkpoint.load(tmp_path / name / "checkpoints" / "checkpoint-6" / f"buffers_{rank}.safetensors")
            for key, tensor in checkpoint.method_buffers(bundle.methods).items():
                if not key.endswith("judged"):  # each rank's own, summed when it is looked at
                    torch.testing.assert_close(saved[key], tensor, rtol=1e-4, atol=1e-4)


def test_without_its_own_responses_gkd_learns_from_a_store_what_it_learns_online(tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    methods = [{"name": "gkd", "options": {"lmbda": 0.0}}]
    made, stored = tiny.recipe(folder, tmp_path / "online", methods), stored_recipe(tiny, folder, tmp_path, methods)
    run(made, ["test"])
    run(stored, ["test"])
    curves = [timeless(read_journal(one.output / "only" / "metrics.jsonl")) for one in (made, stored)]
    assert curves[0] == curves[1]
    assert len({entry["gkd/words"] for entry in curves[0]}) == 4


def steps_of(method: GKD, steps: int) -> list[bool]:
    found = []
    for step in range(steps):
        method.moment = Moment(step, steps, 1.0, 0)
        found.append(method.decided() == (1,))
    return found


def test_a_draw_for_each_step_decides_who_wrote_its_responses() -> None:
    causal = load_shapes()
    written = steps_of(GKD(*causal, lmbda=0.3), 2000)
    assert np.mean(written) == pytest.approx(0.3, abs=0.035)
    assert not any(steps_of(GKD(*causal, lmbda=0.0), 50))
    assert all(steps_of(GKD(*causal, lmbda=1.0), 50))
    rising = parse_method("gkd", {"lmbda": {"kind": "linear", "start": 0.0, "end": 1.0}}, *causal)
    assert isinstance(rising, GKD)
    grown = steps_of(rising, 2000)
    assert np.mean(grown[:500]) == pytest.approx(0.125, abs=0.05)
    assert np.mean(grown[1500:]) == pytest.approx(0.875, abs=0.05)


def load_shapes() -> tuple[Any, Any]:
    from store.shape import ModelShape

    sizes = dict(layers=2, width=16, heads=4, kv_heads=2, head_width=4, vocab=24, causal=True, pre_norm=True, windows=(None, None))
    shape = ModelShape.model_validate({"family": "llama", "head": "causal_lm", **sizes})
    return shape, shape


@pytest.fixture(scope="module")
def bundle_of(folder: Path) -> Callable[..., Bundle]:
    """Methods around the student, with its teacher, at step 2 of 10."""

    def build(*methods: tuple[str, dict[str, Any]]) -> Bundle:
        student, teacher = (load_model(ModelSpec(model=folder / name, head="causal_lm")) for name in ("student", "teacher"))
        built = [(MethodSpec(name=name), parse_method(name, options, student.shape, teacher.shape)) for name, options in methods]
        bundle = Bundle(student, built)
        bundle.attach({"": teacher})
        bundle.begin(Moment(2, 10, 5.0, 3))
        return bundle

    return build


def test_labels_are_learned_from_rows_as_they_are_and_never_from_written_ones(bundle_of: Callable[..., Bundle], folder: Path) -> None:
    batch = collate(Store.open(folder / "store"), np.arange(6))
    for lmbda, expected in ((0.0, {"gkd/words", "lm_loss/words"}), (1.0, {"gkd/words"})):
        bundle = bundle_of(("gkd", {"lmbda": lmbda, "max_new_tokens": 5}), ("lm_loss", {}))
        rows = bundle.rewrite(batch)
        assert bundle.counts(rows, True).keys() == expected
        assert (rows is batch) == (lmbda == 0)
        assert prompt_lengths(rows).tolist() == prompt_lengths(batch).tolist()


def test_given_and_written_responses_stand_side_by_side(bundle_of: Callable[..., Bundle], folder: Path) -> None:
    batch = collate(Store.open(folder / "store"), np.arange(6))
    bundle = bundle_of(("distillm2", {"max_new_tokens": 30}), ("lm_loss", {}))
    rows = bundle.rewrite(batch)
    assert rows.written is not None
    assert rows.written.tolist() == [False, True] * 6
    assert rows.rows.tolist() == [row for row in batch.rows.tolist() for _ in range(2)]
    assert rows.groups.tolist() == [group for group in batch.groups.tolist() for _ in range(2)]
    prompts, lengths = prompt_lengths(rows).tolist(), rows.lengths.tolist()
    assert batch.token_labels is not None
    assert rows.token_labels is not None
    for row, prompt in enumerate(prompt_lengths(batch).tolist()):
        length = int(batch.lengths[row])
        assert prompts[2 * row : 2 * row + 2] == [prompt, prompt]
        assert lengths[2 * row] == length
        for of in ("input_ids", "token_labels"):
            assert torch.equal(getattr(rows, of)[2 * row, :length], getattr(batch, of)[row, :length])
        assert torch.equal(rows.input_ids[2 * row + 1, :prompt], batch.input_ids[row, :prompt])
        assert (rows.token_labels[2 * row : 2 * row + 2, max(lengths[2 * row : 2 * row + 2]) :] == -100).all()
    counts = bundle.counts(rows, True)
    assert counts == {"distillm2/given": int(batch.labelled.sum()), "distillm2/written": int(rows.labelled[1::2].sum())}


@pytest.mark.parametrize("name", ["gkd", "minillm", "distillm", "distillm2"])
def test_plain_text_stays_as_it_is(name: str, bundle_of: Callable[..., Bundle], folder: Path) -> None:
    batch = collate(Store.open(folder / "store"), np.arange(6))
    words = batch.input_ids.roll(-1, 1).where(batch.mask.roll(-1, 1) & batch.mask, torch.tensor(-100))
    words[:, -1] = -100
    plain = dataclasses.replace(batch, token_labels=words)
    assert not has_prompt(plain).any()
    share = {"gkd": {"lmbda": 1.0}, "minillm": {}, "distillm": {"share": 1.0}, "distillm2": {}}[name]
    bundle = bundle_of((name, {**share, "max_new_tokens": 5}), ("lm_loss", {}))
    assert bundle.rewrite(plain) is plain
    counts = bundle.counts(plain, True)
    assert counts["lm_loss/words"] == int((words >= 0).sum())
    assert {term for term, count in counts.items() if not count} == {
        "minillm": {"minillm/single", "minillm/long"}, "distillm2": {"distillm2/written"}
    }.get(name, set())  # fmt: skip


def test_what_does_not_fit_is_refused(bundle_of: Callable[..., Bundle], tiny: ModuleType, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gkd and distillm both write the rows of a step"):
        bundle_of(("gkd", {}), ("distillm", {}))
    shape, _ = load_shapes()
    masked = shape.model_copy(update={"head": "masked_lm", "causal": False})
    with pytest.raises(
        ValueError, match="gkd: responses are written word by word: expected a teacher with head causal_lm, found masked_lm"
    ):
        parse_method("gkd", {}, shape, masked)
    with pytest.raises(ValueError, match=r"lmbda: expected numbers 0 to 1, found 1\.5"):
        parse_method("gkd", {"lmbda": 1.5}, shape, shape)
    with pytest.raises(ValueError, match="every: says how often the validation loss moves the share"):
        parse_method("distillm", {"share": 0.5, "every": 3}, shape, shape)
    with pytest.raises(ValueError, match=r"minillm needs its teacher at work: give the phase teacher: \{online"):
        run(stored_recipe(tiny, folder, tmp_path, [{"name": "minillm"}]), ["test"])
    with pytest.raises(ValueError, match=r"takes rows of up to 64 tokens, found .*; build shorter rows, or give a smaller max_new_tokens"):
        run(tiny.recipe(folder, tmp_path / "long", [{"name": "minillm", "options": {"max_new_tokens": 60}}]), ["test"])
    with pytest.raises(ValueError, match="distillm judges rows by held-out ones; give the phase meta"):
        run(tiny.recipe(folder, tmp_path / "meta", [{"name": "distillm", "options": {}}]), ["test"])


def stored_recipe(tiny: ModuleType, folder: Path, output: Path, methods: list[dict[str, Any]]) -> TrainRecipe:
    """The same phase, learning from the pass of a store."""
    answered = output / "answered"
    shutil.copytree(folder, answered)
    tiny.write_pass(answered)
    changes = {"teacher": "store", "data": [{"store": str(answered / "store"), "pass_name": "tiny"}]}
    made: TrainRecipe = tiny.recipe(folder, output / "stored", methods, changes)
    return made
