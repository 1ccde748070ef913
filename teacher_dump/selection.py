"""What a recipe asks of its teacher, once the teacher is known: layers counted, words looked up, the impossible refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from online.derive import PAIRWISE
from online.families import FAMILIES
from online.rows_spec import RowsSpec
from store.codecs import check_bits, codec_of
from store.features import MANTISSA, Compression, FeatureKey, StoreDtype, neurons
from store.forms import word_form
from store.shape import Head, ModelShape
from teacher_dump.recipe import DumpRecipe, FeatureRequest

WORD_HEADS: tuple[Head, ...] = ("masked_lm", "causal_lm")
TASK_HEADS: tuple[Head, ...] = ("classification", "multiple_choice", "token_classification")
_NEEDS_HEAD: dict[str, tuple[Head, ...]] = {"lm_logits": WORD_HEADS, "head_input": WORD_HEADS, "task_logits": TASK_HEADS}

_LAYER = re.compile(r"(?P<site>[a-z_]+)\.(?P<layer>\*|-\d+)(?P<rest>(?:[@:].*)?)")
"""Layers that mean something only once the number of blocks is known."""


@dataclass(frozen=True)
class Request:
    """One feature of one block that the store must be able to answer."""

    key: FeatureKey
    dtype: StoreDtype
    ids: tuple[int, ...] = ()
    """Vocabulary ids, for the form ``select``."""
    keep_bits: int | None = None
    """Mantissa bits that are kept; all by default."""
    compression: Compression = "none"


def resolve(recipe: DumpRecipe, shape: ModelShape, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Request, ...]:
    """Every feature that ``recipe`` names, each key once, in the recipe's order.

    Args:
        tokenizer: None where ``recipe`` names no words.

    Raises:
        ValueError: an unknown feature, a layer out of range, a word of several tokens, a head that the feature lacks, or a type
            that it cannot be kept in.
    """
    check_bits(recipe.dtype, recipe.keep_bits)
    requests: dict[FeatureKey, Request] = {}
    for wanted in recipe.features:
        try:
            ids, dtype = _ids(wanted, shape, tokenizer), wanted.dtype or recipe.dtype
            bits, compression = _bits(wanted, recipe), _compression(wanted, recipe)
            for key in expand(wanted.key, shape):
                _check(key, shape)
                codec_of(key, dtype)
                request = Request(key, dtype, ids, bits, compression)
                if requests.setdefault(key, request) != request:
                    raise ValueError(f"{key} is asked for twice in different ways; keep one of them")
        except ValueError as error:
            raise ValueError(f"features: {wanted.key}: {error}") from None
    if not requests:
        raise ValueError("features: expected at least one, such as hidden.-1@all; `teacher-dump rows` builds a store without any")
    return tuple(requests.values())


def check_rows(requests: Sequence[Request], rows: RowsSpec) -> None:
    """Refuse features at tokens that ``rows`` do not mark; raises ValueError."""
    labelled = rows.objective != "plain" or rows.task.kind == "token"
    for request in requests:
        if request.key.positions == "masked" and rows.objective != "mlm":
            raise ValueError(f"features: {request.key} needs rows with masked tokens (rows.objective: mlm), found {rows.objective}")
        if request.key.positions == "labels" and not labelled:
            raise ValueError(
                f"features: {request.key} needs rows with token labels (rows.objective: mlm or causal), found {rows.objective}"
            )


def expand(text: str, shape: ModelShape) -> list[FeatureKey]:
    """The keys that ``text`` stands for: layer ``*`` is every block, a negative layer counts from the last.

    Raises:
        ValueError: an unknown feature, or a block that the model does not have.
    """
    match = _LAYER.fullmatch(text)
    if not match:
        keys = [FeatureKey.parse(text)]
        counted = [keys[0].layer]
    else:
        pattern = FeatureKey.parse(f"{match['site']}.1{match['rest']}")
        every = match["layer"] == "*"
        counted = list(range(_lowest(pattern), shape.layers + 1)) if every else [shape.layers + 1 + int(match["layer"])]
        keys = [pattern]
    lowest = _lowest(keys[0])
    if any(layer is not None and not lowest <= layer <= shape.layers for layer in counted):
        site = keys[0].site
        raise ValueError(f"the teacher has {shape.layers} blocks: expected {site}.{lowest} to {site}.{shape.layers}, or -1 for the last")
    return keys if not match else [FeatureKey.parse(f"{match['site']}.{layer}{match['rest']}") for layer in counted]


def _bits(wanted: FeatureRequest, recipe: DumpRecipe) -> int | None:
    """Mantissa bits to keep of a feature; None for all."""
    dtype, bits = wanted.dtype or recipe.dtype, wanted.keep_bits
    if bits is None and dtype in MANTISSA:  # what the recipe says for float types does not concern the others
        bits = recipe.keep_bits
    kept = check_bits(dtype, bits)
    if kept is not None and _compression(wanted, recipe) == "none":
        raise ValueError(f"keep_bits: {kept} bits of {dtype} take the room of all {MANTISSA[dtype]} without compression: zstd; add it")
    return kept


def _compression(wanted: FeatureRequest, recipe: DumpRecipe) -> Compression:
    """Of a feature: as it says, as the recipe does, or with zstd where its form leaves places unused."""
    form = word_form(wanted.key.rpartition(":")[2])
    return wanted.compression or ("zstd" if form is not None and form.ragged else recipe.compression)


def _lowest(key: FeatureKey) -> int:
    """Only hidden states have a block 0, the embedding output."""
    return 0 if key.site == "hidden" else 1


def _check(key: FeatureKey, shape: ModelShape) -> None:
    if key.pass_name:
        raise ValueError(f"the recipe's pass_name says whose it is; write {key.of('')}")
    heads = _NEEDS_HEAD.get(key.site, (shape.head,))
    if shape.head not in heads:
        family = FAMILIES.get(shape.family)
        could = [head for head in heads if family is None or head in family.heads]
        raise ValueError(
            f"teacher.head is {shape.head}, which has no {key.site}; a {shape.family} teacher has it with head: {' or '.join(could)}"
        )
    row = key.site == "task_logits" and shape.head != "token_classification"
    if (key.positions == "row") != row:
        raise ValueError(f"expected {'task_logits@row' if row else f'{key.name}@all'} of a teacher with head {shape.head}, found {key}")
    if key.site in PAIRWISE and key.positions != "all":
        raise ValueError(f"{key.site} has a value for each pair of tokens; expected {key.at('all')}, found {key}")
    if key.kept:
        neurons(shape.width_of(key.site), key.kept)
    if form := word_form(key.form):
        form.check(shape.vocab)


def _ids(wanted: FeatureRequest, shape: ModelShape, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Vocabulary ids of a ``select``: those given as numbers, then the words."""
    if not wanted.key.endswith(":select"):
        if wanted.ids or wanted.words:
            raise ValueError("ids and words belong to the form select, as in lm_logits@labels:select")
        return ()
    for number in wanted.ids:
        if not 0 <= number < shape.vocab:
            raise ValueError(f"ids: expected 0 to {shape.vocab - 1}, found {number}")
    ids = (*wanted.ids, *(_id(word, tokenizer) for word in wanted.words))
    if len(set(ids)) < len(ids):
        raise ValueError(f"ids and words name a word twice: {list(ids)}")
    return ids


def _id(word: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    assert tokenizer is not None, "words need a tokenizer"
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        raise ValueError(f"words: expected one token each, but {word!r} is {pieces or 'none'}; give one of them by its id, in ids")
    if ids[0] == tokenizer.unk_token_id and word != tokenizer.unk_token:
        raise ValueError(f"words: the tokenizer does not know {word!r}")
    return int(ids[0])
