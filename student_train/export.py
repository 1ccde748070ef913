"""The result of a phase: a plain Hugging Face folder with tokenizer and a model card that says how it was made."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from online.models import HEADS, LoadedModel
from online.quiet import quiet
from store.manifest import Provenance
from store.publish import sync_file, sync_folder
from student_train.recipe import PhaseSpec

Scores = Mapping[str, float]
"""Metric or loss term on held-out rows -> value."""

_PIPELINES = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "classification": "text-classification",
    "token_classification": "token-classification",
    "multiple_choice": "multiple-choice",
    "base": "feature-extraction",
}


@dataclass(frozen=True)
class Lineage:
    """Where a student comes from, for its model card."""

    phase: PhaseSpec
    seed: int
    teachers: Sequence[str]
    """One line for each teacher pass: name, fingerprint, model."""
    data: Sequence[str]
    """One line for each store: split, rows, fingerprints."""
    notices: Sequence[str]
    """What was said when the student was made."""
    made: Provenance


def export(student: LoadedModel, lineage: Lineage, before: Scores, after: Scores, folder: Path) -> None:
    """Write the student (without any method's parameters) to ``folder``; it is whole or absent.

    An earlier export there is replaced: weights, configuration, tokenizer and README.md are written to a temporary
    folder beside it, flushed to the disk and renamed.
    """
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    with quiet():
        student.model.save_pretrained(writing)
    if student.tokenizer is not None:
        student.tokenizer.save_pretrained(str(writing))
    (writing / "README.md").write_text(model_card(student, lineage, before, after), encoding="utf-8")
    for path in writing.iterdir():
        sync_file(path)
    sync_folder(writing)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    sync_folder(folder.parent)


def model_card(student: LoadedModel, lineage: Lineage, before: Scores, after: Scores) -> str:
    """README.md of an exported student, with the metadata block that model hubs read."""
    phase, shape = lineage.phase, student.shape
    metadata = {"library_name": "transformers", "pipeline_tag": _PIPELINES[shape.head], "tags": ["distillation", "teachercache"]}
    methods = [f"- {method.name}, weight {method.weight:g}{_options(method.options)}" for method in phase.methods]
    recipe = yaml.safe_dump(phase.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(lineage.made.versions.items()))
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {phase.name}",
        f"{shape.family}, {shape.layers} blocks of width {shape.width}, head {shape.head}; {student.model.num_parameters():,} "
        f"parameters. Trained by TeacherCache's student-train from a store of teacher features.",
        f"```python\nfrom transformers import AutoTokenizer, {HEADS[shape.head].__name__}\n\n"
        f'model = {HEADS[shape.head].__name__}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```',
        "## Teacher\n\n" + ("\n".join(f"- {line}" for line in lineage.teachers) or "None: learned from labels or text alone."),
        "## Data\n\n" + "\n".join(f"- {line}" for line in lineage.data),
        "## Methods\n\n" + "\n".join(methods),
        _table(before, after),
        "## Start\n\n" + "\n".join(f"- {line}" for line in lineage.notices) if lineage.notices else "",
        f"## How to make it again\n\nPhase of the recipe (seed {lineage.seed}):\n\n```yaml\n{recipe}```\n\n"
        f"Command, {lineage.made.created}:\n\n```\n{' '.join(lineage.made.command)}\n```\n\nVersions: {versions}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _options(options: Mapping[str, object]) -> str:
    return f" ({', '.join(f'{name}: {value}' for name, value in options.items())})" if options else ""


def _table(before: Scores, after: Scores) -> str:
    """Metrics and loss terms before and after training."""
    if not after:
        return ""
    lines = ["## Held-out results", "", "| measure | at the start | trained |", "|---|---|---|"]
    for name, value in after.items():
        start = before.get(name)
        lines.append(f"| {name} | {'' if start is None else f'{start:.4f}'} | {value:.4f} |")
    return "\n".join(lines)
