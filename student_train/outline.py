"""A phase worked out from configurations and manifests alone: its student's shape, its methods, the features it needs.

``needs`` prints it; ``run`` checks every phase this way before the first one trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from online.models import load_config, model_shape
from store.errors import MissingFeature, StoreError
from store.features import FeatureKey
from store.manifest import Manifest, Task
from store.reader import Store
from store.remote import url_of
from store.shape import Head, ModelShape
from store.strict import did_you_mean
from store.together import PassName, check_same_teacher, names
from student_train.blocks import Source
from student_train.blueprint import LABELLED_HEADS, Blueprint, continued_blueprint, derived_blueprint, folder_blueprint
from student_train.fit import check_rows
from student_train.importance import Look
from student_train.interventions import check_interventions
from student_train.learnable import check_domains, check_meta, unlearnable
from student_train.live import check_live, live_shapes
from student_train.methods import method_class, parse_method
from student_train.methods.base import SAME_AS_INIT, Method
from student_train.metrics import METRICS, check_metric, teacher_keys
from student_train.output import student_folder
from student_train.probe_plan import ProbePlan, probe_plan
from student_train.recipe import DataSpec, MethodSpec, PhaseSpec, TrainRecipe
from student_train.vocabulary import as_seen, check_words, compressed

Keys = frozenset[FeatureKey]
Passes = dict[tuple[Path, PassName], Keys]
"""(store, pass or passes) -> the features that are read of them."""

Folders = Mapping[str, Path]
"""Pass name -> folder of its teacher, whose configuration is enough; the empty name is all other passes'. For what is not dumped yet."""

HEAD_OF: dict[str, Head] = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
}
"""Ending of the architecture that a configuration names -> head; others have none (``base``)."""


@dataclass(frozen=True)
class Outline:
    """A phase without weights or rows."""

    phase: PhaseSpec
    blueprint: Blueprint
    teachers: dict[str, ModelShape]
    """By the name that the data gives each; the only one has none."""
    methods: list[tuple[MethodSpec, Method]]
    """Each with the name of its teacher, and the layers of its options, filled in."""
    method_keys: dict[str, Keys]
    """Teacher -> what the methods read of it."""
    taught: frozenset[DataSpec]
    """Data, evaluated or trained on, whose pass answers the methods."""
    passes: Passes
    """What is read of each pass, for training and for measuring."""
    measured: Keys
    """What metrics read of the teacher that they compare with."""
    probe: ProbePlan | None = None
    """What is measured as it trains."""

    def parse(self, spec: MethodSpec) -> Method:
        """One of its methods anew; their first parameters are random."""
        return _parse(spec, self.blueprint.shape, self.teachers)


def outline(recipe: TrainRecipe, phase: PhaseSpec, folders: Folders | None = None) -> Outline:
    """Work out ``phase``, refusing what does not fit.

    Args:
        folders: Of teachers; they stand for stores and passes that do not exist yet.

    Raises:
        ValueError: options that do not fit the models or the data.
        StoreError: a store is missing, has no such pass, or is of another tokenizer.
    """
    try:
        return _outline(recipe, phase, folders or {})
    except StoreError as error:
        raise type(error)(f"phase {phase.name!r}: {error}") from None
    except ValueError as error:
        raise ValueError(f"phase {phase.name!r}: {error}") from None


