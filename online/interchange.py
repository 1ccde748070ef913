"""What a model answers once rows have taken hidden states of their partners: interchange interventions.

Source: Geiger et al. 2021, Causal Abstractions of Neural Networks, section 3; Wu et al. 2022 (DIITO, arXiv 2112.02505), section 3.
Shapes: B rows, T padded tokens, W width.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from online.batch import Batch, Features, dense
from online.capture import Capture
from online.intervene import Intervene
from online.models import LoadedModel, forward
from online.written_attention import Write
from store.features import FeatureKey
from store.intervention import Intervention

Alternatives = Sequence[Sequence[int]]
"""Blocks that are written together, one list for each alternative that a pair's draw may choose."""


def answered(loaded: LoadedModel, batch: Batch, keys: Iterable[FeatureKey], intervention: Intervention | None = None) -> Features:
    """The features ``keys`` of a forward pass on ``batch`` without gradient, float32; with an intervention of one that comes after another.

    Both passes are run whatever the rows are, so that the ranks of a sharded model stay in step.

    Raises:
        ValueError: an intervention where the rows stand without partners.
    """
    if intervention is None:
        with torch.no_grad(), Capture(loaded, keys) as capture:
            forward(loaded, batch)
            return capture.features(batch)
    with torch.no_grad():
        own = answered(loaded, batch, written(intervention.layers))
        return counterfactual(loaded, batch, keys, intervention.layers, own)


def counterfactual(loaded: LoadedModel, batch: Batch, keys: Iterable[FeatureKey], layers: Alternatives, own: Features) -> Features:
    """The features ``keys`` of a forward pass on ``batch`` in which each row takes hidden states of its partner, float32.

    With gradient where it is on: into the pass itself, and through ``own`` into the one that the partners' states are of.

    Args:
        layers: Alternative ``draw % len(layers)`` holds for a pair; the outputs of its blocks are written.
        own: The rows' own hidden states, those of ``written(layers)``.

    Raises:
        ValueError: the rows stand without partners.
    """
    writes = taken(batch, layers, own)
    with Intervene(loaded, writes), Capture(loaded, keys, grad=torch.is_grad_enabled()) as capture:
        forward(loaded, batch)
        return capture.features(batch)


def written(layers: Alternatives) -> list[FeatureKey]:
    """The sites that any of the alternatives writes."""
    return [FeatureKey("hidden", block) for block in sorted({block for blocks in layers for block in blocks})]


def taken(batch: Batch, layers: Alternatives, own: Features) -> Mapping[FeatureKey, Write]:
    """For each written site what it becomes: in rows whose draw chooses it, at the places of their plan, the partner's ``own`` state."""
    if batch.interchange is None or batch.draws is None:
        raise ValueError(
            "an intervention needs rows in pairs, both in a batch; build rows with interchange: {} (rows.interchange in the dump's recipe)"
        )
    alternative_B = batch.draws % len(layers)
    places_B = torch.arange(len(alternative_B), device=alternative_B.device)
    partner_B = (places_B ^ 1).clamp(max=len(places_B) - 1)
    index_BT = batch.interchange.clamp(min=0)
    writes = {}
    for key in written(layers):
        numbers = [number for number, blocks in enumerate(layers) if key.layer in blocks]
        here_B = torch.stack([alternative_B == number for number in numbers]).any(0)
        takes_BT1 = ((batch.interchange >= 0) & here_B[:, None])[..., None]
        writes[key] = _where(takes_BT1, dense(own, key)[partner_B[:, None], index_BT])
    return writes


def _where(takes_BT1: Tensor, source_BTW: Tensor) -> Write:
    def write(hidden_BTW: Tensor) -> Tensor:
        return torch.where(takes_BT1, source_BTW.to(hidden_BTW.dtype), hidden_BTW)

    return write
