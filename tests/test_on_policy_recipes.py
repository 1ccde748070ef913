"""The on-policy recipes with a teacher, a student and questions of one's own."""

import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)  # several processes, each of which loads torch
def test_recipes_train_three_steps(tmp_path: Path, run_program: Callable[..., str]) -> None:
    spec = importlib.util.spec_from_file_location("tiny_answers", ROOT / "tests" / "student_train" / "tiny_answers.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    for number, name in enumerate(("teacher", "student")):
        tiny.write_model(tmp_path / "models" / name, tiny.llama(positions=1024), number)
    (tmp_path / "data" / "answers").mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    lines = [json.dumps({"prompt": f"w{n % 20} w3", "response": "w4 " * (n % 5), "text": "w5 " * (n % 9 + 1)}) for n in range(80)]
    for split in ("train", "dev"):
        (tmp_path / "data" / "answers" / f"{split}.jsonl").write_text("\n".join(lines))
    comment = (ROOT / "recipes" / "online" / "answers.yaml").read_text().replace("\\\n#", "")
    commands = [shlex.split(line.removeprefix("#")) for line in comment.splitlines() if line.startswith("#   teacher-dump")]
    assert len(commands) == 2
    for command in commands:
        changed = [word.replace("data/corpus/wikipedia_train.parquet", "data/answers/train.jsonl") for word in command[1:]]
        run_program(tmp_path, "teacher_dump", *changed)
    for name in ("gkd", "minillm", "distillm", "distillm2"):
        run_program(tmp_path, "student_train", "run", f"recipes/online/{name}.yaml", "--smoke")
