"""The result of a phase: a plain Hugging Face folder with tokenizer and a model card that says how it was made."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from online.kept_words import FILE, KeptWords, kept_words
from online.models import HEADS, LoadedModel, ModelSpec, load_tokenizer
from online.quiet import quiet
from store.manifest import Json, Provenance
from store.publish import sync_file, sync_folder
from student_train.recipe import CardSpec, PhaseSpec

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
    card: CardSpec
    """What the recipe says of licence and public names."""


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
    if (words := kept_words(student.model)) is not None:
        words.write(writing)
        check_tokenizer(writing, student.tokenizer)
    (writing / "README.md").write_text(model_card(student, lineage, before, after), encoding="utf-8")
    for path in writing.iterdir():
        sync_file(path)
    sync_folder(writing)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    sync_folder(folder.parent)


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Make sure that every token, of a student's dropped words too, still has an id of its own after ``folder`` is read again.

    Two tokens cannot share an id in a tokenizer's file: after saving and loading one of them would silently be unknown. So the tokenizer
    stays the teacher's, and the student's own table maps ids.

    Raises:
        ValueError: a token has another id, or none.
    """
    if tokenizer is None:
        return
    again, before = load_tokenizer(ModelSpec(model=folder, head="base")).get_vocab(), tokenizer.get_vocab()
    changed = sorted(token for token in before.keys() | again.keys() if before.get(token) != again.get(token))
    if changed or len(set(again.values())) < len(again):
        raise ValueError(f"the tokenizer that was written to {folder} gives other ids than before to {len(changed)} tokens: {changed[:5]}")


def model_card(student: LoadedModel, lineage: Lineage, before: Scores, after: Scores) -> str:
    """README.md of an exported student, with the metadata block that model hubs read."""
    phase, shape = lineage.phase, student.shape
    metadata: Json = {"library_name": "transformers", "pipeline_tag": _PIPELINES[shape.head], "tags": ["distillation", "teachercache"]}
    metadata |= lineage.card.model_dump(mode="json", exclude_defaults=True) | {"license": lineage.card.license}
    if phase.metrics:
        metadata["metrics"] = list(phase.metrics)
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
        _smaller(words) if (words := kept_words(student.model)) is not None else "",
        "## Teacher\n\n" + ("\n".join(f"- {line}" for line in lineage.teachers) or "None: learned from labels or text alone."),
        "## Data\n\n" + "\n".join(f"- {line}" for line in lineage.data),
        "## Methods\n\n" + "\n".join(methods),
        _table(before, after),
        "## Start\n\n" + "\n".join(f"- {line}" for line in lineage.notices) if lineage.notices else "",
        f"## How to make it again\n\nPhase of the recipe (seed {lineage.seed}):\n\n```yaml\n{recipe}```\n\n"
        f"Command, {lineage.made.created}:\n\n```\n{' '.join(lineage.made.command)}\n```\n\nVersions: {versions}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _smaller(words: KeptWords) -> str:
    """What must be known of a student that keeps only some words."""
    return (
        f"## Words\n\nIt has {len(words.kept):,} of the tokenizer's {words.words:,} words. `{FILE}` says which (`kept`), and for every "
        "token id which of them it is read as (`places`): **transformers alone does not look ids up there**, so the code above serves for "
        "what `student-train export FOLDER OUT --to expanded` makes of this folder, a model that takes the tokenizer's ids as they are; "
        "`--to onnx` writes a file that does so at this size. Word logits of this folder are in the order of `kept`."
    )


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
