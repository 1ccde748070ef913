"""What the documentation says is what the code does: references in step, and the README's commands run."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["rows.sources.0.limit=48", "rows.sources.1.limit=24"]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def commands(page: str) -> list[str]:
    """Lines that a page's console blocks type."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_the_recipe_reference_and_the_schemas_are_those_of_the_code() -> None:
    reference = module(ROOT / "docs" / "reference.py")
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == reference.page(), "run: python docs/reference.py"
    for name, text in reference.schemas().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: python docs/reference.py"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = {command.split()[1] for command in commands("README.md") if command.startswith("make ")}
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_every_other_command_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    run = [command for command in commands("README.md") if not command.startswith(("make ", "pip ", "git "))]
    assert any("teacher-dump run" in command for command in run)
    assert any("student-train run" in command for command in run)
    for command in run:
        words = shlex.split(command, comments=True)
        if words[0].endswith("teacher-dump") and words[1] in ("run", "plan", "rows"):
            words += SMALL[: 1 if "rows.yaml" in words[2] else 2]
        if words[0].endswith("student-train") and words[1] == "run":
            words += ["--smoke"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
