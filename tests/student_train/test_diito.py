"""DIITO in whole runs: the same from a store and with its teacher at work, resumed, on two ranks; and what it refuses."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig
from two_ranks import launched

from online.batch import Batch, Features
from online.collate import collate
from online.interchange import counterfactual
from online.models import LoadedModel, ModelSpec, load_model
from store.features import FeatureKey
from store.intervention import Intervention
from store.reader import Store
from store.shape import ModelShape
from store.strict import parse
from student_train.bundle import Bundle
from student_train.checkpoint import step_of
from student_train.journal import read_journal
from student_train.methods import parse_method
from student_train.methods.diito import aligned
from student_train.moment import START
from student_train.needs import needs
from student_train.output import recipe_yaml
from student_train.recipe import MethodSpec, TrainRecipe
from student_train.run import run
from student_train.step import Step
from student_train.step import run as run_student
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

FULL = [[1, 2], [3, 4]]
FEATURES = ["lm_logits@all", "final@all"]
CLOCK = ("tokens_per_second", "loader_wait")
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3}
STUDENT = {"random": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
ALL = {"alpha_causal_cos": 0.5}


@pytest.fixture(scope="module")
def folder(stores: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``store`` of paired rows with the passes ``tiny`` and ``swapped``, and its ``teacher``."""
    made = tmp_path_factory.mktemp("diito")
    rows = {"objective": "mlm", "mask_probability": 0.4, "interchange": {"share": 0.5}, "copies": 2}
    stores.write_store(made / "whole", "masked_lm", FEATURES, **rows)
    answer(made / "whole", "swapped", {"layers": FULL})
    return made / "whole"


def answer(folder: Path, pass_name: str, intervention: dict[str, object] | None, **changes: object) -> None:
    """One more pass of the teacher of ``folder``."""
    store = Store.open(folder / "store")
    rows = store.manifest.rows.origins[0].options
    recipe = {
        "store": folder / "store", "pass_name": pass_name, "teacher": {"model": folder / "teacher", "head": "masked_lm"}, "rows": rows,
        "features": FEATURES, "device": "cpu", "intervention": intervention, **changes,
    }  # fmt: skip
    dump(DumpRecipe.model_validate(recipe), ("tests",))


def recipe(folder: Path, output: Path, *, online: bool = False, options: dict[str, object] = ALL, **changes: object) -> TrainRecipe:
    answers = {"teachers": {"counterfactual": "swapped", "factual": "tiny"}}
    data = {"store": str(folder / "store"), **({} if online else answers)}
    phase: dict[str, Any] = {
        "name": "only", "student": STUDENT, "methods": [{"name": "diito", "options": options}], "data": [data],
        "evaluate": [{**data, "split": "dev"}], "metrics": ["teacher_kl"], "steps": 6, "batch_rows": 8, "trainer": QUIET, **changes,
    }  # fmt: skip
    if online:
        live = {"model": str(folder / "teacher"), "head": "masked_lm"}
        phase["teacher"] = {"online": {"counterfactual": {**live, "intervention": {"layers": FULL}}, "factual": live}}
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def curve(made: TrainRecipe) -> list[dict[str, float]]:
    entries = read_journal(made.output / "only" / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in entries]


