"""Whether the rows of a store are such as a student reads."""

from collections.abc import Iterable
from pathlib import Path

from online.fingerprints import tokenizer_fingerprint
from online.models import load_tokenizer
from store.errors import FingerprintMismatch
from store.manifest import Manifest
from store.strict import did_you_mean
from student_train.blueprint import Blueprint
from student_train.learnable import label_problem
from student_train.recipe import DataSpec


def check_rows(read: Iterable[DataSpec], blueprint: Blueprint, store: Path, manifest: Manifest) -> None:
    """Refuse a ``store`` without the splits that ``read`` names, with labels that have no outputs, or of another tokenizer.

    Raises:
        ValueError, FingerprintMismatch: what was expected, and what would serve.
    """
    rows, shape = manifest.rows, blueprint.shape
    for data in read:
        if data.store == store and data.split not in rows.splits:
            raise ValueError(f"{store} has no split {data.split!r}{did_you_mean(data.split, sorted(rows.splits))}")
    if problem := label_problem(shape, rows.task):
        raise ValueError(f"the student has {shape.labels} outputs, the labels of {store} {problem}")
    found = tokenizer_fingerprint(load_tokenizer(blueprint.tokenizer))
    if found != rows.tokenizer:
        raise FingerprintMismatch(
            f"{store} was built with another tokenizer than the student's ({blueprint.tokenizer.tokenizer or blueprint.tokenizer.model}): "
            f"rows.tokenizer is {rows.tokenizer[:12]}, expected {found[:12]}; build rows with this tokenizer (teacher-dump rows), "
            "or start the student from the store's teacher. Without a common tokenizer students "
            "learn from text that the teacher has written (teacher-dump generate) and from "
            "its task logits (teacher-dump graft): docs/causal.md"
        )
