"""`plan --json` says of a pass, without its weights, what `run` then writes."""

import json
from collections.abc import Callable
from pathlib import Path

from tiny_dump import Outcome, Tree

from store import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]


def test_it_is_what_is_written_to_the_byte(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    outcome = teacher_dump("plan", recipe, "--no-measure", "--json", "dtype=float16")
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    assert not Path(masked_recipe["store"]).exists()
    assert teacher_dump("run", recipe, "dtype=float16").code == 0
    store = Store.open(masked_recipe["store"])
    info = store.manifest.passes["bert"]
    assert (planned["rows"], planned["tokens"]) == (store.manifest.rows.rows, store.manifest.rows.tokens)
    assert list(planned["stored"]) == [spec.key for spec in info.features]
    for spec in info.features:
        of_key = planned["stored"][spec.key]
        assert of_key == {"kept_as": spec.kept_as, "unit": spec.feature.unit, "unit_bytes": spec.unit_bytes, "bytes": of_key["bytes"]}
    written = sum(seal.size for commit in store.committed("bert").values() for seal in commit.files.values())
    assert sum(feature["bytes"] for feature in planned["stored"].values()) == written
    assert planned["derived"].keys() == set(info.requested) - set(planned["stored"])
    assert planned["derived"]["attention_probs.1@all"] == ["input.1@all"]
    assert planned["stored"]["hidden.1@all"]["unit_bytes"] == 2 * info.shape.width
    assert planned["weights"] > 0


def test_an_amount_of_text_is_enough_and_no_machine_is_asked_for(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write({**masked_recipe, "rows": {**masked_recipe["rows"], "sources": [{"files": "absent.jsonl"}]}})
    options = ("--on", "8x40GB", "--tokens", "1e6", "--length", "20")
    planned = json.loads(teacher_dump("plan", recipe, *options, "--json").out)
    assert (planned["rows"], planned["tokens"]) == (50_000, 1_000_000)
    refused = teacher_dump("plan", recipe, "--json")
    assert refused.code == 2
    assert "--json goes with --on MACHINE or --no-measure" in refused.err
