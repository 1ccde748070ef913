"""Responses that a causal language model writes itself, as rows to learn from.

Words are drawn by inverting the cumulative distribution at numbers that the caller gives, one for each row and word, and not from a global
generator: what a row's response is depends on the weights, its prompt and its own numbers alone. Rounding that changes with a batch's
padding (about 1e-7) moves a word only where a number falls that close to a border.

Shapes: B rows, T padded tokens, P tokens of the longest prompt, L new words at most, V words.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from online.batch import IGNORED, Batch, bucket
from online.models import LoadedModel, check_length
from online.ranks import talking
from online.rows import pad_id
from online.sharding import Whole
from online.tensor_parallel import Split


@dataclass(frozen=True)
class Writing:
    """How responses are written."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Words are drawn from the likeliest ones alone that together reach this probability; 1 for all."""
    words: int | None = None
    """Only the first so many words of the vocabulary are written: those that another model has too; None for all."""
    mixed: float = 0.0
    """Share of ``other`` in the distribution that words are drawn from: mixed p_other + (1 - mixed) q, each at its temperature 1."""
    other: LoadedModel | None = None
    """Another model, that reads along where ``mixed`` is greater than 0 (MiniLLM's teacher)."""


def has_prompt(batch: Batch) -> Tensor:
    """[B] bool: rows of which only some words are scored, so that those in front of them are a prompt; packed rows have none.

    A prompt of a single token is none: rows with it are scored as plain text is.
    """
    if batch.documents is not None:
        return torch.zeros_like(batch.rows, dtype=torch.bool)
    return batch.labelled.sum(1) < batch.lengths - 1


def prompt_lengths(batch: Batch) -> Tensor:
    """[B] int64: a row's tokens up to the first one whose successor is scored; all of them where none is."""
    labelled = batch.labelled
    first_B = labelled.int().argmax(1) + 1 - batch.mask.int().argmax(1)
    return torch.where(labelled.any(1), first_B, batch.lengths)


def end_tokens(*models: LoadedModel) -> frozenset[int]:
    """Tokens that end a response: those of the tokenizers, with which rows end, and those of the models' generation settings."""
    found: set[int] = set()
    for loaded in models:
        ends = getattr(loaded.model.generation_config, "eos_token_id", None)
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if loaded.tokenizer is not None and loaded.tokenizer.eos_token_id is not None:
            found.add(loaded.tokenizer.eos_token_id)
    return frozenset(found)


