"""Metrics against values worked out by hand, and refusal of those that the data cannot give."""

import math

import numpy as np
import pytest
import torch

from online.batch import IGNORED, Batch
from store.features import FeatureKey
from store.manifest import RowsInfo, Task
from store.shape import ModelShape
from student_train.metrics import COLUMNS, METRICS, check_metric, student_keys, teacher_keys

# right: class 1 twice, class 0 once; wrong: one 0 taken for 1, one 1 taken for 0
LOGITS = np.array([[0.0, 2.0], [1.0, 3.0], [2.0, 0.0], [0.0, 1.0], [5.0, 1.0]])
LABELS = np.array([1.0, 1.0, 0.0, 0.0, 1.0])


def shape(head: str, labels: int = 2, vocab: int = 30) -> ModelShape:
    return ModelShape(
        family="bert", head=head, layers=2, width=8, heads=2, kv_heads=2, head_width=4, vocab=vocab, labels=labels,
        causal=False, pre_norm=False, windows=(None, None),
    )  # fmt: skip


def rows(kind: str, objective: str = "plain", classes: tuple[str, ...] = ()) -> RowsInfo:
    return RowsInfo(
        rows=1, tokens=1, slots=1, slot_tokens=128, chunk_tokens=128, filled={"rows": (1,), "tokens": (1,), "labelled": (0,)},
        copies=1, bucket=16, objective=objective, task=Task(kind=kind, classes=classes), splits={"dev": 1}, parts=(), token_arrays=(),
        slot_crcs={}, pad_id=0, tokenizer="", building="", origins=({"corpus": "", "options": {}, "slots": 1},),
    )  # fmt: skip


def score(name: str, *columns: np.ndarray) -> float:
    return METRICS[name].compute(*columns)


def test_classification_metrics_are_those_of_the_confusion_matrix() -> None:
    true_positive, true_negative, false_positive, false_negative = 2, 1, 1, 1
    assert score("accuracy", LOGITS, LABELS) == pytest.approx(3 / 5)
    f1 = 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    other = 2 * true_negative / (2 * true_negative + false_positive + false_negative)
    assert score("f1", LOGITS, LABELS) == pytest.approx(f1)
    assert score("f1a", LOGITS, LABELS) == pytest.approx(f1)
    assert score("macro_f1", LOGITS, LABELS) == pytest.approx((f1 + other) / 2)
    matthews = (true_positive * true_negative - false_positive * false_negative) / math.sqrt(3 * 3 * 2 * 2)
    assert score("matthews", LOGITS, LABELS) == pytest.approx(matthews)


def test_rows_without_a_label_do_not_count() -> None:
    labels = np.array([1.0, np.nan, 0.0, 0.0, np.nan])
    assert score("accuracy", LOGITS, labels) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="none of the held-out rows carries a label"):
        score("accuracy", LOGITS, np.full(5, np.nan))


def test_scores_are_compared_by_correlation_and_squared_error() -> None:
    predicted, true = np.array([[1.0], [2.0], [4.0], [3.0]]), np.array([1.0, 3.0, 9.0, 27.0])
    a, b = predicted[:, 0] - 2.5, true - 10.0
    assert score("pearson", predicted, true) == pytest.approx((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))
    assert score("spearman", predicted, true) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))  # ranks 1 2 4 3 against 1 2 3 4
    assert score("mse", predicted, true) == pytest.approx((0 + 1 + 25 + 576) / 4)


