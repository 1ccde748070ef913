"""The student's first weights: random, chosen teacher blocks (cut narrower), a folder, or an earlier phase's output.

What a student will be follows from its blueprint; weights are read when it is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from online.families import FAMILIES, attention_implementation
from online.fingerprints import weights_fingerprint
from online.kept_words import KeptWords, map_words, read_kept_words, without_padding_beyond
from online.models import HEADS, LoadedModel, ModelSpec, load_config, load_model, load_tokenizer
from online.quiet import quiet
from store.errors import MissingFeature
from student_train.adapters import adapt
from student_train.blocks import Source, block_pattern, check_blocks, read_weights
from student_train.blueprint import Blueprint, plain_errors
from student_train.importance import width_scores
from student_train.narrow import Scores, Sizes, cut, kept, roles
from student_train.recipe import ImportantLayers
from student_train.vocabulary import all_words, choose, forced_words, move_padding, take_rows


@dataclass(frozen=True)
class Start:
    """A student before training, and what a person should know of its making."""

    student: LoadedModel
    notices: tuple[str, ...]
    fingerprint: str
    """Of the weights and the configuration at this moment; that of ``student`` changes as it trains."""

    @classmethod
    def of(cls, student: LoadedModel, *notices: str) -> Self:
        return cls(student, notices, weights_fingerprint(student.model, student.weights))


def check_start(blueprint: Blueprint) -> None:
    """Refuse, without reading weights, what :func:`build` could not make; what an earlier phase will leave is not looked for.

    Raises:
        ValueError: blocks that the source lacks, or sizes that no model can have.
    """
    if blueprint.spec.vocabulary is not None:
        assert blueprint.words is not None
        forced_words(blueprint.spec.vocabulary, load_tokenizer(blueprint.tokenizer), blueprint.words)
        blueprint = all_words(blueprint)
    if blueprint.taken and not blueprint.undecided:
        check_blocks(blueprint.source, blueprint.config.model_type, blueprint.taken)
    if blueprint.spec.random is not None:
        _on_paper(blueprint)
    if blueprint.spec.rest == "source":
        check_blocks(blueprint.source, blueprint.config.model_type, ())
    if blueprint.wide is not None:
        roles(_on_paper(replace(blueprint, config=blueprint.wide)), _on_paper(blueprint))


def build(blueprint: Blueprint, seed: int) -> Start:
    """The student of ``blueprint``, in eval mode, on the CPU; what starts from random weights follows from ``seed``.

    Raises:
        ValueError: the source lacks a block, an embedding or a norm; the message names the option that mends it.
        MissingFeature: the activations that importance is measured by are not there yet.
    """
    spec = blueprint.spec
    if blueprint.undecided:
        raise MissingFeature("student: the hidden states that blocks are chosen by are not in the store yet; start again when they are")
    # a seed of torch's own generator, put back afterwards: making a student must not move the dropout of its training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student, notices = _made(blueprint) if spec.vocabulary is None else _compressed(blueprint)
        if spec.lora is not None:
            notices = [*notices, adapt(student, spec.lora)]
    return Start.of(student, *notices)


def _made(blueprint: Blueprint) -> tuple[LoadedModel, list[str]]:
    """The student with the words that it starts from."""
    spec = blueprint.spec
    if spec.model is not None:
        student = load_model(spec.model)
        student.model.config.id2label, student.model.config.label2id = blueprint.config.id2label, blueprint.config.label2id
        return student, []
    if blueprint.custom is not None:
        made = ModelSpec(model=blueprint.source.folder, head=blueprint.head, dtype=spec.dtype, modules=blueprint.custom)
        return load_model(made), []
    tokenizer = load_tokenizer(ModelSpec(model=blueprint.source.folder, head=blueprint.head))
    if blueprint.head == "classification" and blueprint.config.pad_token_id is None:
        blueprint.config.pad_token_id = tokenizer.pad_token_id or 0  # transformers refuses batches without one
    notices: list[str] = []
    if spec.random is not None:
        student, notices = (_fresh(blueprint, tokenizer), []) if spec.rest == "random" else _copy(blueprint, tokenizer)
    elif blueprint.wide is None:
        student, notices = _copy(blueprint, tokenizer)
    else:
        wide, notices = _copy(replace(blueprint, config=blueprint.wide), tokenizer)
        student = _cut(blueprint, wide)
    if (words := read_kept_words(blueprint.source.folder)) is not None:
        _take_words(student, blueprint, words)
    return student, [*notices, *(_choices(blueprint) if spec.random is None else [])]


def _compressed(blueprint: Blueprint) -> tuple[LoadedModel, list[str]]:
    """The student with the words that its ``vocabulary`` leaves, and what they are."""
    words = choose(blueprint)
    if blueprint.spec.random is not None and blueprint.spec.rest == "random":
        student, notices = _made(blueprint)
    else:
        whole, notices = _made(all_words(blueprint))
        take_rows(whole.model, blueprint.head, words.kept)
        student = LoadedModel.of(whole.model, blueprint.head, whole.tokenizer)
    _take_words(student, blueprint, words)
    dropped = words.words - len(words.kept)
    return student, [
        *notices,
        f"vocabulary: {len(words.kept):,} of {words.words:,} words are kept; {words.representatives:,} different ones of them stand for "
        f"the {dropped:,} others",
    ]


def _take_words(student: LoadedModel, blueprint: Blueprint, words: KeptWords) -> None:
    """Let ``student``, which has a row for each of ``words``, take ids of the whole vocabulary."""
    if blueprint.spec.random is not None and blueprint.spec.rest == "random":
        move_padding(student.model, words)
    map_words(student.model, words)


def _fresh(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """The student with random weights."""
    with plain_errors("student.random"), without_padding_beyond(blueprint.config):
        model = HEADS[blueprint.head].from_config(  # type: ignore[attr-defined]
            blueprint.config,
            dtype=getattr(torch, blueprint.spec.dtype),
            attn_implementation=attention_implementation(blueprint.config.model_type),
        )
    model.config.pad_token_id = blueprint.config.pad_token_id
    return LoadedModel.of(model.eval(), blueprint.head, tokenizer)


def _copy(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase) -> tuple[LoadedModel, list[str]]:
    """Blocks (but where they are to be random), embeddings, norms and head of the source, under the student's names; and what starts fresh
    or is left out.
    """
    source, config = blueprint.source, blueprint.config
    shape = blueprint.shape  # says so if the family or the head is unknown
    numbers, random_blocks = block_pattern(config.model_type), blueprint.spec.random is not None
    weights = read_weights(source, config.model_type, () if random_blocks else blueprint.blocks or range(1, shape.layers + 1))
    student = _on_paper(blueprint)
    others, model_class = _other_layers(blueprint, student) if random_blocks else set(), type(student)
    weights = {name: weight for name, weight in weights.items() if _layer(name, student) not in others}
    with quiet(), plain_errors(str(source.folder)), without_padding_beyond(config):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=getattr(torch, blueprint.spec.dtype),
            attn_implementation=attention_implementation(blueprint.config.model_type),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.config.pad_token_id = config.pad_token_id
    fresh = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if random_blocks:
        fresh = [name for name in fresh if not numbers.search(name)]
    _refuse_gaps(model, [name for name in fresh if _layer(name, student) not in others], source)
    fresh_modules = sorted({name.rpartition(".")[0] for name in fresh})
    notices = [f"{module} starts from random weights: {source.folder} has none that fit" for module in fresh_modules]
    unused = [name for name in sorted(report["unexpected_keys"]) if numbers.search(name)]
    if unused:
        notices.append(f"not taken over, for the student has no place for them: {', '.join(unused)}")
    return LoadedModel.of(model.eval(), blueprint.head, tokenizer), notices


def _layer(name: str, model: PreTrainedModel) -> str:
    """The layer that a weight belongs to, without the prefix of the base model."""
    return name.rpartition(".")[0].removeprefix(f"{model.base_model_prefix}.")


def _other_layers(blueprint: Blueprint, student: PreTrainedModel) -> set[str]:
    """Layers that are of another kind in the source. MobileBERT's NoNorm has the names and sizes of a layer norm, and is none."""
    source = dict(_on_paper(replace(blueprint, config=load_config(blueprint.source.folder))).named_modules())
    return {
        name.removeprefix(f"{student.base_model_prefix}.")
        for name, layer in student.named_modules()
        if name in source and type(layer) is not type(source[name])
    }


