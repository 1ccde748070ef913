"""The numbers that held-out answers are summed up in: plain functions of arrays over all rows of a split; metrics.py says of which.

Shapes: R rows (labelled tokens for token classification), C outputs of the task head, N labelled tokens, V words, W width.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.float64]

SIMILARITY_ROWS = 2000
"""similarity_spearman compares all pairs of at most this many rows (the first ones): two million pairs."""

BINS = 15


def _predicted(logits_RC: Array) -> NDArray[np.int64]:
    return logits_RC.argmax(1)


def _labelled(logits_RC: Array, labels_R: Array) -> tuple[Array, Array]:
    known = ~np.isnan(labels_R)
    if not known.any():
        raise ValueError("none of the held-out rows carries a label: the metric needs labels")
    return logits_RC[known], labels_R[known]


def accuracy(logits_RC: Array, labels_R: Array) -> float:
    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return float(np.mean(_predicted(logits_RC) == labels_R))


def f1(logits_RC: Array, labels_R: Array) -> float:
    from sklearn.metrics import f1_score  # scikit-learn and scipy take a second, and few runs need them

    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return float(f1_score(labels_R.astype(int), _predicted(logits_RC), average="binary", zero_division=0.0))


def macro_f1(logits_RC: Array, labels_R: Array) -> float:
    from sklearn.metrics import f1_score

    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    classes = list(range(logits_RC.shape[1]))
    predicted = _predicted(logits_RC)
    present = [c for c in classes if (labels_R == c).any() or (predicted == c).any()]
    return float(f1_score(labels_R.astype(int), predicted, labels=present, average="macro", zero_division=0.0))


def matthews(logits_RC: Array, labels_R: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return float(matthews_corrcoef(labels_R.astype(int), _predicted(logits_RC)))


def _correlation(statistic: Callable[[Array, Array], Any], a: Array, b: Array) -> float:
    """0 where one side is constant or there are fewer than two values: nothing agrees with a constant."""
    return float(statistic(a, b)) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def pearson(logits_RC: Array, labels_R: Array) -> float:
    from scipy.stats import pearsonr

    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return _correlation(lambda a, b: pearsonr(a, b).statistic, logits_RC[:, 0], labels_R)


def spearman(logits_RC: Array, labels_R: Array) -> float:
    from scipy.stats import spearmanr

    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return _correlation(lambda a, b: spearmanr(a, b).statistic, logits_RC[:, 0], labels_R)


def mse(logits_RC: Array, labels_R: Array) -> float:
    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return float(np.mean((labels_R - logits_RC[:, 0]) ** 2))


def perplexity(nll_N: Array) -> float:
    return math.exp(min(float(nll_N.mean()), 700.0))


def ece(confidence_N: Array, right_N: Array) -> float:
    """Expected calibration error in bins of equal width (Guo et al. 2017, arXiv 1706.04599): |share right - mean confidence| by tokens."""
    bins_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    return float(sum(abs((right_N - confidence_N)[bins_N == number].sum()) for number in range(BINS)) / len(right_N))


def task_ece(logits_RC: Array, labels_R: Array) -> float:
    """The same of the task head's likeliest class."""
    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    return ece(torch.from_numpy(logits_RC).softmax(1).amax(1).numpy(), (_predicted(logits_RC) == labels_R).astype(float))


def choice_accuracy(logits_RC: Array, labels_R: Array, groups_R: Array) -> float:
    """Share of groups whose likeliest row is the right one; with two outputs a row's score is logit 1 - logit 0."""
    logits_RC, labels_R = _labelled(logits_RC, labels_R)
    scores_R = logits_RC[:, 0] if logits_RC.shape[1] == 1 else logits_RC[:, 1] - logits_RC[:, 0]
    groups = [np.flatnonzero(groups_R == group) for group in np.unique(groups_R)]
    return float(np.mean([labels_R[rows[scores_R[rows].argmax()]] == 1 for rows in groups]))


def exact_match(logits_RC: Array, labels_R: Array, groups_R: Array) -> float:
    """Share of groups with every row right (MultiRC's exact match, Khashabi et al. 2018)."""
    right_R = _predicted(logits_RC) == labels_R
    return float(np.mean([right_R[groups_R == group].all() for group in np.unique(groups_R)]))


def agreement(logits_RC: Array, teacher_RC: Array) -> float:
    return float(np.mean(_predicted(logits_RC) == _predicted(teacher_RC)))


def task_kl(logits_RC: Array, teacher_RC: Array) -> float:
    return float(kl(torch.from_numpy(teacher_RC), torch.from_numpy(logits_RC)).mean())


def similarity_spearman(student_RW: Array, teacher_RW: Array) -> float:
    """Spearman correlation, over all pairs of rows, of the two sides' cosine similarities."""
    from scipy.stats import spearmanr

    def similarities(vectors: Array) -> Array:
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return (unit @ unit.T)[np.triu_indices(len(unit), 1)]

    pair = similarities(student_RW[:SIMILARITY_ROWS]), similarities(teacher_RW[:SIMILARITY_ROWS])
    return _correlation(lambda a, b: spearmanr(a, b).statistic, *pair)


def kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each row of logits, in nats."""
    teacher_log, student_log = teacher_NV.float().log_softmax(-1), student_NV.float().log_softmax(-1)
    return functional.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
