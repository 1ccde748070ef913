"""The small files beside a shipped teacher: the resolved recipe, and the measured errors of derived features and of kept words."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from online.figures import table
from store import layout
from store.features import FeatureSpec
from store.plain import read_plain
from store.strict import load_json

RECIPE = "recipe.yaml"
ERRORS = "derived_errors.json"
"""Derived feature -> ||derived - live|| / ||live|| over a few rows."""

WORD_ERRORS = "word_errors.json"
"""Feature -> WordError, where the pass has forms of word predictions."""

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class WordError:
    """Of a form of word predictions, over some tokens."""

    tokens: int
    error: float
    """|e - g| / |g|, of all tokens together: root of the summed squares."""
    angle: float
    """Degrees between e and g, mean over tokens."""
    norm: float
    """|e| / |g|, of all tokens together."""
    mean_error: float
    """|e - g| / |g| of the gradients' mean over the tokens: what is random goes with their number, what is biased stays."""
    kl: float | None
    """KL(t || what is kept), nats: words that are not kept share the mass of all others (of their band) evenly. None where words are
    drawn, since what is drawn gives most words nothing."""


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


def written(errors: Mapping[str, WordError]) -> str:
    """As the file beside a shipped teacher holds them."""
    return json.dumps({key: asdict(error) for key, error in errors.items()}, indent=1)


def read_word_errors(store: Path, pass_name: str) -> dict[str, WordError]:
    """Those that were measured when a pass began; empty where there is no such file."""
    try:
        tree = load_json(read_plain(layout.model(store, pass_name) / WORD_ERRORS, _MOST_BYTES))
        return {str(key): WordError(**{name: value[name] for name in value}) for key, value in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def describe_word_errors(errors: Mapping[str, WordError], specs: Sequence[FeatureSpec]) -> Iterator[str]:
    """Lines for people; ``specs`` are the stored features of the pass, from which others are derived."""
    if not errors:
        return
    units = {spec.key: f"{spec.at_most}{spec.unit_bytes:,} B" for spec in specs}
    tokens = max(error.tokens for error in errors.values())
    yield (
        f"words kept, against the whole prediction on {tokens:,} tokens (gradient in the logits of a student that has the teacher's at "
        "temperature 2):"
    )
    lines = [("", "one unit", "gradient off by", "angle", "length", "mean of all off by", "KL")]
    for key, error in errors.items():
        kl = "" if error.kl is None else f"{error.kl:.3g}"
        row = (f"{error.error:.2g}", f"{error.angle:.1f}\u00b0", f"{error.norm:.2f}", f"{error.mean_error:.2g}", kl)
        lines.append((key, units.get(key, "derived"), *row))
    yield table(lines, right="23456")
