"""What of a pass still follows from its features once some of them have gone or changed."""

import json
from collections.abc import Mapping
from pathlib import Path

from store import layout
from store.features import FeatureKey
from store.manifest import PassInfo
from store.publish import replace
from store.recode import same_numbers
from teacher_dump.records import ERRORS, WORD_ERRORS, read_errors, read_word_errors, written


def settle(info: PassInfo) -> tuple[PassInfo, tuple[str, ...]]:
    """The pass with the requests that its features cover and the weights that these need, and the requests that are lost."""
    stored = {spec.feature: spec.unit_bytes for spec in info.features}
    wanted = [FeatureKey.parse(key) for key in info.requested]
    if all(key in stored for key in wanted):
        return info.model_copy(update={"statics": ()}), ()
    from online.planner import cover, uncovered  # torch takes seconds

    statics = {static.name for static in info.statics}
    lost = set(uncovered(wanted, stored, statics, info.shape, info.wiring))
    kept = [key for key in wanted if key not in lost]
    needed = cover(kept, stored, statics, info.shape, info.wiring).statics if kept else ()
    requested = tuple(text for text, key in zip(info.requested, wanted, strict=True) if key not in lost)
    return (
        info.model_copy(
            update={
                "requested": requested or tuple(str(key) for key in stored),
                "statics": tuple(static for static in info.statics if static.name in needed),
            }
        ),
        tuple(str(key) for key in wanted if key in lost),
    )


def forget_errors(store: Path, before: Mapping[str, PassInfo], after: Mapping[str, PassInfo]) -> None:
    """Take measured errors of derived features out of a store's passes where they are about other features than before."""
    for name, info in after.items():
        errors, stored = read_errors(store, name), {spec.key: spec for spec in before[name].features}
        same = all(spec.key in stored and same_numbers(stored[spec.key], spec) for spec in info.features)
        left = {key: error for key, error in errors.items() if same and key in info.requested}
        if left != errors:
            replace(layout.model(store, name) / ERRORS, json.dumps(left, indent=1).encode())
        words = read_word_errors(store, name)
        kept = {key: error for key, error in words.items() if same and key in info.requested}
        if kept != words:
            replace(layout.model(store, name) / WORD_ERRORS, written(kept).encode())
