"""Conditions on the teacher's answers, against entropies and probabilities computed from whole distributions."""

from pathlib import Path

import numpy as np
import pytest
from mixed_store import CLASSES, Group, answer, make
from small_store import spec

from store import MissingFeature, Store
from store.filters import Sureness, Where, conditions, sureness
from store.pool import pools
from store.strict import parse

WORDS = 20
TASK, TOP, SELECT = "task_logits@row", "lm_logits@labels:top4", "lm_logits@labels:select"
CHOSEN = (3, 0, 11)


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64))
    return p / p.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@pytest.fixture
def answered(tmp_path: Path) -> tuple[Store, dict[str, list[np.ndarray]]]:
    """Forty rows, some without labelled tokens, and what a teacher said of them."""
    rng = np.random.default_rng(0)
    rows = make(tmp_path / "store", [Group((int(length),)) for length in rng.integers(1, 30, 40)])
    sharp = rng.uniform(0.1, 4, len(rows))  # from unsure to sure
    words = [rng.standard_normal((row.labelled, WORDS)) * scale for row, scale in zip(rows, sharp, strict=True)]
    logits = {TASK: [rng.standard_normal((1, 3)) * scale for scale in sharp], TOP: words, SELECT: words}
    answer(tmp_path / "store", [spec(TASK, "int8", 3), spec(TOP, "float16", WORDS), spec(SELECT, "float32", WORDS, CHOSEN)], logits)
    return Store.open(tmp_path / "store"), logits


def expected(name: str, of: str, logits: np.ndarray, label: int) -> float:
    """The definition, token by token."""
    values = []
    for p in probabilities(logits):
        if of == TASK:
            kept, rest, sure = p, 0.0, p.max()
        elif of == TOP:
            kept = np.sort(p)[::-1][:4]
            rest, sure = 1 - kept.sum(), p.max()
        else:
            kept = p[list(CHOSEN)]
            rest, sure = 1 - kept.sum(), max(kept.max(), p[label])
        values.append(entropy(np.append(kept, rest)) if name == "entropy" else sure)
    return float(np.mean(values)) if values else np.nan


@pytest.mark.parametrize("of", [TASK, TOP, SELECT])
@pytest.mark.parametrize("name", ["entropy", "confidence"])
def test_rows_are_chosen_by_how_sure_the_teacher_was(answered, monkeypatch: pytest.MonkeyPatch, name: str, of: str) -> None:
    monkeypatch.setattr("store.filters.UNITS", 16)
    store, logits = answered
    values = np.array([expected(name, of, logits[of][row], row % 20) for row in range(40)])
    ranked = np.sort(values[~np.isnan(values)])
    gaps = np.diff(ranked)
    cut = int(np.argmax(gaps[8:-8])) + 8
    threshold = float(ranked[cut] + gaps[cut] / 2)
    for option, wanted in (({"max": threshold}, values < threshold), ({"min": threshold}, values > threshold)):
        where = parse(Where, {name: {"of": of, **option}}, "where")
        (pool,) = pools(store, "train", where, "bert")
        assert pool.take(np.arange(len(pool))).tolist() == np.flatnonzero(wanted).tolist()
    if of != TASK:
        assert np.isnan(values).any()  # rows of one token have no answer, and are on neither side


def test_what_is_stored_for_each_token_is_its_distribution(answered) -> None:
    store, logits = answered
    rows = np.arange(40)
    for of, tolerance in ((TASK, 0.02), (TOP, 2e-3), (SELECT, 1e-5)):
        key = spec(of, width=WORDS, ids=CHOSEN if of == SELECT else ()).feature.of("bert")
        for name in ("entropy", "confidence"):
            found = sureness(name, store.spec(key), store.read(key, rows))
            wanted = [expected(name, of, token[None], row % 20) for row in rows for token in logits[of][row]]
            np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_the_answers_of_rows_are_the_default_and_others_must_be_named(answered, tmp_path: Path) -> None:
    store, _ = answered
    default, named = (conditions(Where(entropy=Sureness(max=0.5, of=of)), store, "bert")["entropy"] for of in (None, TASK))
    assert default(np.arange(40)).tolist() == named(np.arange(40)).tolist()
    make(tmp_path / "other", [Group((9,))])
    words = {TOP: [np.zeros((4, WORDS))], SELECT: [np.zeros((4, WORDS))], "lm_logits@labels": [np.zeros((4, WORDS))]}
    answer(tmp_path / "other", [spec(TOP, width=WORDS), spec(SELECT, width=WORDS)], words)
    other = Store.open(tmp_path / "other")
    with pytest.raises(ValueError, match=r"stores lm_logits@labels:top4, lm_logits@labels:select; say which with entropy\.of"):
        pools(other, "train", Where(entropy=Sureness(max=1)), "bert")
    with pytest.raises(MissingFeature, match=r"has no bert/lm_logits@labels:top8; it holds"):
        pools(other, "train", Where(entropy=Sureness(max=1, of="lm_logits@labels:top8")), "bert")
    with pytest.raises(MissingFeature, match="has no pass 'brt'; did you mean 'bert'"):
        pools(other, "train", Where(entropy=Sureness(max=1)), "brt")
    with pytest.raises(ValueError, match="confidence: give the data a pass_name"):
        pools(other, "train", Where(confidence=Sureness(max=1)))


def test_answers_that_are_no_distribution_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "one", [Group((9,))])
    answer(tmp_path / "one", [spec(TASK, width=1)], {TASK: [np.zeros((1, 1))]})
    with pytest.raises(ValueError, match="task_logits@row is one number, which is no distribution"):
        pools(Store.open(tmp_path / "one"), "train", Where(entropy=Sureness(max=1)), "bert")
    make(tmp_path / "none", [Group((9,))])
    answer(tmp_path / "none", [spec("hidden.1@all")], {"hidden.1@all": [np.zeros((9, 8))]})
    with pytest.raises(MissingFeature, match="stores no answers; dump task_logits@row"):
        pools(Store.open(tmp_path / "none"), "train", Where(entropy=Sureness(max=1)), "bert")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "expected at least one of length, label, domain, source, entropy, confidence"),
        ({"lenght": {"min": 3}}, "unknown key 'lenght'; did you mean 'length'"),
        ({"length": {"mn": 3}}, "unknown key 'length.mn'; did you mean 'min'"),
        ({"length": {}}, "length: expected min, max or both"),
        ({"length": {"min": 3, "max": 2}}, "with min not above max"),
        ({"label": {"values": [1], "min": 0}}, "label: expected either values, or min, max or both"),
        ({"entropy": {"max": 1, "of": "hidden.1"}}, "expected task_logits or lm_logits, the answers of a teacher"),
        ({"entropy": {"max": 1, "of": "task_logit"}}, "unknown feature 'task_logit'"),
    ],
)
def test_conditions_that_say_nothing_are_refused(where: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(Where, where, "where")


def test_labels_are_given_by_name_or_number() -> None:
    assert parse(Where, {"label": {"values": ["good", 1]}}, "w").label.values == ("good", 1.0)
    assert CLASSES[2] == "good"
