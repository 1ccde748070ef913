"""What a method reads of a teacher, and what a dump of it costs: from two configurations, before there is any store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from online.models import ModelSpec, load_config, model_shape
from online.planner import plan
from online.skeleton import of_config
from store.codecs import feature_spec
from store.features import FeatureKey, StoreDtype
from store.manifest import Task
from store.shape import ModelShape, Wiring
from store.strict import parse, set_by_path
from student_train.blocks import Source
from student_train.blueprint import derived_blueprint, plain_errors
from student_train.method_options import schema, smallest
from student_train.methods import METHODS, parse_method
from student_train.methods.base import Method
from student_train.outline import folder_head
from student_train.recipe import StudentSpec

DTYPE: StoreDtype = "float16"
"""Type that bytes are counted in."""
_TEACHERS = ("first", "second")
"""Names of the teachers, both alike, that a method for several gets."""


@dataclass(frozen=True)
class Pair:
    """A teacher without its weights, and the shape of a student."""

    teacher: ModelShape
    wiring: Wiring
    student: ModelShape


@dataclass(frozen=True)
class Reads:
    """What a method reads of a teacher, without pass names."""

    keys: frozenset[FeatureKey]
    stored: frozenset[FeatureKey]
    """The features of fewest bytes that they follow from."""
    bytes: dict[str, int]
    """Unit (``token``, ``row``, ``labelled token``) -> bytes that a dump keeps for each, in DTYPE; weights and checksums left out."""


def pair_of(folder: Path, changes: Sequence[str] = ()) -> Pair:
    """The teacher of a Hugging Face folder, of which only config.json is read, and a student.

    Args:
        changes: ``option=value`` for what differs in the student's configuration, the options those of ``student: {random: ...}`` in a
            recipe. Without one for its blocks, it has half the teacher's.

    Raises:
        ValueError: no such folder, an unknown family, or an option that the configuration lacks.
    """
    config, head = load_config(folder), folder_head(folder)
    tree: dict[str, Any] = {"random": {"num_hidden_layers": max(1, model_shape(config, head).layers // 2)}}
    for change in changes:
        set_by_path(tree["random"], change)
    spec = parse(StudentSpec, tree, "--student")
    smaller = derived_blueprint(spec, Source(folder, head), config, Task(kind="none")).config
    with torch.device("meta"), plain_errors("--student"):
        student = of_config(ModelSpec(model=folder, head=head), smaller)
    with torch.device("meta"):
        teacher = of_config(ModelSpec(model=folder, head=head), config)
    return Pair(teacher.shape, teacher.wiring, student.shape)


def reads(name: str, pair: Pair) -> Reads:
    """What the method ``name`` reads with the options it has by default; of several teachers, what it reads of each.

    Options that must be given are tried with all their values (names), or with the least (whole numbers), and what is read is put together.

    Raises:
        ValueError: it refuses the pair, or cannot be told without an option; the message says why.
    """
    keys = frozenset(key.of("") for method in _tried(name, pair) for key in method.teacher_keys)
    stored = plan(dict.fromkeys(sorted(keys), DTYPE), pair.teacher, pair.wiring).stored
    units: dict[str, int] = {}
    for key, dtype in stored.items():
        units[key.unit] = units.get(key.unit, 0) + feature_spec(key, dtype, pair.teacher.unit_width(key)).unit_bytes
    return Reads(keys, frozenset(stored), units)


def _tried(name: str, pair: Pair) -> Iterator[Method]:
    cls = METHODS[name]
    known = schema(cls)
    values = {option: smallest(known["properties"][option]) for option in known.get("required", ())}
    if open_ones := [option for option, tried in values.items() if not tried]:
        raise ValueError(f"what it reads depends on {', '.join(open_ones)}")
    teacher = dict.fromkeys(_TEACHERS, pair.teacher) if cls.several else pair.teacher
    for chosen in product(*values.values()):
        try:
            yield parse_method(name, dict(zip(values, chosen, strict=True)), pair.student, teacher)
        except ValueError as error:
            raise ValueError(f"refuses: {str(error).removeprefix(f'method {name}: ')}") from None
