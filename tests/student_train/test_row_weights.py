"""Runs in which some rows deserve less: they get it. Such runs stopped in the middle, and on two ranks."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_ranks import launched

sys.path.insert(0, str(Path(__file__).parent))

import tiny_domains

from online.batch import Batch, Features
from student_train import checkpoint
from student_train.journal import read_journal
from student_train.methods.hrkd import HRKD
from student_train.methods.meta_kd import MetaKD
from student_train.methods.rw_kd import RWKD
from student_train.recipe import MethodSpec

BLOCKS = {"layers": [[1, 1], [2, 2]], "attention": 0}
METHODS: dict[str, dict[str, Any]] = {
    "rw_kd": {"temperature": 2},
    "meta_kd": {"domains": 3, **BLOCKS},
    "hrkd": {"domains": 3, "graph_heads": 2, **BLOCKS},
}
CONSTANT = {"save_strategy": "no", "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
CLOCK = ("tokens_per_second", "loader_wait")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 rows to train on, a third of them of a domain whose labels are random and whose teacher answers with noise."""
    return tiny_domains.write(tmp_path_factory.mktemp("domains") / "store")


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows to train on, of which 40 % have the wrong label; the teacher is right on all, and so are 100 held-out labels."""
    return tiny_domains.write(tmp_path_factory.mktemp("flipped") / "store", rows=300, flipped=0.4, foreign=False)


def spec(name: str, changed: dict[str, Any] | None = None) -> MethodSpec:
    return MethodSpec(name=name, options=METHODS[name] | (changed or {}))


def weights_of(
    method: MethodSpec, store: Path, output: Path, steps: int, rows: int, read: Callable[[nn.Module, Features, Features, Batch], Tensor]
) -> list[tuple[Batch, Tensor]]:
    """The rows of each step of a run and what ``read`` says of their weights, after the step's own loss was made."""
    bundle, built = tiny_domains.build(method, store, dropout=0.0)
    found: list[tuple[Batch, Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Features, Features, Batch], terms: object) -> None:
        with torch.no_grad():
            found.append((arguments[2], read(module, *arguments)))

    built.register_forward_hook(note)
    tiny_domains.run(bundle, built, store, output, steps=steps, batch_rows=rows, trainer=CONSTANT)
    assert len(found) == steps
    return found


