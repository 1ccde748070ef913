"""What ZeRO is not given to do, and the net beneath: how a run's steps are looked at before they move weights."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from online.ranks import Ranks
from store.reader import Store
from store.shape import ModelShape
from student_train.bundle import Bundle
from student_train.data import Failed, MicroBatches, Source
from student_train.gradients import PART
from student_train.methods import parse_method
from student_train.micro_batch import MicroBatch
from student_train.recipe import MethodSpec
from student_train.unsafe import check_zero
from student_train.use import check_constant, check_steady, check_used, cut_groups, looked
from student_train.zero import Zero, check_launch

HID = MethodSpec(name="hid_seq", options={"layers": [[1, 2]]})


def shape() -> ModelShape:
    return ModelShape.model_validate(
        dict(family="bert", layers=3, width=8, heads=2, kv_heads=2, head_width=4, vocab=9, causal=False, pre_norm=False, labels=2)
        | dict(windows=(None,) * 3, head="classification")
    )


def refused(tiny: ModuleType, stage: int, method: str, options: dict[str, object] | None = None, **changes: object) -> str:
    """What the phase is refused with; empty if it is not."""
    spec = MethodSpec(name=method, options=options or {})
    phase = tiny.phase(["bert"], [spec], zero={"stage": stage}, **changes)
    try:
        check_zero(phase, [(spec, parse_method(method, dict(spec.options), shape(), shape()))])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("mobilebert", "lets some blocks of the student stand still in some steps"),
        ("rail_kd", "learns other blocks of the student as it goes"),
        ("sid", "learns other blocks of the student as it goes"),
        ("lrc_bert", "takes the gradient of its perturbation by itself"),
        ("rw_kd", "takes gradients in all weights of the student by itself"),
        ("metadistil", "takes gradients in all weights of the student by itself"),
        ("theseus", "lets some blocks of the student stand still in some steps"),
    ],
)
def test_methods_that_need_more_than_a_part_of_the_weights_are_refused_under_stage_3_alone(
    tiny: ModuleType, method: str, reason: str
) -> None:
    found = refused(tiny, 3, method)
    assert reason in found
    assert "give zero a stage of 1 or 2, or leave zero out (DDP)" in found
    assert [refused(tiny, stage, method) for stage in (1, 2)] == ["", ""]


def test_other_methods_are_not_refused(tiny: ModuleType) -> None:
    assert [refused(tiny, 3, method) for method in ("kd", "hid_seq", "task_loss", "tinybert", "rkd")] == [""] * 5
    assert refused(tiny, 3, "lrc_bert", {"perturbation": False}) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"fp16": True}}, "fp16 under zero would scale the loss of each parameter group by itself; give bf16"),
        ({"trainer": {"optim": "adafactor"}}, "expected one of adamw_torch, adamw_torch_fused, sgd, rmsprop"),
        ({"trainer": {"torch_empty_cache_steps": 3}}, "torch_empty_cache_steps has no effect under zero"),
        ({"gradient_norms": 1}, "gradient_norms reads whole gradients"),
        ({"student": {"random": {}, "dtype": "bfloat16"}}, "expected a student of dtype float32"),
    ],
)
def test_arguments_that_zero_cannot_follow_are_refused(tiny: ModuleType, changes: dict[str, Any], message: str) -> None:
    assert message in refused(tiny, 1, "kd", **changes)


def test_weights_are_offloaded_only_where_they_lie_in_parts() -> None:
    assert Zero(stage=3, offload_parameters="cpu").offload_optimizer == "none"
    with pytest.raises(ValueError, match="offload_parameters needs stage: 3, which cuts weights into parts; found stage 2"):
        Zero(stage=2, offload_parameters="cpu")


def test_one_process_by_itself_is_told_how_to_launch_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"phase 'p': zero shares the student out.* torchrun --standalone --nproc-per-node=RANKS"):
        check_launch("phase 'p'")


@pytest.fixture
def turning(tiny: ModuleType, taught: Path, untaught: Path) -> tuple[Bundle, MicroBatches]:
    """A student with a method that uses other weights turn and turn about, and one for rows with a teacher alone."""
    stores = [Store.open(path) for path in (taught, untaught)]
    student = tiny.model(1, layers=2, width=16)
    hid = parse_method(HID.name, dict(HID.options), student.shape, stores[0].manifest.passes["bert"].shape)
    bundle = Bundle(student, [(HID, hid), (MethodSpec(name="turns"), tiny.Turns(16)), (MethodSpec(name="bank"), tiny.Bank(16))])
    teacher = tiny.StoredTeacher(stores[0], "bert", frozenset(key.of("") for key in hid.teacher_keys))
    sources = [Source(stores[0], teacher), Source(stores[1], None)]
    return bundle, MicroBatches(sources, batch_rows=8, accumulation=1, steps=12, epochs=None, seed=3)


def read(item: MicroBatch | Failed) -> MicroBatch:
    assert isinstance(item, MicroBatch)
    return item


def test_looking_ahead_finds_what_is_used_when_and_leaves_nothing_behind(turning: tuple[Bundle, MicroBatches]) -> None:
    bundle, data = turning
    buffers = {name: buffer.clone() for name, buffer in bundle.named_buffers()}
    random_state, names = torch.get_rng_state(), [name for name, _ in bundle.named_parameters()]
    looks = looked(bundle, data, read, 3, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in bundle.named_buffers())
    assert all(weight.grad is None for weight in bundle.parameters())
    assert len(looks) == 10  # five moments (steps 0, 2, 5, 8, 11) of two sources
    query, projection = (
        names.index("student.bert.encoder.layer.1.attention.self.query.weight"),
        names.index("methods.hid_seq.projection.weight"),
    )
    scale, never = names.index("methods.turns.scale"), names.index("student.classifier.weight")
    # of the two sources, in the order in which they come by, one has a teacher
    assert [sorted(projection in look for look in looks[n : n + 2]) for n in range(0, 10, 2)] == [[False, True]] * 5
    assert [query in look for look in looks] == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
    assert [scale in look for look in looks] == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2
    assert not any(never in look for look in looks)


def test_parameter_groups_are_cut_by_part_and_use_and_keep_their_options(turning: tuple[Bundle, MicroBatches]) -> None:
    bundle, data = turning
    looks = looked(bundle, data, read, 3, torch.device("cpu"))
    names = {id(weight): name for name, weight in bundle.named_parameters()}
    flat = [weight for weight in bundle.parameters() if weight.dim() == 1]
    deep = [weight for weight in bundle.parameters() if weight.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}])
    cut_groups(optimizer, bundle, looks)
    found = [([names[id(weight)] for weight in group["params"]], group["weight_decay"], group[PART]) for group in optimizer.param_groups]
    assert sorted(name for group, _, _ in found for name in group) == sorted(names.values())
    query = "student.bert.encoder.layer.1.attention.self.query."
    assert ([f"{query}weight"], 0.1, 2) in found
    assert ([f"{query}bias"], 0.0, 2) in found
    assert (["methods.turns.scale"], 0.0, None) in found
    for group, _, _ in found:
        numbers = [list(names.values()).index(name) for name in group]
        assert all(len({number in look for number in numbers}) == 1 for look in looks)


def test_a_run_whose_steps_use_different_weights_is_refused_where_that_is_not_allowed(turning: tuple[Bundle, MicroBatches]) -> None:
    bundle, data = turning
    looks = looked(bundle, data, read, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"stage 3: some steps learn \S+ and others do not .* give zero a stage of 1 or 2"):
        check_constant(bundle, looks)
    check_constant(bundle, looks[:1] * 3)


def test_a_group_is_used_as_a_whole_or_not_at_all() -> None:
    names, groups, ranks = ["a", "b", "c", "d"], [["a", "b"], ["c"], ["d"]], Ranks(60)
    assert check_used([[3, 1], [1, 0]], groups, names, ranks, 7) == [True, False, True]
    assert check_used([[]], groups, names, ranks, 7) == [False, False, False]
    with pytest.raises(ValueError, match=r"step 7: b got a gradient and a did not, .* nothing of this step is kept; leave zero out"):
        check_used([[1, 2]], groups, names, ranks, 7)


def test_every_backward_pass_must_use_the_same_weights_where_an_old_gradient_would_be_added_to() -> None:
    check_steady([[2, 0], [0, 2]], frozenset({0, 2}), ["a", "b", "c"], 7)
    for passes in ([[0, 2], [0]], [[0], [0, 2]], [[0, 1, 2]]):
        with pytest.raises(ValueError, match=r"step 7 learns other weights than the first ones did \([bc]\).* give zero a stage of 1 or 2"):
            check_steady(passes, frozenset({0, 2}), ["a", "b", "c"], 7)


DIFFERING = """
from torch import distributed
from online.ranks import Ranks
from student_train.use import check_used

distributed.init_process_group("gloo")
ranks = Ranks(60)
assert check_used([[1], [0]], [["a", "b"]], ["a", "b"], ranks, 3) == [True]
try:
    check_used([[ranks.number, 1 - ranks.number]], [["a", "b"]], ["a", "b"], ranks, 4)
except ValueError as error:
    print(error, flush=True)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_that_went_backward_through_weights_in_another_order_are_told_on_both(tmp_path: Path) -> None:
    (tmp_path / "differing.py").write_text(DIFFERING, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, str(tmp_path / "differing.py")], timeout=200, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4: ranks went backward through different weights") == 2
    assert all(f"(this is rank {number})" in done.stdout for number in range(2))
