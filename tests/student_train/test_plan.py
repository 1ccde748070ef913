"""What a phase takes with student and teachers side by side: by hand for a small BERT, in which order it advises, what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification

from online.batch import Batch
from online.machines import Machine
from online.models import LoadedModel, ModelSpec, load_model
from online.sharding import Sharding
from store.features import FeatureKey
from store.strict import parse
from student_train.colocation import Memory, Seconds, Way, memory, seconds
from student_train.outline import outline
from student_train.paper import Paper, Rows, feature_bytes, on_paper
from student_train.plan import Wanted, plan, rows_of
from student_train.recipe import TrainRecipe
from student_train.step import run
from student_train.ways import Choice, advised, choices, refusals
from student_train.zero import Zero

D, F, V, PLACES = 16, 24, 29, 32
"""Width, inner width, words and positions of tiny_stores' BERT."""
BUFFERS = 2 * 8 * PLACES
"""Bytes of its position and segment ids."""
GB = 1e9


def bert_weights(blocks: int) -> int:
    """Elements of a BERT with two classes, counted by hand."""
    block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
    return (V + PLACES + 2) * D + 2 * D + blocks * block + (D * D + D) + (2 * D + 2)


WEIGHTS, TAUGHT_BY = 4 * bert_weights(2), 4 * bert_weights(4)