def result(made: TrainRecipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.output / "only" / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def offline(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """A run from the store, with a checkpoint at step 3."""
    made = recipe(folder, tmp_path_factory.mktemp("offline") / "out", trainer={**QUIET, "save_steps": 3, "save_total_limit": 9})
    run(made, ["test"])
    return made


def test_it_learns_online_what_it_learns_from_a_store(folder: Path, offline: TrainRecipe, tmp_path: Path) -> None:
    live = recipe(folder, tmp_path / "live", online=True)
    run(live, ["test"])
    assert curve(live) == curve(offline)
    assert any("diito/causal_ce" in entry and "diito/causal_cos" in entry for entry in curve(live))
    for name in ("start", "student", "before", "after"):
        assert result(live)[name] == result(offline)[name], name
    assert {"teacher_kl", "diito/ce", "diito/mlm", "diito/cos", "diito/causal_ce", "diito/causal_cos"} <= result(live)["before"].keys()
    assert result(live)["after"]["diito/causal_ce"] < result(live)["before"]["diito/causal_ce"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(offline: TrainRecipe, tmp_path: Path) -> None:
    shutil.copytree(offline.output, tmp_path / "out")
    made = offline.model_copy(update={"output": tmp_path / "out"})
    phase = made.output / "only"
    for path in (phase / "checkpoints").iterdir():
        if step_of(path) != 3:
            shutil.rmtree(path)
    (phase / "result.json").unlink()
    shutil.rmtree(phase / "student")
    run(made, ["test"])
    assert curve(made) == curve(offline)
    assert result(made)["student"] == result(offline)["student"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", [{}, {"zero": {"stage": 3}}], ids=["ddp", "zero3"])
def test_two_ranks_train_as_one(changes: dict[str, object], folder: Path, offline: TrainRecipe, tmp_path: Path) -> None:
    spread = recipe(folder, tmp_path / "two", online=True, **changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(spread))
    done = launched("-m", "student_train.cli", "run", str(file), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    for entry, expected in zip(curve(spread), curve(offline), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=2e-6), entry["step"]
    assert result(spread)["after"] == pytest.approx(result(offline)["after"], rel=1e-4)


# One step by itself


@pytest.fixture(scope="module")
def student(folder: Path) -> LoadedModel:
    loaded = load_model(ModelSpec(model=folder / "teacher", head="masked_lm"))
    assert isinstance(loaded.model.config, BertConfig)
    return loaded


def bundled(student: LoadedModel, **options: object) -> Bundle:
    """DIITO for a student with its teacher's blocks, which it is aligned with one to one."""
    spec = MethodSpec(name="diito", options={"layers": [[1, 1], [2, 2], [3, 3], [4, 4]], **options})
    shapes = {"factual": student.shape, "counterfactual": student.shape}
    bundle = Bundle(student, [(spec, parse_method(spec.name, dict(spec.options), student.shape, shapes))])
    bundle.begin(START)
    return bundle


def answers(student: LoadedModel, bundle: Bundle, batch: Batch) -> Features:
    """What the student itself says, with the intervention of the method, as its teacher's answers."""
    (method,) = bundle.methods.values()
    keys = {key.of("") for key in method.teacher_keys}
    with torch.no_grad():
        own = run_student(student, batch, {*keys, *(FeatureKey("hidden", block) for block in range(1, 5))})
        after = counterfactual(student, batch, keys, [[1], [2], [3], [4]], own)
    found = {"factual": own, "counterfactual": after}
    return {key: found[key.pass_name][key.of("")] for key in method.teacher_keys}


def test_a_student_that_is_its_teacher_has_no_loss_but_that_of_labels(folder: Path, student: LoadedModel) -> None:
    batch = collate(Store.open(folder / "store"), torch.arange(8).numpy())
    bundle = bundled(student, alpha_causal_cos=1.0).eval()
    counts = bundle.counts(batch, True)
    _, terms = bundle(batch, answers(student, bundle, batch), counts, True)
    assert terms.pop("diito/mlm") > 0.1
    assert set(terms) == {"diito/ce", "diito/cos", "diito/causal_ce", "diito/causal_cos"}
    for name, value in terms.items():
        assert value.item() == pytest.approx(0, abs=1e-5), name
    other = bundled(student, layers=[[2, 1], [3, 2], [4, 3], [1, 4]]).eval()
    _, apart = other(batch, answers(student, other, batch), other.counts(batch, True), True)
    assert apart["diito/causal_ce"] > 1e-3  # other blocks take the other row's states


def test_only_first_rows_are_bases_without_crossway(folder: Path, student: LoadedModel) -> None:
    batch = collate(Store.open(folder / "store"), torch.arange(8).numpy())
    counts = bundled(student, crossway=False).counts(batch, True)
    assert counts["diito/causal_ce"] == batch.lengths[::2].sum()
    assert counts["diito/ce"] == batch.lengths.sum()


def test_the_counterfactual_pass_runs_in_the_type_that_the_student_trains_in(folder: Path, student: LoadedModel) -> None:
    batch = collate(Store.open(folder / "store"), torch.arange(4).numpy())
    bundle = bundled(student)
    seen: list[torch.dtype] = []
    hook = student.block(2).output.dense.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    try:
        teacher = answers(student, bundle.eval(), batch)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            bundle.train()(batch, teacher, bundle.counts(batch, True), True)
        assert seen == [torch.bfloat16] * 2
        seen.clear()
        (method,) = bundle.methods.values()
        method.eval()(run_student(student, batch, method.student_keys), teacher, batch)  # evaluation: without prepare or autocast
        assert seen == [torch.float32] * 2
        method.prepare(Step(student, batch, teacher, None))
    finally:
        hook.remove()
        student.model.eval()


# What it takes


def test_rules_for_blocks(student: LoadedModel) -> None:
    def shape(layers: int) -> ModelShape:
        return student.shape.model_copy(update={"layers": layers, "windows": (None,) * layers})

    assert aligned("full", shape(6), shape(12)) == [(s, [2 * s - 1, 2 * s]) for s in range(1, 7)]
    assert aligned("full", shape(3), shape(12))[1] == (2, [5, 6, 7, 8])
    assert aligned("full", shape(2), shape(5)) == [(1, [1, 2]), (2, [3, 4, 5])]
    assert aligned("middle", shape(6), shape(12)) == [(3, [6])]
    assert aligned("late", shape(6), shape(12)) == [(3, [9]), (4, [10])]
    assert aligned("late", shape(1), shape(4)) == [(1, [4])]
    assert aligned([(1, 3), (2, [3, 4])], shape(2), shape(4)) == [(1, [3]), (2, [3, 4])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [[3, 1]]}, "layers: the student has blocks 1 to 2, found 3"),
        ({"layers": [[1, [4, 5]]]}, "layers: the teacher has blocks 1 to 4, found 5"),
        ({"layers": []}, "layers: expected at least one pair"),
        ({"alpha_causal_ce": 0}, "without them nothing is exchanged; distilbert has the rest"),
        ({"factual": "tiny"}, "expected teachers tiny and counterfactual, found counterfactual, factual"),
        (
            {"layers": "middle"},
            r"expected teacher counterfactual to answer with intervention: \{layers: \[\[2\]\]\}, found .*\[\[1, 2\], \[3",
        ),
        (
            {"factual": "counterfactual", "counterfactual": "factual"},
            "expected teacher counterfactual to answer with no intervention, found",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(recipe(folder, tmp_path / "out", options=options), ["test"])
    with pytest.raises(ValueError, match=message):
        run(recipe(folder, tmp_path / "out", online=True, options=options), ["test"])


def test_other_widths_need_another_loss(folder: Path, tmp_path: Path) -> None:
    narrow = {"random": {**STUDENT["random"], "hidden_size": 8}}
    with pytest.raises(ValueError, match=r"equal widths .* found 8 and 16; the cosine has no projection; alpha_cos: 0"):
        run(recipe(folder, tmp_path / "out", student=narrow), ["test"])
    made = recipe(folder, tmp_path / "out", student=narrow, options={"alpha_cos": 0}, steps=1)
    run(made, ["test"])


def test_a_pass_with_an_intervention_teaches_no_other_method(folder: Path, tmp_path: Path) -> None:
    methods = [{"name": "distilbert", "teacher": "counterfactual", "options": {"cosine": 0}}]
    with pytest.raises(ValueError, match="methods: distilbert: expected teacher counterfactual to answer with no intervention, found"):
        run(recipe(folder, tmp_path / "out", methods=methods), ["test"])
    last = {"teachers": {"factual": "tiny", "counterfactual": "swapped"}}
    data = {"store": str(folder / "store"), **last}
    with pytest.raises(ValueError, match="metrics compare with the last teacher, counterfactual, which answers with an intervention"):
        run(recipe(folder, tmp_path / "out", data=[data], evaluate=[{**data, "split": "dev"}]), ["test"])
    alone = {"store": str(folder / "store"), "split": "dev", "pass_name": "swapped"}
    with pytest.raises(ValueError, match="metrics compare with a teacher which answers with an intervention"):
        run(recipe(folder, tmp_path / "out", evaluate=[alone]), ["test"])
    with pytest.raises(ValueError, match="probe: it compares with a teacher which answers with an intervention"):
        run(recipe(folder, tmp_path / "out", probe={"distances": ["hidden"], "layers": [[2, 4]], "data": alone}), ["test"])


def test_activations_that_are_computed_again_would_miss_what_was_written(folder: Path, tmp_path: Path) -> None:
    trainer = {**QUIET, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match="gradient_checkpointing: diito changes what runs in a forward pass"):
        run(recipe(folder, tmp_path / "out", trainer=trainer), ["test"])


def test_rows_without_partners_are_refused(folder: Path, words: Path, tmp_path: Path) -> None:
    data = {"store": str(words)}
    made = recipe(folder, tmp_path / "out", online=True, data=[data], evaluate=[], metrics=[])
    with pytest.raises(ValueError, match=r"the rows of .* have no partners \(rows.interchange in the dump's recipe pairs them\)"):
        run(made, ["test"])


def test_needs_says_what_to_write_into_the_teacher(folder: Path, tmp_path: Path) -> None:
    documents = {one["pass_name"]: one for one in yaml.safe_load_all(needs([recipe(folder, tmp_path / "out")]))}
    assert documents["swapped"]["intervention"] == {"layers": FULL}
    assert "intervention" not in documents["tiny"]
    assert documents["swapped"]["features"] == ["final@all", "lm_logits@all"]
    elsewhere = recipe(folder, tmp_path / "out", options={"layers": [[1, 3], [2, 4]]}).model_dump(mode="json")
    text = json.dumps(elsewhere).replace(str(folder / "store"), str(tmp_path / "none"))
    found = needs([parse(TrainRecipe, json.loads(text), "recipe")], {"": folder / "teacher"})
    assert {one["pass_name"]: one.get("intervention") for one in yaml.safe_load_all(found)}["swapped"] == {"layers": [[3], [4]]}


def test_a_store_says_what_was_written_into_its_teacher(folder: Path) -> None:
    passes = Store.open(folder / "store").manifest.passes
    assert passes["swapped"].intervention == Intervention(layers=((1, 2), (3, 4)))
    assert passes["tiny"].intervention is None
    assert passes["swapped"].teacher == passes["tiny"].teacher
