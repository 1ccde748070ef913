"""A student measured from its texts has the scores that its run measured from the store; its card has what the recipe says."""

import json
from pathlib import Path

import pytest
import yaml

from student_train.cli import main

QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True}


def test_scores_without_the_store_are_those_that_the_run_measured_from_it(sentiment: Path, tmp_path: Path) -> None:
    data = {"store": str(sentiment), "pass_name": "tiny"}
    phase = {
        "name": "kd", "student": {"layers": [2, 4]}, "data": [data], "methods": [{"name": "kd"}], "steps": 4, "batch_rows": 8,
        "evaluate": [{**data, "split": "dev"}], "metrics": ["accuracy", "task_ece", "agreement", "task_kl"], "trainer": QUIET,
    }  # fmt: skip
    card = {"license": "apache-2.0", "base_model": "a/teacher"}
    recipe, save = tmp_path / "recipe.yaml", tmp_path / "results.json"
    recipe.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "phases": [phase], "card": card}), encoding="utf-8")
    main(["run", str(recipe)])
    teacher, dev = sentiment.parent / "renamed away", sentiment.parent / "dev.jsonl"
    rows = ["--set", 'text=["{text}"]', "--set", "max_length=16", "--repeats", "0"]
    main(["evaluate", str(tmp_path / "out"), "--teacher", str(teacher), "--task", "sst2", "--data", str(dev), "--save", str(save), *rows])
    found = json.loads(save.read_text(encoding="utf-8"))["models"][1]["scores"]
    after = json.loads((tmp_path / "out" / "kd" / "result.json").read_text(encoding="utf-8"))["after"]
    assert found == {name: pytest.approx(after[name], rel=1e-4, abs=1e-6) for name in phase["metrics"]}
    front = yaml.safe_load((tmp_path / "out" / "kd" / "student" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])
    assert (front["license"], front["base_model"], front["metrics"]) == ("apache-2.0", "a/teacher", phase["metrics"])