def _cut(blueprint: Blueprint, wide: LoadedModel) -> LoadedModel:
    """The student, whose weights are parts of those of ``wide``."""
    student = _fresh(blueprint, wide.tokenizer)
    axes, scores = roles(wide.model, student.model), Scores()
    if blueprint.spec.width_by == "importance":
        assert blueprint.look is not None
        scores = width_scores(blueprint.look, wide, axes, Sizes.of(blueprint.config), blueprint.taken)
    keep = kept(wide.model.config, blueprint.config, scores)
    student.model.load_state_dict(cut(wide.model, axes, keep))
    return student


def _choices(blueprint: Blueprint) -> list[str]:
    """What a person should know of blocks that importance chose, and of a width that was cut."""
    spec, notices = blueprint.spec, []
    if isinstance(spec.layers, ImportantLayers):
        notices.append(f"blocks {', '.join(map(str, blueprint.taken))} of the source were chosen by importance")
    if blueprint.wide is not None:
        before, after = Sizes.of(blueprint.wide), Sizes.of(blueprint.config)
        notices.append(
            f"weights were cut out of wider ones ({before} -> {after}; the {'first' if spec.width_by == 'first' else 'most important'} "
            "stay), which is known to hurt: assistants of truncated width ended at 54 points where others reached 65"
        )
    return notices


def _on_paper(blueprint: Blueprint) -> PreTrainedModel:
    """The student without memory for its weights."""
    with torch.device("meta"), plain_errors("student"), without_padding_beyond(blueprint.config):
        model = HEADS[blueprint.head].from_config(blueprint.config)  # type: ignore[attr-defined]
    assert isinstance(model, PreTrainedModel)
    return model


def _refuse_gaps(model: PreTrainedModel, fresh: Sequence[str], source: Source) -> None:
    """Only heads (a pooler is one) and norms that some blocks of a family lack (ModernBERT's first) may start fresh."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    body = [name.removeprefix(prefix) for name in fresh if name.startswith(prefix)]
    norm = FAMILIES[model.config.model_type].norm
    gaps = [name for name in body if not name.startswith("pooler.") and not (norm and f".{norm}." in name)]
    if gaps:
        raise ValueError(f"{source.folder} lacks weights that the student needs, or has them in other sizes: {', '.join(gaps[:5])}")
