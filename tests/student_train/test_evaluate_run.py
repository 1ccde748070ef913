"""Students measured from texts: with the scores that their run measured from the store, and with fewer words than their teacher."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from online.kept_words import KeptWords, map_words
from online.models import ModelSpec, load_model
from online.rows import iter_groups
from online.rows_spec import RowsSpec
from student_train.cli import main
from student_train.vocabulary import take_rows

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


def test_a_student_that_keeps_some_words_is_measured_and_compared_among_those(tiny_words: ModuleType, tmp_path: Path) -> None:
    teacher = tiny_words.write_model(tmp_path / "teacher")
    student = load_model(ModelSpec.model_validate({"model": str(teacher), "head": "masked_lm"}))
    kept = torch.cat([torch.arange(5), 5 + torch.randperm(405, generator=torch.Generator().manual_seed(6))[:123]])
    places = torch.randint(128, (410,), generator=torch.Generator().manual_seed(7))
    places[kept] = torch.arange(128)
    words = KeptWords(kept, places)
    take_rows(student.model, "masked_lm", kept)
    map_words(student.model, words)
    student.model.save_pretrained(tmp_path / "student")
    words.write(tmp_path / "student")
    tiny_words.tokenizer().save_pretrained(tmp_path / "student")
    text, save = tiny_words.write_text(tmp_path / "text.jsonl", rows=20), tmp_path / "results.json"
    arguments = ["--task", "mlm", "--data", text, "--save", save, "--repeats", "0", "--set", "max_length=24"]
    main(["evaluate", str(tmp_path / "student"), "--teacher", str(teacher), *map(str, arguments)])
    whole = load_model(ModelSpec.model_validate({"model": str(teacher), "head": "masked_lm"}))
    spec = RowsSpec.model_validate({"sources": [{"files": [str(text)]}], "objective": "mlm", "max_length": 24})
    losses, divergences = [], []
    for (row,) in iter_groups(spec, tiny_words.tokenizer()):
        ids = torch.tensor(row.input_ids[None].astype(int))
        with torch.no_grad():
            own = student.model(input_ids=ids).logits[0].double().log_softmax(-1)
            other = whole.model(input_ids=ids).logits[0].double()[:, kept].log_softmax(-1)
        for place, label in enumerate(row.token_labels.tolist()):
            if label >= 0:
                losses.append(-float(own[place, places[label]]))
                divergences.append(float((other[place].exp() * (other[place] - own[place])).sum()))
    found = json.loads(save.read_text(encoding="utf-8"))["models"][1]["scores"]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["teacher_kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found["teacher_kl"] > 0
