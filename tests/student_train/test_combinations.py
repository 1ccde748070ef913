"""Methods side by side in one phase, and what it takes to add one."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import student_train.methods
from online.batch import Batch, Features
from online.collate import collate
from online.models import LoadedModel
from store.features import FeatureKey
from store.reader import Store
from store.shape import ModelShape
from student_train.bundle import Bundle
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method, Terms
from student_train.methods.losses import mse, unit_count, vectors
from student_train.moment import Moment
from student_train.recipe import MethodSpec
from student_train.teacher import StoredTeacher

ROOT = Path(__file__).parents[2]
LAYERS = {"layers": [[1, 2]]}
SPECS = [
    MethodSpec(name="hid_seq", options=LAYERS),
    MethodSpec(name="tinybert", weight=0.3, options={**LAYERS, "embedding": 0, "attention": 0}),
    MethodSpec(name="hid_seq", weight=2.0, options=LAYERS),
    MethodSpec(name="match", options={"site": "hidden", "layers": [[1, 2]], "projection": "linear"}),
    MethodSpec(name="task_loss"),
]


def build(student: LoadedModel, specs: list[MethodSpec], shape: ModelShape) -> Bundle:
    methods = []
    for number, spec in enumerate(specs):
        torch.manual_seed(number)
        methods.append((spec, parse_method(spec.name, dict(spec.options), student.shape, shape)))
    return Bundle(student, methods)


def taught_batch(path: Path) -> tuple[Batch, Features, ModelShape]:
    store = Store.open(path)
    rows = store.rows.rows_of(0)[:8]
    teacher = StoredTeacher(store, "bert", frozenset({FeatureKey("hidden", 2)}))
    batch = collate(store, rows)
    return batch, teacher.features(batch, teacher.fetch(rows)), store.manifest.passes["bert"].shape


def test_methods_that_read_one_feature_never_see_each_others_projection(tiny: ModuleType, taught: Path) -> None:
    """Each term and gradient in company is what it is alone, to the bit."""
    batch, teacher, shape = taught_batch(taught)
    student = tiny.model(1, layers=2, width=16, dropout=0.0)
    together = build(student, SPECS, shape)
    assert list(together.methods) == ["hid_seq", "tinybert", "hid_seq-2", "match", "task_loss"]
    _, terms = together(batch, teacher, together.counts(batch, True), True)
    for number, (name, spec) in enumerate(together.specs.items()):
        alone = build(student, [spec], shape)
        for own, other in zip(alone.methods.parameters(), together.methods[name].parameters(), strict=True):
            with torch.no_grad():
                own.copy_(other)
        _, expected = alone(batch, teacher, alone.counts(batch, True), True)
        for term, value in expected.items():
            assert torch.equal(terms[term.replace(spec.name, name, 1)], value), (number, term)


def test_weights_follow_their_schedules(tiny: ModuleType, taught: Path) -> None:
    batch, teacher, shape = taught_batch(taught)
    student = tiny.model(1, layers=2, width=16, dropout=0.0)
    bundle = build(student, [MethodSpec(name="hid_seq", options=LAYERS)], shape)
    scheduled = {"name": "hid_seq", "options": LAYERS, "weight": {"kind": "linear", "start": 4.0, "end": 0.0, "until": 0.5}}
    fading = build(student, [MethodSpec.model_validate(scheduled)], shape)
    fading.methods.load_state_dict(bundle.methods.state_dict())
    counts = bundle.counts(batch, True)
    (full,) = bundle(batch, teacher, counts, True)[1].values()
    for step, weight in ((0, 4.0), (1, 3.0), (2, 2.0), (4, 0.0), (7, 0.0)):
        fading.begin(Moment(step=step, steps=8, epoch_steps=4.0, seed=0))
        (found,) = fading(batch, teacher, counts, True)[1].values()
        assert float(found) == pytest.approx(weight * float(full), rel=1e-6)


class Pull(Method):
    """The student's first token to the teacher's: a method as small as they get."""

    paper, stages, accepts = "of this test", {"task": ("hidden",)}, "any"

    def __init__(self, student: ModelShape, teacher: ModelShape, *, scale: float = 1.0) -> None:
        super().__init__([FeatureKey("hidden", 1)], [FeatureKey("hidden", 2)])
        self.scale, self.projection = scale, torch.nn.Linear(student.width, teacher.width)

    def counts(self, batch: Batch) -> Terms:
        return {"pull": unit_count(batch, "all")}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        (own,), (other,) = self.student_keys, self.teacher_keys
        distance: Tensor = mse(self.projection(vectors(student, own, batch)), vectors(teacher, other, batch))
        return {"pull": self.scale * distance.sum()}


def test_a_new_method_is_its_class_and_a_line_in_the_table(
    tiny: ModuleType, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has options with checks, trains from a store, and goes on after a stop; nothing else has to know it."""
    assert len(inspect.getsource(Pull).splitlines()) <= 30
    monkeypatch.setitem(student_train.methods.METHODS, "pull", Pull)
    with pytest.raises(ValueError, match="method pull: unknown key 'scalle'; did you mean 'scale'"):
        parse_method("pull", {"scalle": 2.0}, tiny.model(1, layers=2, width=16).shape, tiny.model(1, layers=3, width=24).shape)
    methods = [MethodSpec(name="pull", options={"scale": 2.0})]
    _, result = tiny.run([taught], tmp_path, methods=methods, bank=False, steps=6)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_every_method_is_one_file_and_its_lines_in_the_table() -> None:
    """Counted: beside its own file and the table, no code of the project names a method's class."""
    folder = ROOT / "student_train" / "methods"
    table = (folder / "__init__.py").read_text(encoding="utf-8")
    code = {
        path: path.read_text(encoding="utf-8")
        for package in ("student_train", "online", "teacher_dump")
        for path in (ROOT / package).rglob("*.py")
    }
    for name, cls in METHODS.items():
        own = Path(inspect.getsourcefile(cls) or "")
        assert own.parent == folder
        assert table.count(f'"{name}": {cls.__name__},') == 1
        naming = [
            path
            for path, text in code.items()
            if path not in (own, folder / "__init__.py")
            and re.search(rf"\b{cls.__name__}\b(?=[,(\]\s])", text)
            and re.search(rf"import .*\b{cls.__name__}\b", text)
        ]
        assert not naming, (name, naming)
