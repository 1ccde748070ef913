"""What a student will be: all of it but its weights.

It follows from configurations alone, and where blocks are chosen by importance from what a pass of a store holds. Blocks are counted
from 1 here and from 0 in the names of weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import PreTrainedConfig

from online.families import FAMILIES
from online.kept_words import words_of
from online.models import CustomModules, ModelSpec, load_config, model_shape
from store.features import FeatureKey
from store.manifest import Task
from store.shape import Head, ModelShape
from store.strict import did_you_mean, explain
from student_train.blocks import Source
from student_train.importance import Look, block_keys, chosen_by_influence, width_keys
from student_train.narrow import WIDTHS, Sizes, check_sizes
from student_train.recipe import DataSpec, ImportantLayers, StudentSpec

LABELLED_HEADS = ("classification", "token_classification")


@dataclass(frozen=True)
class Blueprint:
    """All of a student but its weights."""

    spec: StudentSpec
    config: PreTrainedConfig
    head: Head
    source: Source
    tokenizer: ModelSpec
    """Where the tokenizer comes from in the first place; later phases keep it."""
    blocks: tuple[int, ...] | None = None
    """The source's blocks that it takes over; None for all, or for random weights."""
    custom: CustomModules | None = None
    origin: tuple[int, ...] | None = None
    """The source's block (from 1) that each of its blocks was before any phase; None where it was none, or is undecided."""
    wide: PreTrainedConfig | None = None
    """Its configuration before it is cut narrower; None where it isn't."""
    taken: tuple[int, ...] = ()
    """The source's blocks (from 1) whose weights it takes, or may take while it is undecided; empty for all other starts."""
    look: Look | None = None
    """Where the activations lie that importance is measured by; None where nothing is chosen by it."""
    reads: frozenset[FeatureKey] = frozenset()
    """What is read there."""
    words: int | None = None
    """Ids of the tokenizer where the student keeps only some words (its configuration says how many); None where it has all."""
    corpus: tuple[DataSpec, ...] = ()
    """Rows whose words are counted to choose them, with ``spec.vocabulary``."""
    undecided: bool = False
    """Whether the activations that blocks are to be chosen by are not there yet: the first blocks stand in their place."""

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.config, self.head, self.custom)


def folder_blueprint(spec: StudentSpec, task: Task) -> Blueprint:
    """The student that is ``spec.model``, a Hugging Face folder, as it is; a new head has the classes of ``task``."""
    assert spec.model is not None
    config = load_config(spec.model.model, spec.model.trust_remote_code)
    if spec.model.labels is not None:
        config.num_labels = spec.model.labels
    if spec.model.new_head:
        config.id2label, config.label2id = _class_names(task, config.num_labels)
    source = Source(spec.model.model, spec.model.head)
    return Blueprint(spec, config, spec.model.head, source, spec.model, None, spec.model.modules, words=words_of(source.folder))


def continued_blueprint(spec: StudentSpec, earlier: Blueprint, folder: Path, task: Task) -> Blueprint:
    """The student that goes on from what an ``earlier`` phase leaves in ``folder``."""
    source = Source(folder, earlier.head)
    if earlier.custom is not None:
        return Blueprint(spec, earlier.config, earlier.head, source, earlier.tokenizer, None, earlier.custom)
    made = derived_blueprint(spec, source, earlier.config, task)
    return replace(made, tokenizer=earlier.tokenizer, origin=earlier.origin, words=earlier.words, undecided=earlier.undecided)


def derived_blueprint(
    spec: StudentSpec, source: Source, source_config: PreTrainedConfig, task: Task, look: Look | None = None
) -> Blueprint:
    """The student that ``spec`` makes of ``source``.

    Args:
        task: Counts the outputs of a task head that the source lacks.
        look: Where importance is measured.

    Raises:
        ValueError: a block that the source lacks, an unknown option, or sizes that do not fit each other.
        StoreError: what importance is measured by is damaged.
    """
    tree = source_config.to_dict()
    for name in FAMILIES[source_config.model_type].computed if source_config.model_type in FAMILIES else ():
        tree.pop(name, None)
    depth = source_config.num_hidden_layers
    if look is None and _by_importance(spec):
        raise ValueError("student: importance is measured by the activations of a pass: give data with a pass_name")
    blocks = _blocks(spec, depth, look)
    undecided = isinstance(spec.layers, ImportantLayers) and blocks is None
    if isinstance(spec.layers, ImportantLayers) and blocks is None:
        blocks = tuple(range(1, spec.layers.keep + 1))
    if blocks is not None:
        tree.update(_per_block(tree, depth, blocks), **{_own_name(source_config, "num_hidden_layers"): len(blocks)})
    if spec.random is not None:
        tree.update(_changes("random", spec.random, tree, source_config))
        changed = tree[_own_name(source_config, "num_hidden_layers")]
        if isinstance(changed, int) and changed != depth:
            tree.update(_per_block(tree, depth, range(1, changed + 1)))
    head = spec.head or source.head
    labels = _outputs(spec, source.head, head, task)
    if labels is not None:
        tree["id2label"], tree["label2id"] = _class_names(task, labels)
    with plain_errors("student"):
        config = type(source_config).from_dict(tree)
    wide = None
    if spec.width is not None:
        wide, config = config, _narrower(spec, tree, source_config)
        check_sizes(wide, config, spec.width_by == "importance")
    every = tuple(range(1, depth + 1))
    taken = () if spec.layers is None and spec.width is None else blocks or every
    candidates = every if isinstance(spec.layers, ImportantLayers) else taken
    return Blueprint(
        spec,
        config,
        head,
        source,
        ModelSpec(model=source.folder, head=head),
        blocks,
        origin=None if undecided else taken or None,
        wide=wide,
        taken=candidates if undecided else taken,
        look=look if _by_importance(spec) else None,
        reads=_reads(spec, wide, config, candidates),
        words=words_of(source.folder),
        undecided=undecided,
    )