def _outline(recipe: TrainRecipe, phase: PhaseSpec, folders: Folders) -> Outline:
    read = (*phase.data, *phase.evaluate, *([phase.meta] if phase.meta else []))
    manifests = {data.store: _manifest(data.store, folders) for data in phase.read}
    live = live_shapes(phase.live)
    shapes = {data: live or _teacher_shapes(data, manifests[data.store], folders) for data in read}
    blueprint = _blueprint(recipe, phase, folders)
    student = blueprint.shape
    shapes = {data: as_seen(found, blueprint) for data, found in shapes.items()}
    taught = [shapes[data] for data in phase.data if shapes[data]] if phase.teacher != "none" else []
    if any(found != taught[0] for found in taught):
        raise ValueError("its data has teachers of different names or shapes; all data of a phase that has teachers has the same")
    teachers = taught[0] if taught else {}
    methods = [_method(spec, blueprint, teachers) for spec in phase.methods]
    keys = {name: _read_of(name, methods) for name in teachers}
    measured = _measured(phase, student, manifests, shapes)
    taught_by = frozenset(data for data, answers in shapes.items() if teachers and answers == teachers)
    passes: Passes = {}
    for data in phase.data:
        if data not in taught_by and all(method.teacher_keys for _, method in methods):
            raise ValueError(f"no method can learn from {data.store}: its data has no pass_name of a teacher; add task_loss or lm_loss")
    for data in read:
        for name, pass_name in data.answers.items():
            of_methods = keys.get(name, frozenset()) if data in taught_by else frozenset()
            of_metrics = measured if data in phase.evaluate and name == phase.compared(data) else frozenset()
            _add(passes, data.store, pass_name, of_methods | of_metrics)
    probe = None
    if (probed := phase.probed) is not None:
        manifest = manifests[probed.store]
        answers = as_seen(live or _teacher_shapes(probed, manifest, folders), blueprint)
        probe = probe_plan(phase, student, answers.get(phase.compared(probed)), None if manifest is None else manifest.rows)
        if probed.compared_pass is not None:
            _add(passes, probed.store, probed.compared_pass, probe.teacher_keys)
    if blueprint.look is not None:
        _add(passes, blueprint.look.store, blueprint.look.pass_name, blueprint.reads)
    for store, manifest in manifests.items():
        if manifest is not None:
            check_rows(phase.read, blueprint, store, manifest)
            for teacher in phase.live.values():
                check_live(teacher, manifest.rows, str(store))
    for spec, method in methods:
        check_words(spec.name, method, blueprint)
        if (method.live or method.rewrites) and not phase.live:
            raise ValueError(
                f"methods: {spec.name} needs its teacher at work: give the phase teacher: {{online: {{model: FOLDER, head: HEAD}}}} "
                "instead of a store's answers"
            )
        if method.must_carry and spec.carry is None:
            raise ValueError(f"methods: {spec.name} goes on with what an earlier phase of it learned: name that phase with carry")
        if phase.batch_rows // phase.accumulation < method.least_rows:
            raise ValueError(
                f"methods: {spec.name} compares the rows of a batch with each other: expected batch_rows of at least "
                f"{method.least_rows * phase.accumulation} with accumulation {phase.accumulation}, found {phase.batch_rows}"
            )
        problems = {data.store: unlearnable(method, student, manifest.rows) for data in phase.data if (manifest := manifests[data.store])}
        if problems and all(problems.values()):
            raise ValueError(f"methods: {spec.name}: " + "; ".join(f"the rows of {store} {problem}" for store, problem in problems.items()))
        taught_rows = [
            manifest.rows for data in (*phase.data, *phase.evaluate) if data in taught_by and (manifest := manifests[data.store])
        ]
        check_domains(spec.name, method, taught_rows)
    check_interventions(phase, methods, [data for data in read if data in taught_by], manifests, bool(measured))
    held_out = manifests.get(phase.meta.store) if phase.meta else None
    check_meta(phase, methods, student, held_out.rows if held_out else None)
    return Outline(phase, blueprint, teachers, methods, keys, taught_by, passes, measured, probe)


def folder_head(folder: Path) -> Head:
    """The head that a folder's configuration names."""
    return config_head(load_config(folder))


def config_head(config: PreTrainedConfig) -> Head:
    architecture = (config.architectures or [""])[0]
    return next((head for ending, head in HEAD_OF.items() if architecture.endswith(ending)), "base")


def score_names(phase: PhaseSpec) -> dict[DataSpec, str]:
    """What stands in front of the scores of each evaluated split: nothing where there is one, else what tells it apart and a slash."""
    if len(phase.evaluate) == 1:
        return {phase.evaluate[0]: ""}
    splits = [data.split for data in phase.evaluate]
    if len(set(splits)) == len(splits):
        return {data: f"{data.split}/" for data in phase.evaluate}
    names = [f"{data.store.name}.{data.split}" for data in phase.evaluate]
    if len(set(names)) == len(names):
        return {data: f"{name}/" for data, name in zip(phase.evaluate, names, strict=True)}
    return {data: f"{name}.{number}/" for number, (data, name) in enumerate(zip(phase.evaluate, names, strict=True), 1)}


