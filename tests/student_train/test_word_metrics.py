"""Calibration, agreement and acceptance of words, against loops over tokens and words."""

import math

import numpy as np
import pytest
import torch

from online.batch import IGNORED, Batch
from student_train.metrics import COLUMNS, LM_LOGITS, METRICS
from student_train.scores import ece as measured

TOKENS, WORDS = 40, 7


def probabilities(logits: torch.Tensor) -> list[list[float]]:
    rows = [[math.exp(value) for value in row] for row in logits.double().tolist()]
    return [[value / sum(row) for value in row] for row in rows]


@pytest.fixture(scope="module")
def given() -> tuple[torch.Tensor, torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(TOKENS, WORDS, generator=generator) * 2 for _ in range(2))
    labels = torch.full((2, 32), IGNORED)
    labels.view(-1)[5 : 5 + TOKENS] = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    ones = torch.ones(2, 32, dtype=torch.bool)
    return student, teacher, Batch(torch.arange(2), labels.clamp(min=0), ones, None, None, None, labels, None, torch.arange(2))


def score(name: str, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> float:
    sides = {LM_LOGITS: student}, {LM_LOGITS: teacher}
    gathered = [COLUMNS[column].gather(*sides, batch, None).double().numpy() for column in METRICS[name].columns]  # type: ignore[arg-type]
    return METRICS[name].compute(*gathered)


def test_agreement_and_acceptance_are_means_over_tokens(given: tuple[torch.Tensor, torch.Tensor, Batch]) -> None:
    student, teacher, batch = given
    sides = list(zip(probabilities(student), probabilities(teacher), strict=True))
    same = sum(max(range(WORDS), key=one.__getitem__) == max(range(WORDS), key=other.__getitem__) for one, other in sides)
    overlap = sum(min(a, b) for one, other in sides for a, b in zip(one, other, strict=True))
    assert 0 < same < TOKENS
    assert score("word_agreement", student, teacher, batch) == pytest.approx(same / TOKENS)
    assert score("acceptance", student, teacher, batch) == pytest.approx(overlap / TOKENS, rel=1e-5)
    assert score("acceptance", student, student, batch) == pytest.approx(1, rel=1e-5)


def test_calibration_is_what_bins_of_confidence_are_off_by(given: tuple[torch.Tensor, torch.Tensor, Batch]) -> None:
    student, teacher, batch = given
    bins: dict[int, list[tuple[float, bool]]] = {}
    assert batch.token_labels is not None
    for row, label in zip(probabilities(student), batch.token_labels[batch.labelled].tolist(), strict=True):
        best = max(range(WORDS), key=row.__getitem__)
        bins.setdefault(min(14, math.floor(row[best] * 15)), []).append((row[best], best == label))
    off = sum(abs(sum(right for _, right in found) - sum(sure for sure, _ in found)) for found in bins.values())
    assert len(bins) > 3
    assert score("ece", student, teacher, batch) == pytest.approx(off / TOKENS, rel=1e-5)


def test_a_certain_word_is_in_the_last_bin() -> None:
    assert measured(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(0.5)
