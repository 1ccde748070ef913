"""The pictures of a real run with a probe and a smaller vocabulary: what they show is what the run has written down."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from scipy import stats

from student_train.report import drawing
from student_train.report.course import course
from student_train.report.gkd_distances import gkd_distances
from student_train.report.gkd_stages import gkd_stages
from student_train.report.glmd_distances import glmd_distances
from student_train.report.glmd_words import glmd_words
from student_train.report.heat_map import printed
from student_train.report.runs import load

pytestmark = pytest.mark.slow


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_picture_of_a_run_with_a_probe_shows_what_it_has_written_down(
    tiny_words: ModuleType, program: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    store = tiny_words.write_store(tmp_path, ["lm_logits@all", "hidden.1@all", "hidden.2@all"])
    data = {"store": str(store), "pass_name": "tiny"}
    phase = {
        "name": "words",
        "student": {"layers": [2], "vocabulary": {"rate": 0.3}},
        "data": [data],
        "methods": [{"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}],
        "evaluate": [{**data, "split": "dev"}],
        "metrics": ["perplexity"],
        "steps": 10,
        "batch_rows": 8,
        "gradient_norms": 2,
        "probe": {"rows": 16, "distances": ["hidden", "hidden_relation", "words", "l_sp"], "temperatures": [1, 15]},
        "trainer": {
            "learning_rate": 1e-2, "logging_steps": 2, "eval_steps": 2, "save_steps": 10, "disable_tqdm": True, "report_to": "none",
            "use_cpu": True,
        },
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "phases": [phase]}), encoding="utf-8")
    code, _, err = program("run", tmp_path / "train.yaml")
    assert code == 0, err
    folder = tmp_path / "out" / "words"
    with drawing.style():
        made = load([tmp_path / "out"])
        found = {section.__name__: section(made) for section in (gkd_distances, gkd_stages, glmd_distances, glmd_words, course)}
        for section in found.values():
            assert section is not None
            assert section.pictures
            for picture in section.pictures:
                assert drawing.svg(picture.figure, picture.name).startswith("<svg")

    probe = {line["step"]: line for line in lines_of(folder / "probe.jsonl")}
    logs = lines_of(folder / "metrics.jsonl")
    perplexity = {0: json.loads((folder / "start.json").read_text())["scores"]["perplexity"]}
    perplexity |= {log["step"]: log["eval_perplexity"] for log in logs if "eval_perplexity" in log}
    loss = {log["step"]: log["loss"] for log in logs if "loss" in log}
    assert sorted(perplexity) == [0, 2, 4, 6, 8, 10]
    assert sorted(loss) == [2, 4, 6, 8, 10]

    distances = found["gkd_distances"]
    assert distances is not None
    rows = {row[:2]: row[2] for row in distances.tables[0].rows}
    for name in ("hidden.1-2", "hidden_relation.1-2", "words.T1", "l_sp.T15"):
        for target, series in (("training loss", loss), ("held-out perplexity", perplexity)):
            expected = stats.spearmanr([probe[step][name] for step in sorted(series)], [series[step] for step in sorted(series)]).statistic
            assert rows[name, target] == printed(float(expected)), (name, target)

    inner = found["glmd_distances"]
    assert inner is not None
    expected = stats.spearmanr([line["hidden.1-2"] for line in probe.values()], [line["l_sp.T15"] for line in probe.values()]).statistic
    assert inner.pictures[0].figure.axes[0].texts[0].get_text() == printed(float(expected))

    kept = load_file(folder / "student" / "vocabulary.safetensors")["kept"]
    tail = found["glmd_words"]
    assert tail is not None
    assert f"The {len(kept)} kept words cover" in tail.pictures[0].caption
    stages = found["gkd_stages"]
    assert stages is not None
    assert stages.tables[0].rows[0][2] == f"{loss[10] / max(loss.values()):.3f}"
