"""Weights that a model folder lacks: they were drawn at random when it was loaded."""

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from online.models import ModelSpec


def refuse_random_weights(spec: "ModelSpec", model: PreTrainedModel, report: dict[str, set[str]]) -> None:
    """Raise ValueError for weights drawn at random anywhere but in a new head that was asked for."""
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    missing = set(report["missing_keys"]) | mismatched
    if spec.head == "base" and missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # no feature reads it, and a random one must not be exported
        return
    prefix = f"{model.base_model_prefix}."
    body = {name for name in missing if spec.head == "base" or (name.startswith(prefix) and not name.startswith(f"{prefix}pooler."))}
    if body:
        raise ValueError(f"{spec.model} lacks weights of the model itself, such as {min(body)} ({len(body)} in all)")
    if missing and not spec.new_head:
        raise ValueError(f"{spec.model} has no {spec.head} head that fits: it lacks {min(missing)}; new_head: true starts a new head")
