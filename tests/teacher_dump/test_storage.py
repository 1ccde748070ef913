"""How features are kept: types, rounding and compression of a recipe and of its features."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_dump import Outcome, Tree

from store import FeatureKey, Store, decode
from store.features import FeatureSpec

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

MIXED: list[Tree] = [
    {"key": "hidden.1@all", "dtype": "int8"},
    {"key": "hidden.2@all", "dtype": "float8", "compression": "none"},
    {"key": "hidden.0@first", "dtype": "float32", "keep_bits": 23},
    {"key": "lm_logits@labels:select", "ids": [7, 9]},
    {"key": "lm_logits@masked:top8", "dtype": "float32"},
]


def specs(store: Path) -> dict[str, FeatureSpec]:
    return {spec.key: spec for spec in Store.open(store).manifest.passes["bert"].features}


def test_each_feature_is_kept_as_it_is_asked_for_and_as_the_recipe_says_otherwise(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    options = {"dtype": "bfloat16", "keep_bits": 4, "compression": "zstd"}
    mixed = teacher_dump("run", write({**masked_recipe, "features": MIXED, **options}))
    assert mixed.code == 0, mixed.err
    exact = tmp_path / "exact"
    plain = [{name: value for name, value in item.items() if name in ("key", "ids")} for item in MIXED]
    assert teacher_dump("run", write({**masked_recipe, "store": str(exact), "features": plain})).code == 0
    kept = specs(Path(masked_recipe["store"]))
    assert {key: spec.kept_as for key, spec in kept.items()} == {
        "hidden.1@all": "int8, zstd",
        "hidden.2@all": "float8_e4m3fn",
        "hidden.0@first": "float32, zstd",
        "lm_logits@labels:select": "bfloat16 of 4 bits, zstd",
        "lm_logits@masked:top8": "float32 of 4 bits, zstd",
    }
    rows = np.arange(len(Store.open(exact).rows))
    del kept["lm_logits@masked:top8"]  # follows from exact hidden states
    for key, spec in kept.items():
        found, true = (
            decode(store.spec(name), store.read(name, rows))
            for store in (Store.open(Path(masked_recipe["store"])), Store.open(exact))
            for name in [FeatureKey.parse(f"bert/{key}")]
        )
        for name, expected in true.items():
            if name not in ("", "log_probs", "logits"):
                np.testing.assert_array_equal(found[name], expected)
            else:
                bound = spec.error * np.abs(expected) + spec.error_of_largest * np.abs(expected).max(1, keepdims=True)
                assert (np.abs(found[name] - expected) <= bound + 1e-9).all(), key
                assert spec.exact == np.array_equal(found[name], expected)


def test_a_source_is_kept_as_exactly_as_any_feature_that_follows_from_it(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    features = [
        {"key": "value.2@all", "dtype": "bfloat16", "keep_bits": 3, "compression": "zstd"},
        {"key": "attention_probs.2", "dtype": "bfloat16", "keep_bits": 5, "compression": "zstd"},
        {"key": "query.1@all", "dtype": "int8"},
        {"key": "attention_probs.1", "dtype": "bfloat16"},
    ]
    assert teacher_dump("run", write({**masked_recipe, "features": features})).code == 0
    kept = specs(Path(masked_recipe["store"]))
    assert {key: spec.kept_as for key, spec in kept.items()} == {"input.2@all": "bfloat16 of 5 bits, zstd", "input.1@all": "bfloat16"}


def test_errors_of_the_types_asked_for_are_planned_measured_and_told(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    features = [{"key": "hidden.1@all", "dtype": "float8"}, {"key": "attention_probs.1", "dtype": "int8"}, "lm_logits@masked:top8"]
    recipe = write({**masked_recipe, "features": features})
    lines = {line.split()[0]: line for line in teacher_dump("plan", recipe).out.splitlines() if line.strip()}
    assert "6.2e-02 relative + 2.2e-06 of the largest" in lines["hidden.1@all"]
    assert 0.01 < float(lines["hidden.1@all"].split()[-1]) < 0.04
    assert "4.0e-03 of the largest" in lines["input.1@all"]
    here, exact, half, brain, int8, float8 = map(float, lines["attention_probs.1@all"].split()[-6:])
    assert here == int8
    assert exact < half < brain < int8 < float8 < 0.1
    run = teacher_dump("run", recipe)
    assert f"attention_probs.1@all {int8:.1e}" in run.out
    status = teacher_dump("status", masked_recipe["store"]).out
    assert "int8 + float32" in status
    assert "float8_e4m3fn + float32" in status
    shown = teacher_dump("show", masked_recipe["store"]).out
    assert "hidden.1@all" in shown


def test_status_tells_what_compression_gained(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    options = {"dtype": "bfloat16", "keep_bits": 2, "compression": "zstd", "features": ["hidden.1@all"]}
    recipe = write({**masked_recipe, **options, "rows": {**masked_recipe["rows"], "slot_tokens": 1024}})
    assert teacher_dump("run", recipe).code == 0
    line = next(line for line in teacher_dump("status", masked_recipe["store"]).out.splitlines() if "hidden.1@all" in line)
    assert "bfloat16 of 2 bits, zstd" in line
    assert "32 B a token, " in line
    assert 8 < float(line.split()[-4]) < 20


@pytest.mark.parametrize("change", [{"keep_bits": 3}, {"compression": "none", "keep_bits": None}, {"dtype": "float8", "keep_bits": None}])
def test_a_dump_goes_on_only_as_it_began(change: Tree, masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    options = {"dtype": "bfloat16", "keep_bits": 4, "compression": "zstd", "features": ["hidden.1@all"]}
    assert teacher_dump("run", write({**masked_recipe, **options})).code == 0
    assert "nothing was left to do" in teacher_dump("run", write({**masked_recipe, **options})).out
    other = teacher_dump("run", write({**masked_recipe, **options, **change}))
    assert other.code == 2
    assert "pass bert" in other.err
    assert "another features" in other.err