def _manifest(store: Path, folders: Folders) -> Manifest | None:
    lacking = url_of(store) is None and not store.exists()
    return None if folders and lacking else Store.open(store).manifest


def _folder(folders: Folders, pass_name: PassName | None) -> Path | None:
    """That of a pass's teacher."""
    return next((folders[name] for name in (*names(pass_name), "") if name in folders), None)


def _teacher_shapes(data: DataSpec, manifest: Manifest | None, folders: Folders) -> dict[str, ModelShape]:
    """The shape of each teacher of ``data``, by its name there."""
    passes = {} if manifest is None else manifest.passes
    shapes = {}
    for name, pass_name in data.answers.items():
        lacking = [one for one in names(pass_name) if one not in passes]
        if not lacking:
            own = {one: passes[one] for one in names(pass_name)}
            check_same_teacher(own)
            shapes[name] = next(iter(own.values())).shape
        elif folder := _folder(folders, pass_name):
            config = load_config(folder)
            shapes[name] = model_shape(config, config_head(config))
        else:
            raise MissingFeature(f"{data.store} has no pass {lacking[0]!r}{did_you_mean(lacking[0], sorted(passes))}")
    return shapes


def _method(spec: MethodSpec, blueprint: Blueprint, teachers: dict[str, ModelShape]) -> tuple[MethodSpec, Method]:
    """The method that ``spec`` asks for, and ``spec`` with its teacher and its layers filled in."""
    cls, options = method_class(spec.name), dict(spec.options)
    if options.get("layers") == SAME_AS_INIT:
        if blueprint.undecided:
            raise MissingFeature(
                f"methods: {spec.name}: layers: {SAME_AS_INIT} needs to know the blocks that importance chooses, and the store lacks the "
                "hidden states that it measures: dump what `student-train needs` says without this option, and the method's own features "
                "of all blocks"
            )
        if blueprint.origin is None:
            raise ValueError(
                f"methods: {spec.name}: layers: {SAME_AS_INIT} needs a student whose blocks come from the teacher (student.layers); "
                "for others give pairs [student block, teacher block]"
            )
        options["layers"] = list(enumerate(blueprint.origin, 1))
    resolved = spec.model_copy(update={"options": options, "teacher": _teacher_of(spec, cls, teachers)})
    return resolved, _parse(resolved, blueprint.shape, teachers)


def _parse(spec: MethodSpec, student: ModelShape, teachers: dict[str, ModelShape]) -> Method:
    """The method of a ``spec`` whose teacher is filled in."""
    known = teachers if method_class(spec.name).several else teachers.get(spec.teacher or "")
    return parse_method(spec.name, dict(spec.options), student, known or None)


def _teacher_of(spec: MethodSpec, cls: type[Method], teachers: dict[str, ModelShape]) -> str | None:
    """Name of the one teacher that a method learns from; None where it learns from all, or from none."""
    where = f"methods: {spec.name}"
    if spec.teacher is not None and (cls.several or not cls.needs_teacher):
        raise ValueError(f"{where}: it learns from {'all teachers' if cls.several else 'no teacher'}; leave teacher out")
    if cls.several and set(teachers) == {""}:
        raise ValueError(f"{where} learns from several teachers; expected data with teachers: {{NAME: PASS, ...}} instead of pass_name")
    if spec.teacher is not None and spec.teacher not in teachers:
        raise ValueError(f"{where}: no teacher {spec.teacher!r}{did_you_mean(spec.teacher, [name for name in teachers if name])}")
    if cls.several or not cls.needs_teacher or not teachers:
        return None
    if spec.teacher is None and len(teachers) > 1:
        raise ValueError(f"{where} learns from one teacher, and the data has {', '.join(teachers)}: name it with teacher")
    return spec.teacher or next(iter(teachers))


