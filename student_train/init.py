"""The student's first weights: random, chosen teacher blocks, a folder, or an earlier phase's output.

What a student will be (``blueprint``) follows from configurations alone; weights are read when it is built.
Blocks are counted from 1 here and from 0 in the names of weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from online.families import FAMILIES, attention_implementation
from online.models import HEADS, CustomModules, LoadedModel, ModelSpec, load_config, load_model, load_tokenizer, model_shape
from online.quiet import quiet
from store.manifest import Task
from store.shape import Head, ModelShape
from store.strict import did_you_mean
from student_train.blocks import Source, block_pattern, check_blocks, read_weights
from student_train.recipe import StudentSpec

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

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.config, self.head, self.custom)


@dataclass(frozen=True)
class Start:
    """A student before training, and what a person should know of its making."""

    student: LoadedModel
    notices: tuple[str, ...]


def folder_blueprint(spec: StudentSpec, task: Task) -> Blueprint:
    """The student that is ``spec.model``, a Hugging Face folder, as it is; a new head has the classes of ``task``."""
    assert spec.model is not None
    config = load_config(spec.model.model, spec.model.trust_remote_code)
    if spec.model.labels is not None:
        config.num_labels = spec.model.labels
    if spec.model.new_head:
        config.id2label, config.label2id = _class_names(task, config.num_labels)
    return Blueprint(spec, config, spec.model.head, Source(spec.model.model, spec.model.head), spec.model, None, spec.model.modules)


def continued_blueprint(spec: StudentSpec, earlier: Blueprint, folder: Path, task: Task) -> Blueprint:
    """The student that goes on from what an ``earlier`` phase leaves in ``folder``."""
    source = Source(folder, earlier.head)
    if earlier.custom is not None:
        return Blueprint(spec, earlier.config, earlier.head, source, earlier.tokenizer, None, earlier.custom)
    return replace(derived_blueprint(spec, source, earlier.config, task), tokenizer=earlier.tokenizer)


def derived_blueprint(spec: StudentSpec, source: Source, source_config: PreTrainedConfig, task: Task) -> Blueprint:
    """The student that ``spec`` makes of ``source``; ``task`` counts the outputs of a task head that the source lacks.

    Raises:
        ValueError: a block that the source lacks, an unknown option, or sizes that do not fit each other.
    """
    tree = source_config.to_dict()
    depth = source_config.num_hidden_layers
    blocks = None if spec.layers is None else chosen_blocks(spec.layers, depth)
    if blocks is not None:
        tree.update(_per_block(tree, depth, blocks), **{_own_name(source_config, "num_hidden_layers"): len(blocks)})
    if spec.random is not None:
        tree.update(_changes(spec.random, tree, source_config))
        changed = tree[_own_name(source_config, "num_hidden_layers")]
        if isinstance(changed, int) and changed != depth:
            tree.update(_per_block(tree, depth, range(1, changed + 1)))
    head = spec.head or source.head
    labels = _outputs(spec, source.head, head, task)
    if labels is not None:
        tree["id2label"], tree["label2id"] = _class_names(task, labels)
    with _plain_errors("student"):
        config = type(source_config).from_dict(tree)
    return Blueprint(spec, config, head, source, ModelSpec(model=source.folder, head=head), blocks)


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


def check_start(blueprint: Blueprint) -> None:
    """Refuse, without reading weights, what :func:`build` could not make; what an earlier phase will leave is not looked for.

    Raises:
        ValueError: blocks that the source lacks, or sizes that no model can have.
    """
    if blueprint.blocks is not None:
        check_blocks(blueprint.source, blueprint.config.model_type, blueprint.blocks)
    if blueprint.spec.random is not None:
        _on_paper(blueprint)


def build(blueprint: Blueprint, seed: int) -> Start:
    """The student of ``blueprint``, in eval mode, on the CPU; what starts from random weights follows from ``seed``.

    Raises:
        ValueError: the source lacks a block, an embedding or a norm; the message names the option that mends it.
    """
    spec = blueprint.spec
    # a seed of torch's own generator, put back afterwards: making a student must not move the dropout of its training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.model is not None:
            student = load_model(spec.model)
            student.model.config.id2label, student.model.config.label2id = blueprint.config.id2label, blueprint.config.label2id
            return Start(student, ())
        if blueprint.custom is not None:
            made = ModelSpec(model=blueprint.source.folder, head=blueprint.head, dtype=spec.dtype, modules=blueprint.custom)
            return Start(load_model(made), ())
        tokenizer = load_tokenizer(ModelSpec(model=blueprint.source.folder, head=blueprint.head))
        if blueprint.head == "classification" and blueprint.config.pad_token_id is None:
            blueprint.config.pad_token_id = tokenizer.pad_token_id or 0  # transformers refuses batches without one
        if spec.random is None:
            return _copy(blueprint, tokenizer)
        with _plain_errors("student.random"):
            model = HEADS[blueprint.head].from_config(  # type: ignore[attr-defined]
                blueprint.config,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=attention_implementation(blueprint.config.model_type),
            )
    return Start(LoadedModel.of(model.eval(), blueprint.head, tokenizer), ())


def _copy(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase) -> Start:
    """Blocks, embeddings, norms and head of the source, under the student's names."""
    source, config = blueprint.source, blueprint.config
    shape = blueprint.shape  # says so if the family or the head is unknown
    weights = read_weights(source, config.model_type, blueprint.blocks or range(1, shape.layers + 1))
    model_class = _on_paper(blueprint)
    with quiet(), _plain_errors(str(source.folder)):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, blueprint.spec.dtype),
            attn_implementation=attention_implementation(blueprint.config.model_type),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fresh = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    _refuse_gaps(model, fresh, source)
    fresh_modules = sorted({name.rpartition(".")[0] for name in fresh})
    notices = [f"{module} starts from random weights: {source.folder} has none that fit" for module in fresh_modules]
    unused = [name for name in sorted(report["unexpected_keys"]) if block_pattern(config.model_type).search(name)]
    if unused:
        notices.append(f"not taken over, for the student has no place for them: {', '.join(unused)}")
    return Start(LoadedModel.of(model.eval(), blueprint.head, tokenizer), tuple(notices))


