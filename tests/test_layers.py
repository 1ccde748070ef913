"""The arrows of the architecture: store <- online <- {teacher_dump, student_train}."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"store", "online", "teacher_dump", "student_train"}
MAY_IMPORT = {
    "store": {"store"},
    "online": {"store", "online"},
    "teacher_dump": {"store", "online", "teacher_dump"},
    "student_train": {"store", "online", "student_train"},
}
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "safetensors"}


def imports(file: Path) -> Iterator[str]:
    """Top-level names of the packages that ``file`` imports anywhere."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    forbidden = (OURS - MAY_IMPORT[package]) | (HEAVY if package == "store" else set())
    found = {f"{file.relative_to(ROOT)}: {name}" for file in files for name in imports(file) if name in forbidden}
    assert not found


def test_no_file_holds_more_than_one_noun_could() -> None:
    long = {
        str(file.relative_to(ROOT))
        for package in OURS
        for file in (ROOT / package).rglob("*.py")
        if len(file.read_text().splitlines()) > 350
    }
    assert not long


def test_no_signature_of_ours_swallows_misspelt_options() -> None:
    """``**_unused`` marks signatures that a library calls with more than is needed."""
    swallowing = set()
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg and node.args.kwarg.arg != "_unused":
                    swallowing.add(f"{file.relative_to(ROOT)}: {node.name}")
    assert not swallowing
