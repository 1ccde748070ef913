"""How much blocks, hidden channels, heads and feed-forward units of a teacher matter, by what a pass of a store holds.

Prune, then distil (Minitron: Muralidharan et al. 2024, arXiv 2407.14679), without running the teacher again. Its scores are mean
magnitudes over a small sample; what is as in the paper (its formulas are unverified), and what is ours, is said at each. All is
computed in float64.

Shapes: N tokens, D hidden channels, L blocks, H query heads of width C, K = key heads * C, U feed-forward units.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from online.batch import dense
from online.collate import collate
from online.families import submodule
from online.models import LoadedModel
from store.errors import MissingFeature
from store.features import FeatureKey
from store.filters import Where
from store.pool import pools
from store.reader import Store
from store.remote import url_of
from store.shape import ModelShape
from store.table import Ints
from store.together import PassName
from student_train.blocks import block_pattern
from student_train.narrow import Role, Scores, Sizes
from student_train.teacher import StoredTeacher

TOKENS = 32_768
"""As many tokens are looked at: those of the first rows of the split, special tokens included."""

_BATCH_TOKENS = 2048

Keys = frozenset[FeatureKey]


@dataclass(frozen=True)
class Look:
    """Where the activations lie that say what matters: rows of a store, and the pass that answered for them."""

    store: Path
    pass_name: PassName
    split: str
    where: Where | None
    teacher: ModelShape
    """What the pass must be of: a model shaped like the one whose weights the student takes."""


def block_keys(depth: int) -> Keys:
    """What :func:`chosen_by_influence` reads of a teacher of ``depth`` blocks."""
    return frozenset(FeatureKey("hidden", layer) for layer in range(depth + 1))


def width_keys(before: Sizes, after: Sizes, blocks: Collection[int]) -> Keys:
    """What :func:`width_scores` reads for a student that takes ``blocks`` (from 1): nothing of what does not shrink."""
    channels = {FeatureKey("final"), *(FeatureKey("input", block) for block in blocks)} if after.channels < before.channels else set()
    heads = {FeatureKey("value", block) for block in blocks} if after.heads < before.heads else set()
    return frozenset(channels | heads)


def chosen_by_influence(look: Look, keep: int) -> tuple[int, ...] | None:
    """The ``keep`` blocks (from 1, ascending) of the highest :func:`block_influence`; None where the pass does not hold it yet."""
    if url_of(look.store) is None and not look.store.exists():
        return None
    try:
        influence_L = block_influence(look)
    except MissingFeature:
        return None
    best = influence_L.argsort(descending=True, stable=True)[:keep]
    return tuple(number + 1 for number in best.sort().values.tolist())


@lru_cache(maxsize=8)
def block_influence(look: Look) -> Tensor:
    """How far each block turns a token's hidden state, [L]: 1 - the mean cosine of what enters and what leaves it.

    Source: block influence in ShortGPT (Men et al. 2024, arXiv 2403.03853); Minitron measures depth by it too.

    Raises:
        MissingFeature: the pass holds no hidden states of all blocks for these rows; the message says what mends it.
        ValueError: the pass is of a teacher of another shape.
    """
    keys = [FeatureKey("hidden", layer) for layer in range(look.teacher.layers + 1)]

    def turned(hidden_ND: Sequence[Tensor]) -> Tensor:
        return torch.stack([1 - F.cosine_similarity(a, b, dim=-1) for a, b in pairwise(hidden_ND)], dim=1)

    return _mean(look, keys, turned)


def width_scores(look: Look, source: LoadedModel, axes: Mapping[str, tuple[Role, ...]], after: Sizes, blocks: Sequence[int]) -> Scores:
    """Scores of what shrinks from ``source`` to ``after``.

    Args:
        source: The student at its source's width; its block l is block ``blocks[l]`` (from 1) of the teacher.
        axes: What its weights' axes mean (narrow.roles).

    Raises:
        MissingFeature, ValueError: as :func:`block_influence`.
    """
    before = Sizes.of(source.model.config)
    return Scores(
        channel_scores(look, blocks) if after.channels < before.channels else None,
        head_scores(look, source, blocks) if after.heads < before.heads else None,
        unit_scores(source.model, axes) if after.units < before.units else None,
    )


def channel_scores(look: Look, blocks: Sequence[int]) -> Tensor:
    """Mean magnitude of each hidden channel, summed over what enters the attention of ``blocks`` and the final state, [D].

    Minitron scores channels by the outputs of all norms, which these are but for the norm in front of the feed-forward layers
    (no store keeps that one). The paper compares several ways to take the mean; the plain one of magnitudes is our choice.
    """
    keys = [FeatureKey("final"), *(FeatureKey("input", block) for block in sorted(set(blocks)))]
    return _mean(look, keys, lambda values_ND: torch.stack([value_ND.abs() for value_ND in values_ND]).sum(0))


def head_scores(look: Look, source: LoadedModel, blocks: Sequence[int]) -> Tensor:
    """Mean length of what a head would add to the hidden state if it attended to one token alone, [L, H] for each of ``blocks``.

    That is ``|W_h v|``, ``v`` the token's value vector and W_h the head's part of the output projection. Ours: Minitron takes the
    length of a head's output, which would need attention of every pair of tokens here.
    """
    shape = source.shape
    projections = [_output_projection(source, layer) for layer in range(1, len(blocks) + 1)]
    grams = [projection_DHC.permute(1, 2, 0) @ projection_DHC.transpose(0, 1) for projection_DHC in projections]  # [H, C, C] each

    def written(values_NK: Sequence[Tensor]) -> Tensor:
        lengths = []
        for value_NK, gram_HCC in zip(values_NK, grams, strict=True):
            value_NGC = value_NK.unflatten(-1, (shape.kv_heads, shape.head_width))
            value_NHC = value_NGC.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
            squares_NH = torch.einsum("nhc,hcd,nhd->nh", value_NHC, gram_HCC, value_NHC)
            lengths.append(squares_NH.clamp(min=0).sqrt())  # rounding may leave less than zero
        return torch.stack(lengths, dim=1)

    return _mean(look, [FeatureKey("value", block) for block in blocks], written)


def unit_scores(source: PreTrainedModel, axes: Mapping[str, tuple[Role, ...]]) -> Tensor:
    """Product of the lengths of all weights of a feed-forward unit, [L, U]: into it (with its bias), of its gate, and out of it.

    Ours: no store keeps activations of units, by which Minitron scores them, so weights must do.
    """
    number = block_pattern(source.config.model_type)
    squares: dict[tuple[int, str], Tensor] = {}
    for name, weight in source.state_dict().items():
        match = number.search(name)
        for axis, role in enumerate(axes[name]):
            if role in ("units", "gated units"):
                assert match is not None
                square_U = (
                    weight.detach().double().movedim(axis, 0).flatten(1).square().sum(1) if weight.dim() > 1 else weight.double() ** 2
                )
                for half, part_U in enumerate(square_U.chunk(2) if role == "gated units" else (square_U,)):
                    place = int(match[1]), f"{name.rpartition('.')[0]}.{half}"
                    squares[place] = squares.get(place, torch.zeros_like(part_U)) + part_U
    blocks = range(source.config.num_hidden_layers)
    return torch.stack([torch.stack([square for (at, _), square in squares.items() if at == block]).sqrt().prod(0) for block in blocks])


def _output_projection(source: LoadedModel, layer: int) -> Tensor:
    """Weights [D, H, C] of the dense layer behind the heads of block ``layer``."""
    module = submodule(source.block(layer), source.family.attention_output)
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight_DQ = weight.detach().double().T if isinstance(module, Conv1D) else weight.detach().double()
    return weight_DQ.unflatten(1, (source.shape.heads, source.shape.head_width))


@torch.no_grad()
def _mean(look: Look, keys: Sequence[FeatureKey], measure: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Mean over the tokens that are looked at of ``measure``, which takes the values [N, width] of ``keys`` and gives [N, ...]."""
    store = Store.open(look.store)
    teacher = StoredTeacher(store, look.pass_name, keys)
    for field in ("layers", "width", "heads", "kv_heads", "head_width"):
        found, expected = getattr(teacher.shape, field), getattr(look.teacher, field)
        if found != expected and (teacher.shape.attends or field in ("layers", "width")):
            raise ValueError(
                f"importance is measured on pass {look.pass_name} of {look.store}, whose teacher has {field} {found}, but the student's "
                f"source has {expected}: expected models of one shape"
            )
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rows in _rows(store, look):
        batch = collate(store, rows)
        features = teacher.features(batch, teacher.fetch(rows))
        values_N = [dense(features, key)[batch.mask].double() for key in keys]
        total = total + measure(values_N).sum(0)
        tokens += len(values_N[0])
    return total / tokens


def _rows(store: Store, look: Look) -> Iterator[Ints]:
    """The rows that are looked at, in batches of about _BATCH_TOKENS tokens."""
    pool = pools(store, look.split, look.where, look.pass_name)[0]
    rows = pool.take(np.arange(min(len(pool), TOKENS)))
    lengths = store.rows.at(rows).length
    before = np.cumsum(lengths) - lengths
    rows, batch = rows[before < TOKENS], before[before < TOKENS] // _BATCH_TOKENS
    for number in np.unique(batch):
        yield rows[batch == number]
