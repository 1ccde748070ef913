"""One method on real data, as in the README's table but with 500 rows: the real teacher, the two programs, no teacher while training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from store.reader import Store

RECIPES = Path(__file__).parents[1] / "recipes" / "sst2"


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_five_hundred_sentences_teach_a_student_of_half_the_depth(beside_shared: Path, run_program: Callable[..., str]) -> None:
    run_program(beside_shared, "teacher_dump", "run", str(RECIPES / "dump.yaml"), "rows.sources.0.limit=500", "rows.sources.1.limit=200")
    (beside_shared / "teachers").unlink()

    phase = ["--phase", "kd", "phases.1.epochs=2", "phases.1.trainer.warmup_steps=5", "phases.1.trainer.learning_rate=1.0e-4"]
    run_program(beside_shared, "student_train", "run", str(RECIPES / "train.yaml"), *phase)

    result = json.loads((beside_shared / "out/sst2/students/kd/result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["loss"] < 0.92 * before["loss"]
    assert after["agreement"] > before["agreement"] + 0.02
    store = Store.open(beside_shared / "out/sst2/features")
    assert store.complete("sst2")
    assert store.manifest.rows.splits == {"train": 500, "dev": 200}
