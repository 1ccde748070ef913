"""The words that a student with a smaller vocabulary keeps, and which of them stands for each of the others.

Texts stay in the ids of the teacher's tokenizer: the student's word embedding looks each id up in a table first, so whatever runs the
student needs to know nothing of it. What leaves the student, word logits, is in its own order: that of the kept words.

Shapes: V words of the tokenizer, K kept words, B rows, T padded tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from online.batch import IGNORED
from store.features import FeatureKey

FILE = "vocabulary.safetensors"
"""Beside the weights of a model that keeps only some words."""


@dataclass(frozen=True)
class KeptWords:
    """A map of a vocabulary to a smaller one (GLMD, Tan et al. 2023, arXiv 2306.06625)."""

    kept: Tensor
    """[K] int64 ids of the kept words, in the order of the student's embedding and head."""
    places: Tensor
    """[V] int64 for each id the place in ``kept`` of itself, or of the kept word that stands for it."""

    @property
    def words(self) -> int:
        """V."""
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both tables."""
        digest = hashlib.sha256()
        for table in (self.kept, self.places):
            digest.update(f"{len(table)} ".encode())
            digest.update(table.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def representatives(self) -> int:
        """How many different kept words stand for the dropped ones."""
        dropped_V = torch.ones(self.words, dtype=torch.bool, device=self.places.device)
        dropped_V[self.kept] = False
        return len(self.places[dropped_V].unique())

    @property
    def stand_ins(self) -> Tensor:
        """[V] int64 for each id itself, or the id of the kept word that stands for it."""
        return self.kept[self.places]

    def labels(self, labels_BT: Tensor) -> Tensor:
        """Word labels as places; what is IGNORED stays so. Different words that one kept word stands for become the same label."""
        return torch.where(labels_BT == IGNORED, IGNORED, self.places[labels_BT.clamp(min=0)])

    def write(self, folder: Path) -> None:
        """Leave the map in a model's folder."""
        save_file({"kept": self.kept.cpu().contiguous(), "places": self.places.cpu().contiguous()}, folder / FILE)


def read_kept_words(folder: Path) -> KeptWords | None:
    """The map in a model's folder; None where the model has all words.

    Raises:
        ValueError: a file that is damaged, or no such map.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        tables = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if tables.keys() != {"kept", "places"} or any(table.dtype != torch.int64 or table.dim() != 1 for table in tables.values()):
        raise ValueError(
            f"{path} is no vocabulary: expected the int64 lists kept and places, found {', '.join(sorted(tables)) or 'nothing'}"
        )
    kept, places = tables["kept"], tables["places"]
    in_range = len(kept) and len(places) and kept.min() >= 0 and kept.max() < len(places)
    if not in_range or not torch.equal(places[kept], torch.arange(len(kept))) or not 0 <= places.min() <= places.max() < len(kept):
        raise ValueError(f"{path} is damaged: its places do not lead to the words that it keeps; take the folder from where it was made")
    return KeptWords(kept, places)


def mapped_by(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> KeptWords:
    """The map in a student's folder, for rows in which it is applied to the text itself.

    Raises:
        ValueError: there is none, or it is one of fewer words than ``tokenizer`` has.
    """
    words = read_kept_words(folder)
    if words is None:
        raise ValueError(f"rows.vocabulary: expected the folder of a student with a smaller vocabulary, found no {FILE} in {folder}")
    if tokenizer is not None and words.words < (needed := max(tokenizer.get_vocab().values()) + 1):
        raise ValueError(
            f"rows.vocabulary: {folder} maps {words.words:,} words, and the tokenizer has {needed:,}: give a student of its own"
        )
    return words


def words_of(folder: Path) -> int | None:
    """Ids of the tokenizer that the model in ``folder`` maps to fewer words; None where it has all."""
    words = read_kept_words(folder)
    return None if words is None else words.words


def map_words(model: PreTrainedModel, words: KeptWords) -> None:
    """From now on ``model``, whose embedding has a row for each kept word, takes ids of the whole vocabulary.

    The tables become buffers of the embedding that no checkpoint holds: a file beside the weights does (``FILE``).
    The padding token's row, where it gets no gradient, is that of the word in its place.

    Raises:
        ValueError: the embedding has another number of rows.
    """
    embedding = model.get_input_embeddings()
    if embedding.num_embeddings != len(words.kept):
        raise ValueError(
            f"the model has {embedding.num_embeddings} words, its vocabulary file keeps {len(words.kept)}: they do not belong together"
        )
    assert not hasattr(embedding, "places"), "mapped twice"
    embedding.register_buffer("kept", words.kept.to(embedding.weight.device), persistent=False)
    embedding.register_buffer("places", words.places.to(embedding.weight.device), persistent=False)
    if embedding.padding_idx is not None and model.config.pad_token_id is not None:
        embedding.padding_idx = int(words.places[model.config.pad_token_id])
    embedding.mapping = embedding.register_forward_pre_hook(_to_places)


def unmap_words(model: PreTrainedModel) -> KeptWords | None:
    """Undo :func:`map_words`: ``model`` takes places again. The words that it keeps, or None where it was not mapped."""
    words, embedding = kept_words(model), model.get_input_embeddings()
    if words is not None:
        embedding.mapping.remove()
        for name in ("kept", "places", "mapping"):
            delattr(embedding, name)
    return words


def take_words(model: PreTrainedModel, folder: Path, pad: int | None) -> None:
    """Let ``model``, loaded from ``folder`` and with the padding token ``pad``, take ids of the whole vocabulary if a map lies there."""
    model.config.pad_token_id = pad
    if (words := read_kept_words(folder)) is not None:
        map_words(model, words)


def kept_words(model: PreTrainedModel) -> KeptWords | None:
    """The words that ``model`` keeps, on its device; None where it has all."""
    embedding = next((module for module in model.modules() if hasattr(module, "places")), None)
    return None if embedding is None else KeptWords(embedding.kept, embedding.places)


def refuse_own_words(model: PreTrainedModel, keys: Iterable[FeatureKey]) -> None:
    """A teacher must not answer with words in an order that nobody else knows.

    Raises:
        ValueError: ``model`` keeps only some words, and one of ``keys`` is about words.
    """
    words = kept_words(model)
    about = sorted(str(key) for key in keys if key.site in ("lm_logits", "head_input"))
    if words is not None and about:
        raise ValueError(
            f"{about[0]}: this teacher has {len(words.kept):,} of {words.words:,} words, in an order of its own; give its expanded folder "
            "(student-train export FOLDER OUT --to expanded), which answers with all words and thinks the same of those"
        )


@contextmanager
def without_padding_beyond(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, a model can be made whose padding token has no row of its own number in a smaller embedding."""
    pad, words = config.pad_token_id, getattr(config, "vocab_size", 0)
    if pad is None or pad < words:
        yield
        return
    config.pad_token_id = 0
    try:
        yield
    finally:
        config.pad_token_id = pad


def _to_places(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ids_BT, *rest = args
    places = module.places
    assert isinstance(places, Tensor)
    return places[ids_BT], *rest