def _on_paper(blueprint: Blueprint) -> type[PreTrainedModel]:
    """The class of the student, after making one without memory for its weights."""
    with torch.device("meta"), _plain_errors("student"):
        return type(HEADS[blueprint.head].from_config(blueprint.config))  # type: ignore[attr-defined]


def _own_name(config: PreTrainedConfig, name: str) -> str:
    """What this architecture calls the option ``name`` (GPT-2: n_layer)."""
    own: str = config.attribute_map.get(name, name)
    return own


def _changes(random: Mapping[str, object], tree: Mapping[str, object], config: PreTrainedConfig) -> dict[str, object]:
    changes = {}
    for name, value in random.items():
        own = _own_name(config, name)
        if own not in tree or own in ("model_type", "architectures", "id2label", "label2id"):
            known = sorted({*tree, *config.attribute_map})
            raise ValueError(f"student.random: unknown option {name!r} of {config.model_type}{did_you_mean(name, known)}")
        changes[own] = value
    return changes


def _per_block(tree: Mapping[str, object], depth: int, blocks: Sequence[int]) -> dict[str, object]:
    """The configuration's lists with one entry per block, such as layer_types, for ``blocks``; a deeper student makes them anew."""
    lists = {name: value for name, value in tree.items() if name.startswith("layer") and isinstance(value, list) and len(value) == depth}
    return {name: [value[block - 1] for block in blocks] if max(blocks, default=0) <= depth else None for name, value in lists.items()}


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


def _refuse_gaps(model: PreTrainedModel, fresh: Sequence[str], source: Source) -> None:
    """Only heads (a pooler is one) and norms that some blocks of a family lack (ModernBERT's first) may start fresh."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    body = [name.removeprefix(prefix) for name in fresh if name.startswith(prefix)]
    norm = FAMILIES[model.config.model_type].norm
    gaps = [name for name in body if not name.startswith("pooler.") and not (norm and f".{norm}." in name)]
    if gaps:
        raise ValueError(f"{source.folder} lacks weights that the student needs, or has them in other sizes: {', '.join(gaps[:5])}")


@contextmanager
def _plain_errors(where: str) -> Iterator[None]:
    """Sizes and types that do not fit are the recipe's fault: one message instead of a traceback."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from None
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None
