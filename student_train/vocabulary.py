"""Which words a student keeps, and which of them stands for each of the others.

GLMD's vocabulary compression (Tan, Tam, Wang, Gong, Zhao, Zhang, Tang, "Are Intermediate Layers and Labels Really Necessary? A General
Language Model Distillation Method", Findings of ACL 2023, arXiv 2306.06625): the words that the corpus has most often are kept, and a
dropped one is read as the kept word with the largest inner product of the pretrained teacher's word embeddings.

Shapes: V words, K kept words, D words of a block, W width of a word embedding.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from online.batch import IGNORED
from online.kept_words import KeptWords, kept_words, without_padding_beyond
from online.models import HEADS, LoadedModel, load_config, load_tokenizer
from store.pool import pools
from store.reader import Store
from store.shape import Head, ModelShape
from student_train.blocks import Source, read_weights
from student_train.blueprint import Blueprint
from student_train.methods.base import Method
from student_train.recipe import DataSpec, VocabularySpec

MULTIPLE = 128
"""The number of kept words is rounded up to a multiple of this, as GLMD's authors do (15,360 of 30,522 at half)."""
_ROWS, _PRODUCTS = 4096, 1 << 24
"""Rows that are counted, and inner products that are compared, at a time."""


def kept_size(rate: float, words: int) -> int:
    """How many of ``words`` are kept: ceil(int(rate * words) / 128) * 128, and never more than there are."""
    return min(words, max(1, -(-int(rate * words) // MULTIPLE)) * MULTIPLE)


def compressed(blueprint: Blueprint, corpus: tuple[DataSpec, ...]) -> Blueprint:
    """``blueprint`` with the words that its ``vocabulary`` leaves, which are counted in ``corpus``.

    Raises:
        ValueError: what the student starts from keeps only some words already, or is given by module paths.
    """
    spec, config = blueprint.spec.vocabulary, copy.deepcopy(blueprint.config)
    assert spec is not None
    if blueprint.words is not None:
        raise ValueError(
            f"student.vocabulary: what the student starts from keeps {config.vocab_size:,} of {blueprint.words:,} words already, and their "
            "map is made once: leave vocabulary out to go on with them"
        )
    if blueprint.custom is not None:
        raise ValueError("student.vocabulary: it needs a model of a known family, found one given by module paths")
    words = config.vocab_size
    config.vocab_size = kept_size(spec.rate, words)
    return replace(blueprint, config=config, words=words, corpus=corpus)


def all_words(blueprint: Blueprint) -> Blueprint:
    """A compressed ``blueprint`` before its words are dropped."""
    config = copy.deepcopy(blueprint.config)
    config.vocab_size = blueprint.words
    return replace(blueprint, config=config)


def as_seen(teachers: dict[str, ModelShape], blueprint: Blueprint) -> dict[str, ModelShape]:
    """The shapes of teachers as methods see them: of their words a student that keeps some gets those (student_train.bundle)."""
    if blueprint.words is None:
        return teachers
    kept, words = blueprint.shape.vocab, blueprint.words
    return {name: shape.model_copy(update={"vocab": kept}) if shape.vocab >= words else shape for name, shape in teachers.items()}


def check_words(name: str, method: Method, blueprint: Blueprint) -> None:
    """Refuse a method that a student with some words only cannot learn by.

    Raises:
        ValueError: it reads a form of the teacher's words from which the distribution over kept words does not follow, or writes rows.
    """
    if blueprint.words is None:
        return
    kept = f"the student keeps {blueprint.shape.vocab:,} of {blueprint.words:,} words"
    if forms := sorted({key.form for key in method.teacher_keys if key.site == "lm_logits" and key.form}):
        raise ValueError(
            f"methods: {name}: {kept}, and the teacher's distribution over them needs the logits of all of them, which {forms[0]} does not "
            "hold: read dense lm_logits, which a store derives from head_input"
        )
    if method.rewrites:
        raise ValueError(f"methods: {name}: {kept}; rows that it writes itself would lack the others: give a student with all words")


def forced_words(spec: VocabularySpec, tokenizer: PreTrainedTokenizerBase, words: int) -> frozenset[int]:
    """Ids that are kept however rare they are: special tokens, and the words of ``keep``, also in lower case where that is one token.

    Raises:
        ValueError: a word that the tokenizer does not know, or cuts into pieces; ``unk`` without an unknown token.
    """
    if spec.map == "unk" and tokenizer.unk_token_id is None:
        raise ValueError("student.vocabulary: map: unk needs an unknown token, and this tokenizer has none; give inner_product")
    forced = {number for number in tokenizer.all_special_ids if number < words}
    for word in spec.keep:
        pieces = tokenizer.tokenize(word)
        numbers = tokenizer.convert_tokens_to_ids(pieces)
        if len(pieces) != 1:
            found = " ".join(pieces) if pieces else "nothing"
            raise ValueError(f"student.vocabulary: keep: expected words of one token each; {word!r} is cut into {len(pieces)}: {found}")
        if numbers[0] == tokenizer.unk_token_id and word != tokenizer.unk_token:
            raise ValueError(f"student.vocabulary: keep: the tokenizer does not know {word!r}")
        lower = tokenizer.tokenize(word.lower())
        forced.update(numbers)
        if len(lower) == 1 and lower[0] != tokenizer.unk_token:
            forced.update(tokenizer.convert_tokens_to_ids(lower))
    if len(forced) > kept_size(spec.rate, words):
        raise ValueError(
            f"student.vocabulary: {len(forced)} words are to be kept in any case, of {kept_size(spec.rate, words)}: raise rate"
        )
    return frozenset(forced)


def choose(blueprint: Blueprint) -> KeptWords:
    """The words that the student of ``blueprint`` keeps; follows from rows, tokenizer and embeddings alone, so it is the same on all ranks.

    Raises:
        ValueError: words of ``keep`` that are no single tokens, a source without weights, or ids that it has no embedding for.
    """
    spec, words = blueprint.spec.vocabulary, blueprint.words
    assert spec is not None
    assert words is not None
    tokenizer = load_tokenizer(blueprint.tokenizer)
    answers = {number for one in blueprint.corpus for number in Store.open(one.store).manifest.rows.verbalisers}
    forced = forced_words(spec, tokenizer, words) | answers
    kept_K = torch.from_numpy(ranked(count(blueprint.corpus, words), forced)[: kept_size(spec.rate, words)])
    if spec.map == "unk":
        unknown = int((kept_K == tokenizer.unk_token_id).nonzero().item())
        return places_of(kept_K, words, torch.full((words,), unknown))
    source = blueprint.source if spec.source is None else Source(spec.source, "base")
    vectors_VW = input_embedding(source)
    if len(vectors_VW) != words:
        raise ValueError(f"student.vocabulary: expected the embeddings of {words} words, found {len(vectors_VW)} in {source.folder}")
    return places_of(kept_K, words, nearest(vectors_VW, kept_K, spec.map))


def check_verbalisers(student: LoadedModel, store: Store) -> None:
    """Words that stand for classes must be among those that the student keeps, or it could not tell their classes apart.

    Raises:
        ValueError: one is not; the message says what the phase that chose the words should have kept.
    """
    words, ids = kept_words(student.model), store.manifest.rows.verbalisers
    if words is None:
        return
    dropped = [number for number in ids if int(words.kept[words.places[number]]) != number]
    if dropped:
        names = dropped if student.tokenizer is None else student.tokenizer.convert_ids_to_tokens(dropped)
        raise ValueError(
            f"the classes of {store.where} are the words {', '.join(map(str, names))}, which the student does not keep: name them with "
            "student.vocabulary: keep in the phase that chooses its words"
        )


def count(data: Sequence[DataSpec], words: int, most: int | None = None) -> NDArray[np.int64]:
    """[V] how often each word stands in the rows of ``data``, masked ones as what they were; of several maskings of a text in the first.

    Args:
        most: Count the first so many rows of each of ``data`` (groups, where rows are read together); None: all.

    Raises:
        ValueError: an id that is none of the ``words``.
    """
    counts = np.zeros(words, np.int64)
    for one in data:
        store = Store.open(one.store)
        pool = pools(store, one.split, one.where, one.compared_pass)[0]
        end = len(pool) if most is None else min(most, len(pool))
        for first in range(0, end, _ROWS):
            packed = store.all_tokens(pool.take(np.arange(first, min(first + _ROWS, end))))
            ids = packed["input_ids"]
            if store.manifest.rows.objective == "mlm":
                labels = packed["token_labels"]
                ids = np.where(labels == IGNORED, ids, labels)
            if len(ids) and ids.max() >= words:
                raise ValueError(f"student.vocabulary: {store.where} has the token {ids.max()}, its source embeds {words} words")
            counts += np.bincount(ids, minlength=words)
    return counts


def ranked(counts_V: NDArray[np.int64], forced: frozenset[int]) -> NDArray[np.int64]:
    """[V] all ids: those of ``forced``, then the others, each by how often they come, and of equal ones by id."""
    others = np.ones(len(counts_V), np.bool_)
    others[list(forced)] = False
    order: NDArray[np.int64] = np.lexsort((np.arange(len(counts_V)), -counts_V, others)).astype(np.int64)
    return order


def places_of(kept_K: Tensor, words: int, nearest_V: Tensor) -> KeptWords:
    """The map that leads kept words to themselves and the others to their place in ``nearest_V`` [V]."""
    places_V = nearest_V.clone()
    places_V[kept_K] = torch.arange(len(kept_K))
    assert len(places_V) == words
    return KeptWords(kept_K, places_V)


def nearest(vectors_VW: Tensor, kept_K: Tensor, measure: str) -> Tensor:
    """[V] place in ``kept_K`` of the word nearest to each, the first of equal ones; in blocks, so that no V x V numbers are in memory.

    Args:
        measure: ``inner_product`` as a tied head decodes, the ``cosine``, or the ``euclidean`` distance.
    """
    vectors_VW = vectors_VW.float()
    if measure == "cosine":
        vectors_VW = F.normalize(vectors_VW, dim=1)
    kept_KW = vectors_VW[kept_K]
    minus_K = kept_KW.square().sum(1) / 2 if measure == "euclidean" else torch.zeros(len(kept_K))
    blocks = vectors_VW.split(max(1, _PRODUCTS // len(kept_K)))
    return torch.cat([(block_DW @ kept_KW.T - minus_K).argmax(1) for block_DW in blocks])


def input_embedding(source: Source) -> Tensor:
    """[V, W] the word embedding of a model's folder, without loading the model.

    Raises:
        ValueError: the folder has no weights, or none of a word embedding.
    """
    config = load_config(source.folder)
    with torch.device("meta"), without_padding_beyond(config):
        model = HEADS["base"].from_config(config)  # type: ignore[attr-defined]
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    weights = read_weights(source, config.model_type, ())
    found = next((weight for key, weight in weights.items() if key.removeprefix(f"{model.base_model_prefix}.") == f"{name}.weight"), None)
    if found is None:
        raise ValueError(
            f"student.vocabulary: {source.folder} holds no word embedding; give vocabulary a source, such as the teacher's folder"
        )
    return found


def take_rows(model: PreTrainedModel, head: Head, rows: Tensor) -> None:
    """Make ``model`` one of ``len(rows)`` words, with what it has for the words ``rows``, in their order.

    That is its embedding, and its word head with its bias, tied or not: whatever has another size in a model with a word more.
    """
    config = copy.deepcopy(model.config)
    config.vocab_size += 1
    with torch.device("meta"), without_padding_beyond(config):
        longer = HEADS[head].from_config(config)  # type: ignore[attr-defined]
    sizes = {name: weight.shape for name, weight in longer.named_parameters(remove_duplicate=False)}
    made: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        axes = [axis for axis, (before, after) in enumerate(zip(weight.shape, sizes[name], strict=True)) if before != after]
        if not axes:
            continue
        (axis,) = axes
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.detach().index_select(axis, rows), weight.requires_grad)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, leaf, made[id(weight)])
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(rows)
        elif isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = module.weight.shape
    for module in model.modules():
        if isinstance(getattr(module, "vocab_size", None), int):
            module.vocab_size = len(rows)
    model.config.vocab_size = len(rows)


def move_padding(model: PreTrainedModel, words: KeptWords) -> None:
    """Of a model with random weights whose padding has another row now: swap both, for that row starts as zeros."""
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None and model.config.pad_token_id is not None:
        rows = [embedding.padding_idx, int(words.places[model.config.pad_token_id])]
        with torch.no_grad():
            embedding.weight[rows] = embedding.weight[rows[::-1]]