def test_a_constant_prediction_correlates_with_nothing() -> None:
    assert score("pearson", np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == 0.0
    assert score("spearman", np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == 0.0


def test_choices_are_won_by_the_likeliest_row_of_a_group() -> None:
    groups, labels = np.array([4, 4, 7, 7, 7]), np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    assert score("choice_accuracy", np.array([[0.1], [0.9], [0.2], [0.8], [0.0]]), labels, groups) == pytest.approx(1 / 2)
    two = np.array([[5.0, 1.0], [0.0, 0.5], [0.0, 3.0], [0.0, 2.0], [9.0, 10.0]])  # differences -4, 0.5, 3, 2, 1
    assert score("choice_accuracy", two, labels, groups) == 1.0


def test_exact_match_asks_for_a_whole_group() -> None:
    groups = np.array([1, 1, 1, 2, 2])
    assert score("exact_match", LOGITS, np.array([1.0, 1.0, 0.0, 0.0, 0.0]), groups) == pytest.approx(1 / 2)


def test_agreement_and_divergence_of_task_logits() -> None:
    teacher = np.array([[0.0, 1.0], [3.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    assert score("agreement", LOGITS, teacher) == pytest.approx(4 / 5)

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits)
        return powers / powers.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(LOGITS)
    assert score("task_kl", LOGITS, teacher) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)


def test_similarity_compares_the_order_of_all_pairs() -> None:
    def spread(angles: list[float]) -> np.ndarray:
        return np.array([[math.cos(a), math.sin(a)] for a in angles])

    student, teacher = spread([0.0, 0.1, 1.0]), 7 * spread([0.0, 0.2, 2.0])
    assert score("similarity_spearman", student, teacher) == pytest.approx(1.0)  # cosines fall with the angle on both sides
    reordered = spread([0.0, 2.0, 0.2])  # pair (0, 1) is now the farthest, pair (0, 2) the nearest; (1, 2) stays between
    # ranks of the pairs (0,1) (0,2) (1,2): student 3 1 2, reordered 1 3 2, so Spearman is 1 - 6 * 8 / 24
    assert score("similarity_spearman", student, reordered) == pytest.approx(-1.0)


def test_word_columns_follow_from_log_probabilities() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[IGNORED, 3, IGNORED], [1, IGNORED, 0]])
    mask = torch.ones_like(labels, dtype=torch.bool)
    batch = Batch(torch.arange(2), labels.clamp(0), mask, None, None, None, labels, None, torch.arange(2))
    key = FeatureKey("lm_logits", positions="labels")
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    nll = COLUMNS["nll"].gather({key: student}, {}, batch, shape("masked_lm")).double().numpy()
    q, p = student.double().softmax(1).numpy(), teacher.double().softmax(1).numpy()
    expected = -np.log(q[np.arange(3), [3, 1, 0]])
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    assert score("perplexity", nll) == pytest.approx(np.prod(1 / q[np.arange(3), [3, 1, 0]]) ** (1 / 3), rel=1e-5)
    kl = COLUMNS["word_kl"].gather({key: student}, {key: teacher}, batch, shape("masked_lm")).numpy()
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(1), rtol=1e-4)


def test_labels_of_a_batch_are_read_for_rows_and_for_tokens() -> None:
    token_labels = torch.tensor([[1, IGNORED], [IGNORED, 2]])
    batch = Batch(
        torch.arange(2), torch.zeros(2, 2).long(), torch.ones(2, 2).bool(), None, None, None, token_labels, torch.tensor([1, IGNORED]),
        torch.arange(2),
    )  # fmt: skip
    of_rows = COLUMNS["labels"].gather({}, {}, batch, shape("classification")).numpy()
    np.testing.assert_array_equal(of_rows, [1.0, np.nan])
    np.testing.assert_array_equal(COLUMNS["labels"].gather({}, {}, batch, shape("token_classification")).numpy(), [1, 2])


def test_keys_follow_from_columns() -> None:
    names = ["accuracy", "agreement", "similarity_spearman"]
    logits, sentence = FeatureKey("task_logits", positions="row"), FeatureKey("final", positions="mean")
    assert student_keys(names, shape("classification")) == {logits, sentence}
    assert teacher_keys(names, shape("classification")) == {logits, sentence}
    assert teacher_keys(["accuracy"], shape("classification")) == set()
    assert student_keys(["accuracy"], shape("token_classification")) == {FeatureKey("task_logits", positions="labels")}


@pytest.mark.parametrize(
    ("name", "info", "student", "teacher", "message"),
    [
        ("acuracy", rows("classification"), shape("classification"), None, "did you mean 'accuracy'"),
        ("accuracy", rows("none"), shape("classification"), None, "of kind classification or token; the store's rows have kind none"),
        ("pearson", rows("classification"), shape("classification", 1), None, "needs labels of kind regression"),
        ("accuracy", rows("classification"), shape("masked_lm", 0), None, "needs a head of classification"),
        ("f1", rows("classification"), shape("classification", 3), None, "needs 2 outputs of the task head; the student's has 3"),
        ("accuracy", rows("classification"), shape("classification", 1), None, "needs at least 2 outputs"),
        ("choice_accuracy", rows("choice"), shape("classification", 3), None, "needs 1 to 2 outputs"),
        ("perplexity", rows("none"), shape("masked_lm", 0), None, "needs rows with labelled tokens"),
        ("agreement", rows("none"), shape("classification"), None, "give the evaluated data a pass_name"),
        ("agreement", rows("none"), shape("classification"), shape("masked_lm", 0), "the teacher's is masked_lm"),
        ("agreement", rows("none"), shape("classification"), shape("classification", 3), "the student has 2 outputs, the teacher 3"),
        ("teacher_kl", rows("none", "mlm"), shape("masked_lm", 0), shape("masked_lm", 0, 40), "equal vocabularies .* found 30 and 40"),
    ],
)  # fmt: skip
def test_a_metric_that_the_data_cannot_give_is_refused(
    name: str, info: RowsInfo, student: ModelShape, teacher: ModelShape | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_metric(name, info, student, teacher)


def test_metrics_that_fit_are_let_through() -> None:
    check_metric("accuracy", rows("classification", classes=("a", "b")), shape("classification"), None)
    check_metric("choice_accuracy", rows("choice"), shape("multiple_choice", 1), None)
    check_metric("perplexity", rows("none", "causal"), shape("causal_lm", 0), None)
    check_metric("similarity_spearman", rows("none"), shape("masked_lm", 0), shape("base", 0))
