"""The small files beside a shipped teacher: the resolved recipe, and the measured errors of derived features."""

from collections.abc import Mapping
from pathlib import Path

from store import layout
from store.plain import read_plain
from store.strict import load_json

RECIPE = "recipe.yaml"
ERRORS = "derived_errors.json"
"""Derived feature -> ||derived - live|| / ||live|| over a few rows."""

_MOST_BYTES = 1 << 20


def read_errors(store: Path, pass_name: str) -> dict[str, float]:
    """The measured errors of a pass; empty where the file is gone."""
    try:
        tree = load_json(read_plain(layout.model(store, pass_name) / ERRORS, _MOST_BYTES))
        return {str(key): float(value) for key, value in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def describe_errors(errors: Mapping[str, float]) -> list[str]:
    """Lines for people: the largest error of each site."""
    if not errors:
        return []
    worst: dict[str, tuple[float, str]] = {}
    for key, error in errors.items():
        site = key.partition("@")[0].partition(".")[0]
        worst[site] = max(worst.get(site, (-1.0, "")), (error, key))
    found = ", ".join(f"{key} {error:.1e}" for error, key in worst.values())
    return [f"derived from what is stored, against the live teacher (relative error, worst block): {found}"]