@torch.no_grad()
def roll_out(loaded: LoadedModel, batch: Batch, writing: Writing, chances_BL: Tensor | None, ends: Collection[int]) -> Batch:
    """The prompts of ``batch`` with responses that ``loaded`` has written, labels on the response alone.

    A response ends with the first of ``ends``, which belongs to it, or after ``max_new_tokens`` without one. Rows, groups and domains stay;
    rows are padded on the right to a bucket. The model writes in eval mode and is left as it was; no generator is touched.

    Args:
        chances_BL: [B, L] float64 numbers in [0, 1), one for each word; None takes the likeliest words.

    Raises:
        ValueError: packed rows; a prompt and a response that are longer than a model's positions.
    """
    if batch.documents is not None:
        raise ValueError("responses are written to one prompt in a row, found packed rows: build them with long: truncate and a response")
    lengths_B = prompt_lengths(batch)
    longest = int(lengths_B.max())
    others = [] if writing.other is None else [writing.other]
    for model in (loaded, *others):
        try:
            check_length(model, longest + writing.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{error}, or give a smaller max_new_tokens (here {writing.max_new_tokens})") from None
    pad = 0 if loaded.tokenizer is None else pad_id(loaded.tokenizer)
    place_P = torch.arange(longest, device=batch.mask.device)
    mask_BP = place_P >= longest - lengths_B[:, None]
    from_B1 = batch.mask.int().argmax(1)[:, None]
    source_BP = (place_P - longest + lengths_B[:, None] + from_B1).clamp(min=0)
    prompts_BP = batch.input_ids.gather(1, source_BP).masked_fill(~mask_BP, pad)
    response_BL = _written(loaded, prompts_BP, mask_BP, writing, chances_BL, ends, pad)
    return _joined(batch, prompts_BP, lengths_B, response_BL, ends, pad)


def _written(
    loaded: LoadedModel, prompts_BP: Tensor, mask_BP: Tensor, writing: Writing, chances_BL: Tensor | None, ends: Collection[int], pad: int
) -> Tensor:
    """[B, up to L] the words after left-padded prompts; what stands behind a row's end is of no account."""
    model = loaded.model
    partners = [one for one in (loaded, writing.other) if one is not None]
    in_step = any(not isinstance(one.weights, Whole) for one in partners)
    words = _Words(writing, chances_BL, mask_BP)
    settings = GenerationConfig(
        max_new_tokens=writing.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=None
    )
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # a folder's own settings (penalties, top_k) would change what is drawn
    try:
        written: Tensor = model.generate(
            inputs=prompts_BP,
            attention_mask=mask_BP.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([words]),
            stopping_criteria=StoppingCriteriaList([_AllEnded(ends, prompts_BP.shape[1], in_step)]),
            synced_gpus=False,  # ranks that need each other stop together, by themselves
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    return written[:, prompts_BP.shape[1] :]


def _joined(batch: Batch, prompts_BP: Tensor, lengths_B: Tensor, response_BL: Tensor, ends: Collection[int], pad: int) -> Batch:
    """Prompts (padded on the left) and responses as rows padded on the right."""
    ended_BL = torch.isin(response_BL, torch.tensor(sorted(ends), dtype=torch.int64, device=response_BL.device))
    before_BL = ended_BL.int().cumsum(1) - ended_BL.int()
    totals_B = lengths_B + (before_BL == 0).sum(1)
    place_T = torch.arange(bucket(int(totals_B.max())), device=prompts_BP.device)
    all_BX = torch.cat([prompts_BP, response_BL], 1)
    source_BT = (place_T + prompts_BP.shape[1] - lengths_B[:, None]).clamp(max=all_BX.shape[1] - 1)
    return answered(batch, all_BX.gather(1, source_BT), lengths_B, totals_B, pad)


def answered(batch: Batch, ids_BT: Tensor, prompts_B: Tensor, totals_B: Tensor, pad: int) -> Batch:
    """``batch`` with other texts [B, T] in its rows: ``totals_B`` [B] tokens each, of which the first ``prompts_B`` [B] are a prompt."""
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    mask_BT = place_T < totals_B[:, None]
    ids_BT = ids_BT.masked_fill(~mask_BT, pad)
    scored_BT = (place_T >= prompts_B[:, None] - 1) & (place_T < totals_B[:, None] - 1)
    return Batch(
        rows=batch.rows,
        input_ids=ids_BT,
        mask=mask_BT,
        segments=None,
        documents=None,
        position_ids=None,
        token_labels=torch.where(scored_BT, ids_BT.roll(-1, 1), IGNORED),
        row_labels=batch.row_labels,
        groups=batch.groups,
        domains=batch.domains,
        written=torch.ones_like(batch.rows, dtype=torch.bool),
    )


def side_by_side(given: Batch, written: Batch, pad: int) -> Batch:
    """[2B] the rows of ``given``, each followed by the one of ``written`` that has its prompt."""
    longest = max(given.mask.shape[1], written.mask.shape[1])

    def longer(values: Tensor, fill: int | bool) -> Tensor:
        return F.pad(values, (0, longest - values.shape[1]), value=fill)

    def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.stack([one, other], 1).flatten(0, 1)

    def padded(name: str, fill: int | bool) -> Tensor:
        joined = both(longer(getattr(given, name), fill), longer(getattr(written, name), fill))
        assert joined is not None
        return joined

    own_B = torch.ones_like(given.rows, dtype=torch.bool)
    return Batch(
        rows=given.rows.repeat_interleave(2),
        input_ids=padded("input_ids", pad),
        mask=padded("mask", False),
        segments=None,
        documents=None,
        position_ids=None,
        token_labels=padded("token_labels", IGNORED),
        row_labels=both(given.row_labels, written.row_labels),
        groups=given.groups.repeat_interleave(2),
        domains=both(given.domains, written.domains),
        written=both(~own_B, own_B),
    )


class _Words(LogitsProcessor):
    """Leaves of each row's scores one word: that which is drawn, or the likeliest one."""

    def __init__(self, writing: Writing, chances_BL: Tensor | None, mask_BP: Tensor) -> None:
        self._writing, self._chances_BL, self._prompt = writing, chances_BL, mask_BP.shape[1]
        self._reader = _Reader(writing.other, mask_BP) if writing.other is not None and writing.mixed else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        words = self._writing.words or scores.shape[-1]
        probs_BV = (scores[:, :words].double() / self._writing.temperature).softmax(-1)
        if self._reader is not None:
            share = self._writing.mixed
            probs_BV = share * self._reader(input_ids)[:, :words].double().softmax(-1) + (1 - share) * probs_BV
        if self._writing.top_p < 1:
            probs_BV = _nucleus(probs_BV, self._writing.top_p)
        if self._chances_BL is None:
            chosen_B = probs_BV.argmax(-1)
        else:
            sums_BV = probs_BV.cumsum(-1)
            drawn_B1 = self._chances_BL[:, input_ids.shape[1] - self._prompt, None].to(sums_BV.device) * sums_BV[:, -1:]
            chosen_B = torch.searchsorted(sums_BV, drawn_B1, right=True).squeeze(1).clamp(max=words - 1)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, chosen_B[:, None], 0.0)


def _nucleus(probs_BV: Tensor, mass: float) -> Tensor:
    """[B, V] the probabilities of the fewest likeliest words that together reach ``mass``, and 0 for all others."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= mass * sorted_BV.sum(-1, keepdim=True), 0))


class _Reader:
    """Word logits of another model for texts that grow by a word a time."""

    def __init__(self, loaded: LoadedModel, mask_BP: Tensor) -> None:
        assert not isinstance(loaded.weights, Split), "all ranks of such a model read the rows of one"
        self._model: PreTrainedModel = loaded.model
        self._mask_BT = mask_BP
        self._cache = DynamicCache(config=loaded.model.config)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """[B, V] logits of the word that follows ``input_ids`` [B, T], which begin with what was read before."""
        read = self._cache.get_seq_length()
        if grown := input_ids.shape[1] - self._mask_BT.shape[1]:
            self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(input_ids), grown)], 1)
        positions_BT = (self._mask_BT.long().cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=input_ids[:, read:],
            attention_mask=self._mask_BT.long(),
            position_ids=positions_BT[:, read:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _AllEnded(StoppingCriteria):
    """Stops when every row has ended; of ranks that hold a model together, when those of all have: none may be alone in a forward pass."""

    def __init__(self, ends: Collection[int], prompt: int, in_step: bool) -> None:
        self._ends, self._prompt = torch.tensor(sorted(ends), dtype=torch.int64), prompt
        self._in_step = in_step

    def __call__(self, input_ids: Tensor, scores: object) -> Tensor:
        response_BL = input_ids[:, self._prompt :]
        over = torch.isin(response_BL, self._ends.to(response_BL.device)).any(1).all()
        if self._in_step:
            running = (~over).long()
            with talking():
                dist.all_reduce(running)
            over = running == 0
        return over.expand(len(input_ids))