def means(found: list[tuple[Batch, Tensor]], wanted: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
    """[L] mean weight of the rows that are ``wanted``, and of the others."""
    weights = torch.cat([weight_LB for _, weight_LB in found], 1)
    chosen = torch.cat([wanted(batch) for batch, _ in found])
    assert chosen.float().mean() > 0.3
    assert (~chosen).float().mean() > 0.2
    return weights[:, chosen].mean(1), weights[:, ~chosen].mean(1)


def labelled_right(batch: Batch) -> Tensor:
    assert batch.row_labels is not None
    return tiny_domains.classes(batch) == batch.row_labels.long()


def at_home(batch: Batch) -> Tensor:
    assert batch.domains is not None
    return batch.domains != tiny_domains.FOREIGN


def test_rows_with_wrong_labels_lose_their_label_and_keep_their_teacher(flipped: Path, tmp_path: Path) -> None:
    def read(method: nn.Module, student: Features, teacher: Features, batch: Batch) -> Tensor:
        assert isinstance(method, RWKD)
        assert method.weight_K is not None
        return method.weight_K.view(2, -1)

    found = weights_of(MethodSpec(name="rw_kd"), flipped, tmp_path, 40, 32, read)
    for _, weight_2B in found:
        assert float(weight_2B.mean()) == pytest.approx(1, rel=1e-4)
    (label, teacher), (wrong_label, its_teacher) = means(found[10:], labelled_right)
    assert label > 1.6 * wrong_label  # 2.1
    assert 0.8 < its_teacher / teacher < 1.3
    assert its_teacher > 1.5 * wrong_label  # 2.1


def test_rows_of_a_domain_whose_teacher_is_wrong_and_unlike_the_others_count_less(store: Path, tmp_path: Path) -> None:
    def read(method: nn.Module, student: Features, teacher: Features, batch: Batch) -> Tensor:
        assert isinstance(method, MetaKD)
        return method.row_weights(teacher, batch)[None]

    found = weights_of(spec("meta_kd"), store, tmp_path, 8, 20, read)
    (home,), (foreign,) = means(found, at_home)
    assert home > 1.5 * foreign  # 0.85 and 0.46
    lowest_home = min(float(weight[0][at_home(batch)].min()) for batch, weight in found[2:])
    assert lowest_home > float(foreign)


def test_domains_that_cannot_be_learned_go_to_nothing(store: Path, tmp_path: Path) -> None:
    def read(method: nn.Module, student: Features, teacher: Features, batch: Batch) -> Tensor:
        assert isinstance(method, HRKD)
        return method.row_weights(student, batch)

    for published in (False, True):
        found = weights_of(spec("hrkd", {"published": published}), store, tmp_path / str(published), 40, 20, read)
        home, foreign = means(found[30:], at_home)
        assert len(home) == 3
        if published:  # no gradient tells domains apart
            assert ((home - 1).abs() < 0.02).all()
            assert ((foreign - 1).abs() < 0.02).all()
        else:
            assert (foreign < 0.3).all()
            assert (home > 1.3).all()


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in history]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(name: str, store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "trainer": {"save_steps": 4, "save_total_limit": 9}, "accumulation": 2}
    whole_bundle, method = tiny_domains.build(spec(name), store)
    whole = tiny_domains.run(whole_bundle, method, store, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-4", tmp_path / "resumed" / "checkpoints" / "checkpoint-4")
    bundle, method = tiny_domains.build(spec(name), store)
    resumed = tiny_domains.run(bundle, method, store, tmp_path / "resumed", **options)
    assert resumed.resumed == 4
    assert timeless(resumed.history) == timeless(whole.history)
    assert len({entry["loss"] for entry in whole.history if "loss" in entry}) == 8
    for key, tensor in whole_bundle.state_dict().items():
        assert torch.equal(bundle.state_dict()[key], tensor), key


def test_held_out_rows_need_no_teacher_and_change_nothing_by_having_one(store: Path, tmp_path: Path) -> None:
    losses = []
    for meta_pass in (None, "teacher"):
        bundle, method = tiny_domains.build(spec("rw_kd"), store)
        result = tiny_domains.run(bundle, method, store, tmp_path / str(meta_pass), meta_pass, steps=2, trainer={"save_strategy": "no"})
        losses.append([entry["loss"] for entry in result.history if "loss" in entry])
    assert losses[0] == losses[1]


def test_recomputed_activations_and_half_precision_give_the_same_weights(store: Path, tmp_path: Path) -> None:
    found = {}
    for name, trainer in {"plain": {}, "recomputed": {"gradient_checkpointing": True}, "half": {"bf16": True}}.items():
        bundle, method = tiny_domains.build(spec("rw_kd"), store, dropout=0.0)
        tiny_domains.run(bundle, method, store, tmp_path / name, steps=2, batch_rows=16, trainer={"save_strategy": "no", **trainer})
        assert isinstance(method, RWKD)
        assert method.weight_K is not None
        found[name] = method.weight_K
    torch.testing.assert_close(found["recomputed"], found["plain"], rtol=1e-3, atol=1e-4)
    assert float((found["half"] - found["plain"]).abs().mean()) < 0.15 * float(found["plain"].mean())


@pytest.mark.slow
def test_two_ranks_train_as_one(store: Path, tmp_path: Path) -> None:
    rate = {"optim": "sgd", "learning_rate": 0.05}  # Adam would step along rounding errors where there is no slope
    options: dict[str, Any] = {"steps": 6, "batch_rows": 12, "trainer": {"save_steps": 6, **rate}}
    runs = [
        {"method": spec(name).model_dump(), "store": str(store), "output": str(tmp_path / name), "dropout": 0.0, **options}
        for name in METHODS
    ]
    done = launched(str(tiny_domains.__file__), json.dumps(runs))
    assert done.returncode == 0, done.stderr[-4000:]
    for name in METHODS:
        bundle, method = tiny_domains.build(spec(name), store, dropout=0.0)
        alone = tiny_domains.run(bundle, method, store, tmp_path / "alone" / name, **options)
        together = timeless(read_journal(tmp_path / name / "metrics.jsonl"))
        for entry, expected in zip(together, timeless(alone.history), strict=True):
            assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), (name, entry["step"])
        saved = checkpoint.load(tmp_path / name / "checkpoints" / "checkpoint-6" / "model.safetensors")
        for key, tensor in checkpoint.weights(bundle).items():
            torch.testing.assert_close(
                saved[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key, name=name: f"{name} {key}: {text}"
            )
