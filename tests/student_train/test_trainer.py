"""The loop: what a step's loss is, whatever cuts it into pieces, and what stops it."""

import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from online.batch import Batch, Features, dense
from online.collate import collate
from online.teacher import LiveTeacher
from store.errors import CorruptShard
from store.features import FeatureKey
from store.reader import Store
from student_train.bundle import Bundle
from student_train.data import MicroBatches, Source
from student_train.methods.base import Method, Terms
from student_train.recipe import MethodSpec
from student_train.train import train
from student_train.trainer import DistillationTrainer

KD = MethodSpec(name="kd")
HID = MethodSpec(name="hid_seq", weight=0.5, options={"layers": [[1, 2]]})
TASK = MethodSpec(name="task_loss")
FIRST = FeatureKey("hidden", 2, "first")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def losses(history: list[dict[str, float]], name: str = "loss") -> list[float]:
    return [entry[name] for entry in history if name in entry]


def test_the_overridden_trainer_methods_exist_with_the_same_parameters() -> None:
    ours = [name for name, value in vars(DistillationTrainer).items() if inspect.isfunction(value) and hasattr(Trainer, name)]
    assert {"get_train_dataloader", "get_batch_samples", "compute_loss", "log", "evaluate", "_save_checkpoint"} <= set(ours)
    for name in set(ours) - {"__init__"}:
        assert list(inspect.signature(getattr(DistillationTrainer, name)).parameters) == list(
            inspect.signature(getattr(Trainer, name)).parameters
        ), name
    private = {name for name in vars(DistillationTrainer) if name.startswith("_") and not name.startswith("__")} - set(ours)
    assert private == {"_window_logs", "_keep_best", "_publish", "_note_norms", "_probes"}, (
        "private names that are ours alone; any other must exist in Trainer"
    )
    for used in ("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "is_world_process_zero", "_load_rng_state"):
        assert hasattr(Trainer, used)


def test_the_loss_of_a_step_is_the_mean_over_all_its_rows(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, result = tiny.run([taught], tmp_path, methods=[TASK], bank=False, dropout=0.0, steps=1, accumulation=4)
    student = tiny.model(1, layers=2, width=16, dropout=0.0)
    store = Store.open(taught)
    data = MicroBatches([Source(store, None)], batch_rows=8, accumulation=1, steps=1, epochs=None, seed=3)
    batch = data[0].batch
    logits = student.model.double().eval()(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
    expected = F.cross_entropy(logits, batch.row_labels)
    assert losses(result.history)[0] == pytest.approx(expected.item(), abs=1e-6)


def test_accumulation_and_loader_processes_do_not_change_the_losses(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    runs = [
        tiny.run([taught], tmp_path / str(number), methods=[KD, HID], bank=False, dropout=0.0, accumulation=accumulation, workers=workers)
        for number, (accumulation, workers) in enumerate([(1, 0), (2, 2), (8, 0)])
    ]
    for bundle, result in runs[1:]:
        assert losses(result.history) == pytest.approx(losses(runs[0][1].history), abs=1e-6)
        for name, tensor in runs[0][0].state_dict().items():
            torch.testing.assert_close(bundle.state_dict()[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_spawned_loader_processes_give_the_same_losses(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, alone = tiny.run([taught], tmp_path / "a", methods=[HID], steps=2)
    _, spawned = tiny.run(
        [taught], tmp_path / "b", methods=[HID], steps=2, workers=1, trainer={"dataloader_multiprocessing_context": "spawn"}
    )
    assert losses(spawned.history) == losses(alone.history)


def test_a_live_teacher_gives_the_losses_of_its_store_and_never_travels_to_loader_processes(
    tiny: ModuleType, taught: Path, tmp_path: Path
) -> None:
    _, stored = tiny.run([taught], tmp_path / "a", methods=[KD, HID], bank=False, steps=3, workers=1)
    student = tiny.model(1, layers=2, width=16)
    loaded = tiny.model(7, layers=3, width=24)
    torch.manual_seed(2)
    methods = [(spec, tiny.parse_method(spec.name, dict(spec.options), student.shape, loaded.shape)) for spec in (KD, HID)]
    wanted = methods[0][1].teacher_keys | methods[1][1].teacher_keys
    source = Source(Store.open(taught), LiveTeacher(loaded, wanted))
    plan = tiny.phase([None], [KD, HID], steps=3, workers=1)
    live = train(Bundle(student, methods), [source], plan, tmp_path / "b", 3)
    assert losses(live.history) == losses(stored.history)
    data = MicroBatches([source], batch_rows=8, accumulation=1, steps=3, epochs=None, seed=3)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.sources[0].teacher is None
    assert copy[1].taught
    assert torch.equal(copy[1].batch.input_ids, data[1].batch.input_ids)


def test_rows_without_features_train_the_methods_that_need_none(tiny: ModuleType, taught: Path, untaught: Path, tmp_path: Path) -> None:
    _, result = tiny.run([taught, untaught], tmp_path, methods=[HID, TASK], bank=False, epochs=1, steps=None)
    with_teacher = [entry for entry in result.history if "hid_seq/hidden" in entry]
    assert len(with_teacher) == 6
    assert len(result.history) == 10
    assert all("task_loss/hard" in entry for entry in result.history)
    order = MicroBatches(
        [Source(Store.open(taught), None), Source(Store.open(untaught), None)], batch_rows=8, accumulation=1, steps=None, epochs=1, seed=3
    ).order
    assert [entry["step"] for entry in with_teacher] == [step + 1 for step in range(10) if order.step(step)[0] == 0]


def test_a_method_that_takes_no_part_in_a_step_is_left_alone(tiny: ModuleType, taught: Path, untaught: Path, tmp_path: Path) -> None:
    sources = [Source(Store.open(store), None) for store in (taught, untaught)]
    starts = (MicroBatches(sources, batch_rows=8, accumulation=1, steps=1, epochs=None, seed=seed)[0].source for seed in range(99))
    seed = list(starts).index(1)  # whose first step reads rows without features
    stores = [taught, untaught]
    bundle, _ = tiny.run(stores, tmp_path, methods=[HID, TASK], bank=False, steps=1, seed=seed, trainer={"weight_decay": 0.5})
    torch.manual_seed(2)
    fresh = tiny.parse_method("hid_seq", dict(HID.options), bundle.loaded.shape, Store.open(taught).manifest.passes["bert"].shape)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(bundle.methods["hid_seq"].state_dict()[name], tensor)


@pytest.mark.parametrize("options", [{"batch_rows": 9, "accumulation": 2}, {"batch_rows": 2, "accumulation": 4}])
def test_a_batch_that_cannot_be_shared_out_is_refused(tiny: ModuleType, taught: Path, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"batch_rows: expected a multiple of {options['accumulation']} .*found {options['batch_rows']}"):
        tiny.run([taught], tmp_path, methods=[HID], **options)


def test_two_methods_of_one_name_have_terms_of_their_own(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, result = tiny.run([taught], tmp_path, methods=[HID, HID], bank=False, dropout=0.0, steps=1)
    entry = result.history[0]
    assert entry["loss"] == pytest.approx(entry["hid_seq/hidden"] + entry["hid_seq-2/hidden"], abs=1e-6)


class Probe(Method):
    """Calls ``act`` with the student's CLS state; its answer is the term."""

    def __init__(self, act: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__([FIRST])
        self.act, self.calls = act, 0

    def counts(self, batch: Batch) -> Terms:
        return {"probe": torch.tensor(float(len(batch.rows)))}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        self.calls += 1
        return {"probe": self.act(dense(student, FIRST), self.calls)}


def probe(tiny: ModuleType, store: Path, output: Path, act: Callable[[Tensor, int], Tensor], **changes: object) -> Bundle:
    bundle = Bundle(tiny.model(1, layers=2, width=16), [(MethodSpec(name="probe"), Probe(act))])
    train(bundle, [Source(Store.open(store), None)], tiny.phase([None], [TASK], **changes), output, 3)
    return bundle


def test_rows_without_labels_stop_a_run_that_learns_from_labels_alone(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "bare", labelled=False)
    with pytest.raises(ValueError, match=r"step 1: rows of .*bare hold nothing for task_loss/.* to learn from; expected labels"):
        tiny.run([tmp_path / "bare"], tmp_path / "run", methods=[TASK], bank=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_term_and_step(tiny: ModuleType, untaught: Path, tmp_path: Path) -> None:
    def act(first_BW: Tensor, call: int) -> Tensor:
        return first_BW.sum() * (float("nan") if call == 6 else 1.0)

    with pytest.raises(ValueError, match=r"step 6: the loss term probe/probe is nan on rows of .*untaught"):
        probe(tiny, untaught, tmp_path, act)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tiny: ModuleType, untaught: Path, tmp_path: Path) -> None:
    def act(first_BW: Tensor, call: int) -> Tensor:
        return (first_BW * 0 if call == 4 else first_BW).square().sum().sqrt()

    with pytest.raises(ValueError, match=r"step 4: the gradient is (nan|inf) though every loss term is finite"):
        probe(tiny, untaught, tmp_path, act)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_methods_compute_in_float32_under_bf16(tiny: ModuleType, untaught: Path, tmp_path: Path) -> None:
    seen = set()

    def act(first_BW: Tensor, call: int) -> Tensor:
        seen.add((first_BW.dtype, (first_BW @ first_BW.T).dtype))
        return first_BW.square().sum()

    bundle = probe(tiny, untaught, tmp_path, act, trainer={"bf16": True}, steps=2)
    assert seen == {(torch.float32, torch.float32)}
    assert {parameter.dtype for parameter in bundle.parameters()} == {torch.float32}
    assert not hasattr(bundle.forward, "__wrapped__")


def test_bf16_losses_are_near_those_of_float32(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, exact = tiny.run([taught], tmp_path / "a", methods=[KD, HID], bank=False, dropout=0.0)
    _, half = tiny.run([taught], tmp_path / "b", methods=[KD, HID], bank=False, dropout=0.0, trainer={"bf16": True})
    assert losses(half.history) == pytest.approx(losses(exact.history), rel=0.02)
    assert losses(half.history) != losses(exact.history)


def test_recomputing_activations_gives_the_same_losses_with_dropout(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    methods = [KD, HID]
    _, plain = tiny.run([taught], tmp_path / "a", methods=methods, bank=False, steps=4)
    bundle, recomputed = tiny.run([taught], tmp_path / "b", methods=methods, bank=False, steps=4, trainer={"gradient_checkpointing": True})
    assert any(getattr(module, "gradient_checkpointing", False) for module in bundle.student.modules())
    assert losses(recomputed.history) == pytest.approx(losses(plain.history), abs=1e-6)


def test_the_best_weights_are_kept_and_patience_ends_the_run(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def evaluate(bundle: Bundle) -> dict[str, float]:
        assert not bundle.training
        seen.append(bundle.student.classifier.weight.detach().clone())
        return {"error": [0.5, 0.3, 0.4, float("nan"), 0.2][len(seen) - 1], "other": 1.0}

    bundle, result = tiny.run(
        [taught], tmp_path, methods=[KD, HID], evaluate=evaluate, best="-error", patience=2, trainer={"eval_steps": 2}
    )
    assert (result.steps, result.best_step, result.best_metric) == (8, 4, 0.3)
    assert torch.equal(bundle.student.classifier.weight, seen[1])
    assert losses(result.history, "eval_error")[:3] == [0.5, 0.3, 0.4]


def test_a_best_metric_that_is_not_measured_is_refused(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best: no metric 'acuracy'; did you mean 'accuracy'"):
        tiny.run([taught], tmp_path, methods=[KD], evaluate=lambda _: {"accuracy": 1.0}, best="acuracy")


def test_evaluation_leaves_training_as_it_was(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    def evaluate(bundle: Bundle) -> dict[str, float]:
        return {"draw": float(torch.rand(7).sum() + np.random.random() + tiny.random.random())}

    _, without = tiny.run([taught], tmp_path / "a", methods=[KD])
    _, measured = tiny.run([taught], tmp_path / "b", methods=[KD], evaluate=evaluate, trainer={"eval_steps": 1})
    assert len(losses(measured.history, "eval_draw")) == 12
    assert losses(measured.history) == losses(without.history)


def test_curves_go_to_json_lines_and_tensorboard(tiny: ModuleType, taught: Path, tmp_path: Path) -> None:
    _, result = tiny.run([taught], tmp_path, methods=[KD, HID], trainer={"report_to": "tensorboard", "logging_steps": 5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    expected = {
        "loss",
        "kd/soft",
        "kd/hard",
        "hid_seq/hidden",
        "bank/bank",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "loader_wait",
    }
    assert expected < set(lines[0])
    assert lines[-1]["epoch"] == 2.0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("train/hid_seq/hidden")] == [4, 5, 8, 10, 12]


def test_a_damaged_shard_is_reported_without_the_traceback_of_a_loader_process(tiny: ModuleType, tmp_path: Path) -> None:
    store = tmp_path / "store"
    tiny.write_rows(store)
    tiny.write_teacher(store)
    shard = next((store / "bert" / "hidden.2" / "all").glob("c.1*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptShard, match=r"expected \d+ bytes, found") as caught:
        tiny.run([store], tmp_path / "out", methods=[HID], workers=1)
    assert "Traceback" not in str(caught.value)


def test_an_item_is_the_rows_of_its_step_share(taught: Path) -> None:
    source = Source(Store.open(taught), None)
    whole = MicroBatches([source], batch_rows=12, accumulation=1, steps=5, epochs=None, seed=0)
    shares = [MicroBatches([source], batch_rows=12, accumulation=3, steps=5, epochs=None, seed=0, rank=r, world=2) for r in range(2)]
    for step in range(5):
        rows = torch.cat([shares[rank][3 * step + slot].batch.rows for slot in range(3) for rank in range(2)])
        assert torch.equal(rows, whole[step].batch.rows)
        assert torch.equal(whole[step].batch.input_ids, collate(source.store, rows.numpy()).input_ids)
    assert (len(whole), len(shares[0])) == (5, 15)


def test_groups_are_never_cut(tiny: ModuleType, tmp_path: Path) -> None:
    source = Source(tiny.write_rows(tmp_path / "store", group=4), None)
    data = MicroBatches([source], batch_rows=16, accumulation=2, steps=6, epochs=None, seed=0)
    for item in range(len(data)):
        groups = data[item].batch.groups.reshape(-1, 4)
        assert len(groups) == 2
        assert torch.equal(groups, groups[:, :1].expand(-1, 4))
    with pytest.raises(ValueError, match=r"multiple of 8 \(groups of 4 rows x 1 ranks x 2 accumulation steps\), found 12"):
        MicroBatches([source], batch_rows=12, accumulation=2, steps=6, epochs=None, seed=0)
