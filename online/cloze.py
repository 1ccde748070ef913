"""What a masked language model would write in a word's place.

Shapes: B masked rows, T padded tokens, V words of the model, W words that may be answered, K answers.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from online.batch import IGNORED, Batch, bucket, dense
from online.capture import Capture
from online.models import LoadedModel, check_length, forward
from online.rows import pad_id
from store.features import FeatureKey

BATCH_TOKENS = 8192
"""Padded tokens of a batch. No option: in a batch of another shape logits differ in their last bits, and with them now and then a word."""

_KEY = FeatureKey.parse("lm_logits@masked")

Span = tuple[int, int]
"""First character of a word, and the character after its last."""


class _Place(NamedTuple):
    """A token that is masked."""

    text: int
    word: int
    token: int


class Cloze:
    """A masked language model that fills in words.

    Args:
        loaded: Its weights lie on ``device``.
        max_length: Tokens of a text that it sees, special tokens included.

    Raises:
        ValueError: the model takes shorter rows, or its tokenizer is missing, slow, or has no mask token or no whole words.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device, max_length: int) -> None:
        if loaded.tokenizer is None or not loaded.tokenizer.is_fast:
            raise ValueError("filling in words needs a fast tokenizer (tokenizer.json), which knows where a token lies in the text")
        if loaded.tokenizer.mask_token_id is None:
            raise ValueError("filling in words needs a mask token, and this tokenizer has none; give a masked language model")
        try:
            check_length(loaded, max_length)
        except ValueError as error:
            raise ValueError(f"max_length: {error}") from None
        self._loaded, self._device, self._max_length = loaded, device, max_length
        self._tokenizer = copy.deepcopy(loaded.tokenizer)  # encoding changes its truncation settings
        self._tokenizer.truncation_side = "right"
        self._words = whole_words(self._tokenizer, loaded.shape.vocab)
        if not self._words:
            raise ValueError("filling in words needs tokens that are whole words, and this tokenizer has none")
        self._ids_W = torch.tensor(list(self._words), device=device)

    def answers(self, texts: Sequence[str], words: Sequence[Sequence[Span]], count: int) -> list[list[tuple[str, ...] | None]]:
        """For each of the ``words`` of each text the ``count`` likeliest words with this one masked, likeliest first.

        The other words of a text stay as they are. None stands for a word of several pieces, () for one that the model does not
        see: behind max_length tokens, or of characters that its tokenizer drops. The word itself may be among its answers.

        Answers depend on the texts that are asked together, in the last bits of their logits; on nothing else.
        """
        encoding = self._tokenizer(
            list(texts), truncation=True, max_length=self._max_length, return_attention_mask=False, return_token_type_ids=False
        )
        found: list[list[tuple[str, ...] | None]] = []
        places = []
        for number, text in enumerate(texts):
            found.append([])
            for word, span in enumerate(words[number]):
                tokens = _tokens(encoding, number, text, span)
                found[-1].append(() if tokens is None else None)
                if tokens is not None and len(tokens) == 1:
                    places.append(_Place(number, word, tokens[0]))
        for batch in _batches(places, encoding["input_ids"]):
            for place, ids in zip(batch, self._likeliest(batch, encoding["input_ids"], count).tolist(), strict=True):
                found[place.text][place.word] = tuple(self._words[number] for number in ids)
        return found

    def _likeliest(self, places: Sequence[_Place], ids: Sequence[Sequence[int]], count: int) -> Tensor:
        """[B, K] ids of the likeliest whole words at each place."""
        longest = max(bucket(len(ids[place.text])) for place in places)
        input_ids = torch.full((len(places), longest), pad_id(self._tokenizer))
        mask, labels = torch.zeros_like(input_ids, dtype=torch.bool), torch.full_like(input_ids, IGNORED)
        for row, place in enumerate(places):
            own = torch.tensor(ids[place.text])
            input_ids[row, : len(own)], mask[row, : len(own)] = own, True
            input_ids[row, place.token], labels[row, place.token] = self._tokenizer.mask_token_id, own[place.token]
        order = torch.arange(len(places))
        batch = Batch(order, input_ids, mask, None, None, None, labels, None, order).to(self._device)
        with torch.no_grad():
            with Capture(self._loaded, [_KEY]) as capture:
                forward(self._loaded, batch)
            logits_BV = dense(capture.features(batch), _KEY)
        return self._ids_W[logits_BV[:, self._ids_W].topk(min(count, len(self._words))).indices]


def whole_words(tokenizer: PreTrainedTokenizerBase, vocab: int) -> dict[int, str]:
    """Id -> text of each token that is a word by itself: of letters alone, and what the tokenizer makes of this text behind a space.

    Args:
        vocab: Words that the model has logits for.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(number for number in tokenizer.get_vocab().values() if number not in special and number < vocab)
    texts = [tokenizer.decode([number], clean_up_tokenization_spaces=False).strip() for number in ids]
    letters = {number: text for number, text in zip(ids, texts, strict=True) if text.isalpha()}
    if not letters:
        return {}
    back = tokenizer([f" {text}" for text in letters.values()], add_special_tokens=False)["input_ids"]
    return {number: text for (number, text), made in zip(letters.items(), back, strict=True) if made == [number]}


def _tokens(encoding: BatchEncoding, row: int, text: str, span: Span) -> tuple[int, ...] | None:
    """The first and the last token of a word, or the only one; None where there is none."""
    first, last = encoding.char_to_token(row, span[0]), encoding.char_to_token(row, span[1] - 1)
    if first is None:
        return None
    chars = encoding.token_to_chars(row, first)
    alone = text[chars.start : chars.end].strip() == text[slice(*span)]  # tokens of some models take the space before a word
    return (first,) if first == last and alone else (first, -1 if last is None else last)


def _batches(places: Sequence[_Place], ids: Sequence[Sequence[int]]) -> Iterator[list[_Place]]:
    """Places whose texts have one padded length, so many at a time as BATCH_TOKENS allow."""

    def padded(place: _Place) -> int:
        return bucket(len(ids[place.text]))

    for length, alike in groupby(sorted(places, key=padded), padded):
        rows, members = max(1, BATCH_TOKENS // length), list(alike)
        yield from (members[start : start + rows] for start in range(0, len(members), rows))