def _read_of(name: str, methods: list[tuple[MethodSpec, Method]]) -> Keys:
    """What the methods read of the teacher ``name``."""
    keys = (key for spec, method in methods for key in method.teacher_keys if (key.pass_name if method.several else spec.teacher) == name)
    return frozenset(key.of("") for key in keys)


def _blueprint(recipe: TrainRecipe, phase: PhaseSpec, folders: Folders) -> Blueprint:
    made = _started(recipe, phase, folders)
    return made if phase.student.vocabulary is None else compressed(made, phase.data)


def _started(recipe: TrainRecipe, phase: PhaseSpec, folders: Folders) -> Blueprint:
    spec = phase.student
    manifest = _manifest(phase.data[0].store, folders)
    task = _task(_folder(folders, phase.data[0].compared_pass)) if manifest is None else manifest.rows.task
    if spec.model is not None:
        return folder_blueprint(spec, task)
    if spec.phase is not None:
        earlier = _blueprint(recipe, recipe.phase(spec.phase), folders)
        return continued_blueprint(spec, earlier, student_folder(recipe, spec.phase), task)
    source = _source(phase, folders)
    config = load_config(source.folder)
    return derived_blueprint(spec, source, config, task, _look(phase, model_shape(config, source.head)))


def _task(folder: Path | None) -> Task:
    """What the labels of rows that are not there yet must mean, if their teacher answers for them."""
    config = None if folder is None else load_config(folder)
    if config is None or (head := config_head(config)) not in LABELLED_HEADS:
        return Task(kind="none")
    classes = tuple(config.id2label.values())
    if head == "token_classification":
        return Task(kind="token", classes=classes)
    return Task(kind="classification", classes=classes) if len(classes) > 1 else Task(kind="regression")


def _look(phase: PhaseSpec, source: ModelShape) -> Look | None:
    """Where the teacher of the phase's data answers for what matters in a model shaped like ``source``."""
    for data in phase.data:
        if data.compared_pass is not None:
            return Look(data.store, data.compared_pass, data.split, data.where, source)
    return None


def _source(phase: PhaseSpec, folders: Folders) -> Source:
    """The folder that ``layers`` or ``random`` starts from: given, or shipped with the first pass of the phase's data."""
    if phase.student.source is not None:
        return Source(phase.student.source, folder_head(phase.student.source))
    if phase.live:
        teacher = phase.live[phase.compared(phase.data[0])]
        return Source(teacher.model, teacher.head)
    for data in phase.data:
        manifest = _manifest(data.store, folders)
        passes = {} if manifest is None else manifest.passes
        own = [name for name in names(data.compared_pass) if name in passes and not passes[name].imported]
        if own:
            name = next((name for name in own if passes[name].shipped), own[0])
            return Source(Store.open(data.store).shipped(name), passes[name].shape.head, name)
    for data in phase.data:
        if folder := _folder(folders, data.compared_pass):
            return Source(folder, folder_head(folder))
    raise ValueError("student: layers and random need a source: give student.source, or data with a pass_name")


def _measured(
    phase: PhaseSpec, student: ModelShape, manifests: Mapping[Path, Manifest | None], shapes: Mapping[DataSpec, Mapping[str, ModelShape]]
) -> Keys:
    """What the metrics read of a teacher."""
    for name in phase.metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}{did_you_mean(name, sorted(METRICS))}")
        for data in phase.evaluate:
            manifest = manifests[data.store]
            if manifest is not None:
                check_metric(name, manifest.rows, student, shapes[data].get(phase.compared(data)))
    if phase.best is not None:
        known = [f"{prefix}{name}" for prefix in score_names(phase).values() for name in ("loss", *phase.metrics)]
        if phase.best.removeprefix("-") not in known:
            raise ValueError(f"best: unknown metric {phase.best!r}{did_you_mean(phase.best.removeprefix('-'), known)}")
    return teacher_keys(phase.metrics, student)


def _add(passes: Passes, store: Path, pass_name: PassName, keys: Keys) -> None:
    if keys:
        passes[store, pass_name] = passes.get((store, pass_name), frozenset()) | keys