def _by_importance(spec: StudentSpec) -> bool:
    return isinstance(spec.layers, ImportantLayers) or spec.width_by == "importance"


def _blocks(spec: StudentSpec, depth: int, look: Look | None) -> tuple[int, ...] | None:
    """The blocks that ``layers`` names, of ``depth``; None without it, or as long as what they are chosen by is not there."""
    if not isinstance(spec.layers, ImportantLayers):
        return None if spec.layers is None else chosen_blocks(spec.layers, depth)
    if spec.layers.keep > depth:
        raise ValueError(f"student.layers: the source has blocks 1 to {depth}, found keep: {spec.layers.keep}")
    assert look is not None
    return chosen_by_influence(look, spec.layers.keep)


def _reads(spec: StudentSpec, wide: PreTrainedConfig | None, config: PreTrainedConfig, candidates: Sequence[int]) -> frozenset[FeatureKey]:
    """What importance reads of a pass: of all blocks that may be taken, so that it does not depend on what the pass holds."""
    depth = block_keys(len(candidates)) if isinstance(spec.layers, ImportantLayers) else frozenset[FeatureKey]()
    if wide is None or spec.width_by == "first":
        return depth
    return depth | width_keys(Sizes.of(wide), Sizes.of(config), candidates)


def _class_names(task: Task, labels: int) -> tuple[dict[int, str], dict[str, int]]:
    """What the outputs of a new task head are called, and the reverse."""
    names = task.classes if len(task.classes) == labels else [f"LABEL_{number}" for number in range(labels)]
    return dict(enumerate(names)), {name: number for number, name in enumerate(names)}


def chosen_blocks(layers: tuple[int, ...] | str, available: int) -> tuple[int, ...]:
    """Blocks counted from 1 that ``layers`` of a recipe names, of ``available`` ones.

    Raises:
        ValueError: a block out of range; the message says how many there are.
    """
    if isinstance(layers, str):
        kind, number = layers.split()
        layers = (
            tuple(range(1, int(number) + 1))
            if kind == "first"
            else (tuple(range(int(number), available + 1, int(number))) or (int(number),))
        )
    wrong = [block for block in layers if not 1 <= block <= available]
    if wrong:
        raise ValueError(f"student.layers: the source has blocks 1 to {available}, found {wrong[0]}")
    return layers


def _own_name(config: PreTrainedConfig, name: str) -> str:
    """What this architecture calls the option ``name`` (GPT-2: n_layer)."""
    own: str = config.attribute_map.get(name, name)
    return own


def _changes(where: str, given: Mapping[str, object], tree: Mapping[str, object], config: PreTrainedConfig) -> dict[str, object]:
    changes = {}
    for name, value in given.items():
        own = _own_name(config, name)
        if own not in tree or own in ("model_type", "architectures", "id2label", "label2id"):
            known = sorted({*tree, *config.attribute_map})
            raise ValueError(f"student.{where}: unknown option {name!r} of {config.model_type}{did_you_mean(name, known)}")
        changes[own] = value
    return changes


def _per_block(tree: Mapping[str, object], depth: int, blocks: Sequence[int]) -> dict[str, object]:
    """The configuration's lists with one entry per block, such as layer_types, for ``blocks``; a deeper student makes them anew."""
    lists = {name: value for name, value in tree.items() if name.startswith("layer") and isinstance(value, list) and len(value) == depth}
    return {name: [value[block - 1] for block in blocks] if max(blocks, default=0) <= depth else None for name, value in lists.items()}


def _narrower(spec: StudentSpec, tree: Mapping[str, object], source_config: PreTrainedConfig) -> PreTrainedConfig:
    assert spec.width is not None
    changes = _changes("width", spec.width, tree, source_config)
    widths = {own: name for name in WIDTHS if (own := _own_name(source_config, name)) in tree}
    if others := sorted(changes.keys() - widths.keys()):
        raise ValueError(f"student.width: expected some of {', '.join(widths.values())}, found {', '.join(others)}")
    with plain_errors("student.width"):
        config = type(source_config).from_dict({**tree, **changes})
    assert isinstance(config, PreTrainedConfig)
    return config


def _outputs(spec: StudentSpec, source_head: Head, head: Head, task: Task) -> int | None:
    """Outputs of the student's task head; None where the source's stand."""
    if head not in LABELLED_HEADS:
        if spec.labels is not None:
            raise ValueError(f"student.labels goes with the heads {' and '.join(LABELLED_HEADS)}, not with {head}")
        return None
    if spec.labels is not None or head == source_head:
        return spec.labels
    if task.kind == "none":
        raise ValueError(f"the head {head} is new and the store's rows have no labels to count: give student.labels")
    return len(task.classes) or 1


@contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Sizes and types that do not fit are the recipe's fault: one message instead of a traceback."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from None
    except ValidationError as error:
        raise ValueError(explain(error, ModelShape, where)) from None
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None