@pytest.fixture(scope="module")
def folder(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store`` with the pass ``tiny`` beside its ``teacher`` of four blocks."""
    made: Path = tmp_path_factory.mktemp("plan")
    stores.write_store(made, "classification", ["hidden.*@all", "task_logits@row"], group="question")
    return made


def tree(folder: Path, **changes: object) -> dict[str, Any]:
    """A recipe with a live teacher."""
    phase: dict[str, Any] = {
        "name": "only",
        "student": {"random": {"num_hidden_layers": 2}},
        "methods": [{"name": "hid_seq", "options": {"layers": [[2, 4]]}}],
        "data": [{"store": str(folder / "store")}],
        "teacher": {"online": {"model": str(folder / "teacher"), "head": "classification"}},
        "steps": 4,
        "batch_rows": 8,
        **changes,
    }
    return {"output": str(folder / "out"), "phases": [{name: value for name, value in phase.items() if value is not None}]}


@cache
def paper_of(text: str) -> Paper:
    made = parse(TrainRecipe, json.loads(text), "recipe")
    return on_paper(outline(made, made.phases[0]))


def paper(folder: Path, **changes: object) -> Paper:
    return paper_of(json.dumps(tree(folder, **changes)))


def rows(length: int = 16) -> Rows:
    return Rows(np.array([length]), 0.0)


MACHINE = Machine("2xX", 2, 1, 1e6, 1e9, 1e8, 1e7, 1e7, 1e5, 1e12, 1e9, like="X")
ENGINES: dict[str, tuple[Zero | None, int, tuple[float, float, float]]] = {
    # stage, micro-batches, (weights, moments, gradients) of a rank of two in units of the student's weights
    "ddp": (None, 1, (1, 2, 1)),  # gradients come as it learns; DDP's copies of them stay
    "ddp, accumulated": (None, 2, (1, 2, 2)),
    "zero-1": (Zero(stage=1), 1, (1.5, 1, 1.5)),  # all gradients on their way, and the part's own
    "zero-1, accumulated": (Zero(stage=1), 2, (1.5, 1, 2.5)),
    "zero-2": (Zero(stage=2), 1, (1.5, 1, 1.5)),
    "zero-2, accumulated": (Zero(stage=2), 2, (1.5, 1, 2)),
    "zero-3": (Zero(stage=3), 1, (1, 1, 1.5)),
    "zero-3, parameters": (Zero(stage=3, offload_optimizer="cpu", offload_parameters="cpu"), 1, (0, 0, 1)),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_rank_holds_of_the_student_what_is_counted_by_hand(name: str, folder: Path) -> None:
    zero, accumulation, parts = ENGINES[name]
    taken = memory(paper(folder, accumulation=accumulation), Way(2, Sharding(), zero), rows())
    largest = 4 * PLACES * D if zero is not None and zero.offload_optimizer != "none" else 0
    words = 4 * V * D
    assert taken.student - BUFFERS == parts[0] * WEIGHTS
    assert taken.moments == parts[1] * WEIGHTS
    assert taken.gradients == parts[2] * WEIGHTS + (words if largest else 0)
    assert taken.teacher - BUFFERS == TAUGHT_BY


def test_offload_moves_its_share_to_main_memory(folder: Path) -> None:
    on = paper(folder)

    def host(zero: Zero | None, sharding: Sharding | None = None) -> float:
        return memory(on, Way(2, sharding or Sharding(), zero), rows()).host

    none = host(None)
    assert host(Zero(stage=2)) == none
    assert host(Zero(stage=2, offload_optimizer="cpu")) - none == 5 * WEIGHTS / 2  # weights twice, gradients, two moments
    assert host(Zero(stage=3, offload_optimizer="cpu", offload_parameters="cpu")) - none == 6 * WEIGHTS / 2
    assert host(None, Sharding(kind="zero3", size=2, offload="cpu")) - none == TAUGHT_BY / 2


@pytest.mark.parametrize("kind", ["zero3", "fsdp", "tp"])
def test_a_rank_holds_its_part_of_the_teacher(kind: str, folder: Path) -> None:
    taken = memory(paper(folder), Way(2, Sharding.model_validate({"kind": kind, "size": 2}), None), rows())
    dealt = 4 * (4 * (4 * D * D + 2 * D * F) + V * D) if kind == "tp" else TAUGHT_BY
    assert taken.teacher - BUFFERS == TAUGHT_BY - dealt / 2


def test_weights_are_those_of_the_models_that_are_loaded(folder: Path) -> None:
    teacher = load_model(ModelSpec(model=folder / "teacher", head="classification"))
    taken = memory(paper(folder), Way(1, Sharding(), None), rows())
    assert taken.teacher == 4 * teacher.weights.local_elements() + sum(buffer.nbytes for buffer in teacher.model.buffers())


def test_activations_are_what_torch_allocates(folder: Path) -> None:
    on = paper(folder)
    config = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").config
    config.num_hidden_layers = 2
    student = LoadedModel.of(AutoModelForSequenceClassification.from_config(config).train(), "classification")
    ids = torch.randint(5, V, (32, 32))
    batch = Batch(torch.arange(32), ids, torch.ones_like(ids, dtype=torch.bool), None, None, None, None, None, torch.arange(32))
    for weight in student.model.parameters():
        weight.grad = torch.zeros_like(weight)

    def learn() -> None:
        (value,) = run(student, batch, [FeatureKey("hidden", 2)]).values()
        assert isinstance(value, torch.Tensor)
        torch.nn.functional.kl_div(value.log_softmax(-1), torch.zeros_like(value), reduction="sum").backward()

    learn()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        learn()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())
    assert on.working(32, 32, 0).student == pytest.approx(most, rel=0.05)


def test_a_store_takes_no_memory_of_a_teacher_but_of_its_features(folder: Path) -> None:
    on = paper(folder, teacher="store", data=[{"store": str(folder / "store"), "pass_name": "tiny"}])
    taken = memory(on, Way(2, None, None), rows())
    assert taken.teacher == taken.answering == 0
    assert on.working(4, 16, 0).features == 4 * 4 * 16 * D
    shape = on.stored[""]
    assert feature_bytes(FeatureKey.parse("attention_probs.1@all"), shape, 3, 16, 0) == 4 * 3 * 2 * 16 * 16
    assert feature_bytes(FeatureKey.parse("lm_logits@labels:top8"), shape, 3, 16, 5) == 5 * (8 * (8 + 4) + 4)


def test_a_second_teacher_adds_weights_but_no_activations(folder: Path) -> None:
    live = {"model": str(folder / "teacher"), "head": "classification"}
    two = {"small": {**live, "dtype": "bfloat16"}, "large": live}
    methods = [{"name": "hid_seq", "teacher": name, "options": {"layers": [[2, 4]]}} for name in two]
    one, both = paper(folder), paper(folder, teacher={"online": two}, methods=methods)
    way = Way(1, Sharding(), None)
    assert memory(both, way, rows()).teacher == TAUGHT_BY + TAUGHT_BY / 2 + 2 * BUFFERS
    first, second = (on.working(8, 16, 0) for on in (one, both))
    assert second.teachers == first.teachers + 4 * 8 * 16 * D  # the answers of the first one wait
    shared = paper(folder, teacher={"online": {"small": live, "large": live}}, methods=methods)
    assert memory(shared, way, rows()).teacher == TAUGHT_BY + BUFFERS  # two names of one model share it


def test_seconds_of_a_step_follow_from_operations_and_bytes(folder: Path) -> None:
    def step(zero: Zero | None, sharding: Sharding | None = None, accumulation: int = 1) -> Seconds:
        on = paper(folder, accumulation=accumulation)
        return seconds(on, Way(2, sharding or Sharding(), zero), rows(), {"float32": MACHINE})

    def forward(blocks: int) -> int:  # of four rows of 16 tokens; the pooler and the classes look at rows
        token = 2 * blocks * (4 * D * D + 2 * D * F)
        return 4 * (16 * token + 16 * 16 * 4 * blocks * D + 2 * (D * D + 2 * D))

    assert step(None).computing == pytest.approx((3 * forward(2) + forward(4)) / 1e9 + 7 * WEIGHTS / 1e8)
    assert step(Zero(stage=1)).computing == pytest.approx((3 * forward(2) + forward(4)) / 1e9 + 7 * WEIGHTS / 2 / 1e8)
    for zero, accumulation, times in ((None, 2, 2), (Zero(stage=1), 2, 2), (Zero(stage=2), 2, 3), (Zero(stage=3), 2, 6)):
        assert step(zero, accumulation=accumulation).exchanging == pytest.approx(times * WEIGHTS / 2 / 1e7)
    zero3 = step(None, Sharding(kind="zero3", size=2)).exchanging - step(None).exchanging
    assert zero3 == pytest.approx(TAUGHT_BY / 2 / 1e7)
    assert step(Zero(stage=2, offload_optimizer="cpu")).offloading == pytest.approx(WEIGHTS / 1e5 + 7 * WEIGHTS / 2 / 5e10)


def test_rows_are_as_long_as_the_longest_of_their_micro_batch(folder: Path) -> None:
    two = Rows(np.array([16, 16, 16, 32]), 0.5)
    assert two.longest == 32
    assert two.mean(1) == 20
    assert two.mean(2) == pytest.approx(32 * (1 - (3 / 4) ** 2) + 16 * (3 / 4) ** 2)
    assert two.labels(3, 16) == 24
    assert rows_of(paper(folder).outline, None).longest == 16


def test_every_combination_is_there_and_what_methods_refuse_is_not(folder: Path) -> None:
    machines = {"float32": MACHINE}
    found = {(one.way.sharding, one.way.engine) for one in choices(paper(folder), 2, rows(), machines)}
    teachers = {"none", "zero3", "fsdp", "tp", "zero3 + cpu"}
    students = {"ddp", *(f"zero-{stage}{offload}" for stage in (1, 2, 3) for offload in ("", " + optimizer to cpu"))}
    students |= {"zero-3 + optimizer, parameters to cpu"}
    assert found == {(teacher, student) for teacher in teachers for student in students}
    assert refusals(paper(folder), 2) == []
    alone = {(one.way.sharding, one.way.engine) for one in choices(paper(folder), 1, rows(), machines)}
    offloaded = {name for name in students if "cpu" in name}
    assert alone == {(t, s) for t in ("none", "zero3 + cpu") for s in offloaded} | {("none", "plain"), ("zero3 + cpu", "ddp")}
    theseus = paper(folder, methods=[{"name": "theseus"}])
    engines = {one.way.engine for one in choices(theseus, 2, rows(), machines)}
    assert engines == {name for name in students if not name.startswith("zero-3")}
    (reason,) = refusals(theseus, 2)
    assert reason.startswith("zero: stage 3: theseus lets some blocks of the student stand still")


def test_a_teacher_that_trains_is_in_no_parts(folder: Path) -> None:
    meta = {"store": str(folder / "store"), "split": "dev"}
    on = paper(folder, methods=[{"name": "metadistil"}], meta=meta)
    assert {one.way.sharding for one in choices(on, 2, rows(), {"float32": MACHINE})} == {"none"}
    assert "a teacher in parts: metadistil trains its teacher on every rank; expected sharding kind none" in refusals(on, 2)


def choice(zero: Zero | None, sharding: Sharding, gigabytes: float, taken: float) -> Choice:
    """One that needs so much of a device, and takes so many seconds."""
    machine = replace(MACHINE, memory=10 * GB)
    of_memory = Memory(gigabytes * GB, 0, 0, 0, 0, 0, 0, 0)
    return Choice(Way(2, sharding, zero), of_memory, Seconds(taken, 0, 0), machine, 8)


def test_advice_is_the_first_of_gkds_order_that_fits_and_in_it_the_fastest() -> None:
    whole, fsdp, tp = Sharding(), Sharding(kind="fsdp", size=2), Sharding(kind="tp", size=2)
    offloaded = choice(Zero(stage=2, offload_optimizer="cpu"), whole, 1, 0.1)
    sharded = [choice(None, fsdp, 4, 3), choice(Zero(stage=1), tp, 4, 2), choice(Zero(stage=3), whole, 4, 2.5)]
    states = [choice(Zero(stage=1), whole, 8.1, 9), choice(Zero(stage=2), whole, 5, 10)]  # 8.1 + waste + CUDA are more than 10
    plain = choice(None, whole, 9, 1)
    assert advised([offloaded, *sharded, *states, plain]) is states[1]
    assert advised([offloaded, *sharded, states[0], plain]) is sharded[1]
    assert advised([offloaded, states[0], plain]) is offloaded
    assert advised([states[0], plain]) is None
    assert advised([offloaded, *sharded, *states, choice(None, whole, 8, 1)]) is not None


BIG = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192}
"""A student of 1.2 billion weights, 4.8 GB: it needs five times that whole, and a twelfth of that and the moments in parts of eight."""


@pytest.mark.parametrize(
    ("gigabytes", "step", "engine"), [(40, 0, "ddp"), (12, 1, "zero-"), (7, 2, "zero-3"), (4, 3, "zero-3 + optimizer")]
)
def test_a_smaller_machine_is_advised_a_further_step(gigabytes: int, step: int, engine: str, folder: Path) -> None:
    made = parse(TrainRecipe, tree(folder, student={"random": BIG}), "recipe")
    found = plan(made, made.phases[0], Wanted(f"8x{gigabytes}GB", (8,)))
    best = advised(found.found[8])
    assert best is not None
    assert best.step == step
    assert best.way.engine.startswith(engine)


Program = Callable[..., tuple[int, str, str]]


def test_the_command_prints_every_way_what_is_refused_and_an_advice(folder: Path, tmp_path: Path, program: Program) -> None:
    file = tmp_path / "recipe.yaml"
    live = {"model": str(folder / "teacher"), "head": "classification", "sharding": {"kind": "fsdp", "size": 2}}
    file.write_text(yaml.safe_dump(tree(folder, teacher={"online": live}, methods=[{"name": "theseus"}], zero={"stage": 2})))
    code, out, err = program("plan", file, "--on", "4x16GB")
    assert code == 0, err
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("on ")] == ["on 1 rank, each:", "on 2 ranks, each:", "on 4 ranks, each:"]
    (own,) = [line for line in lines if line.endswith("this recipe")]
    assert own.split()[:2] == ["fsdp", "zero-2"]
    for column in ("allocated", "cached", "CPU memory", "a row"):
        assert column in out
    assert "refused: zero: stage 3: theseus lets some blocks" in out
    assert "not counted: what theseus runs by itself" in out
    assert "student in tensor parallel: not offered" in out
    assert "take teacher none, student ddp" in out
    code, out, err = program("plan", file, "--on", "4x16GB", "--ranks", "2", "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["advised"] == {"ranks": 2, "teacher": "none", "student": "ddp"}
    assert {way["ranks"] for way in found["ways"]} == {2}
    assert found["trained_bytes"] == WEIGHTS


def test_a_store_that_is_not_there_yet_is_planned_for_by_the_length_of_its_rows(folder: Path, tmp_path: Path, program: Program) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(folder, data=[{"store": str(tmp_path / "none")}])))
    code, out, err = program("plan", file, "--on", "2x16GB", "--length", "20", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["advised"]["student"] == "ddp"
    code, _, err = program("plan", file, "--on", "2x16GB")
    assert code == 2
    assert "is not there yet: say how long its rows are, as in --length 128" in err
    code, _, err = program("plan", file, "--on", "2x16GB", "--length", "200")
    assert code == 2
    assert "Traceback" not in err


def test_what_cannot_be_planned_for_is_said_in_one_message(folder: Path, tmp_path: Path, program: Program) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(folder)))
    for arguments, message in (
        (("--on", "8xB9000"), "expected ranks x memory such as 8x40GB"),
        (("--on", "2x40GB", "--ranks", "4"), "--ranks: 2x40GB has 2, found 4"),
        (("--on", "3x40GB", "--ranks", "3"), "batch_rows 8 with accumulation 1 cannot be shared out evenly over 3 ranks"),
        (("--on", "2x40GB", "--phase", "onl"), "the recipe has no phase 'onl'"),
        (("--on", "2xV100", "phases.0.trainer.bf16=true"), "does not compute in bfloat16"),
    ):
        code, out, err = program("plan", file, *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert message in err
        assert "Traceback" not in err
    if not torch.cuda.is_available():
        code, _, err = program("plan", file)
        assert code == 2
        assert "say which one to plan for, as in --on 8x40GB" in err
