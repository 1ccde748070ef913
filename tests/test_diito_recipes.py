"""DIITO's shipped recipes on real text: two dumps, then a few steps from the store and with the teacher at work."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from store.reader import Store

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
FEW = ("rows.sources.0.limit=48", "rows.sources.1.limit=24")


def test_both_dumps_and_both_trainings_say_the_same() -> None:
    dumps = [yaml.safe_load((RECIPES / "wikipedia" / f"diito_{name}.yaml").read_text()) for name in ("factual", "counterfactual")]
    own = {"pass_name", "intervention", "ship_layers"}
    shared = [{key: value for key, value in dump.items() if key not in own} for dump in dumps]
    assert shared[0] == shared[1]
    offline, online = (yaml.safe_load((RECIPES / name / "diito.yaml").read_text())["phases"][0] for name in ("methods", "online"))
    assert online["teacher"]["online"]["counterfactual"]["intervention"] == dumps[1]["intervention"]
    for key in ("student", "methods", "metrics", "epochs", "batch_rows", "accumulation", "trainer"):
        assert offline[key] == online[key], key


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_real_text_is_dumped_twice_and_trains_offline_and_online(beside_shared: Path, run_program: Callable[..., str]) -> None:
    for name in ("factual", "counterfactual"):
        run_program(beside_shared, "teacher_dump", "run", str(RECIPES / "wikipedia" / f"diito_{name}.yaml"), *FEW)
    run_program(beside_shared, "teacher_dump", "rows", str(RECIPES / "sst2" / "dump.yaml"), *FEW)
    store = Store.open(beside_shared / "out" / "wikipedia" / "pairs")
    assert store.manifest.rows.paired
    assert store.manifest.rows.splits == {"train": 96, "dev": 48}  # two maskings
    for folder in ("methods", "online"):
        short = ("phases.0.steps=3", "phases.0.epochs=null", "phases.0.batch_rows=8", "phases.0.trainer.logging_steps=1")
        run_program(
            beside_shared, "student_train", "run", str(RECIPES / folder / "diito.yaml"), "--phase", "pretraining", *short,
            "phases.0.trainer.bf16=false",
        )  # fmt: skip
    results = [
        json.loads((beside_shared / "out" / folder / "diito" / "pretraining" / "result.json").read_text())
        for folder in ("methods", "online")
    ]
    assert results[0]["after"]["diito/causal_ce"] < results[0]["before"]["diito/causal_ce"]
    for score, value in results[0]["after"].items():
        assert results[1]["after"][score] == pytest.approx(value, rel=2e-3), score  # the store holds float16
