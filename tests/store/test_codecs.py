"""The NumPy half of each codec against definitions in float64 and against other implementations of bfloat16."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from small_store import spec

from store import CODECS, FeatureKey, decode, encode
from store.codecs import codec_of
from store.codecs.cast import DTYPE_ERROR, restore, round_to

FLOATS = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@settings(max_examples=200, deadline=None)
@given(FLOATS)
def test_bfloat16_rounds_to_the_nearest_even_as_others_do(values: np.ndarray) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    ours, theirs = restore(round_to(values, "bfloat16"), "bfloat16"), values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)
    assert (np.signbit(ours) == np.signbit(theirs))[~np.isnan(values)].all()


def test_bfloat16_ties_go_to_even_and_nan_stays_nan() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32)
    assert round_to(bits.view(np.float32), "bfloat16").tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0x7FC0, 0x7F80]


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, (5, 3), elements=st.floats(-6e4, 6e4, width=32)), st.sampled_from(sorted(DTYPE_ERROR)))
def test_the_error_of_cast_is_within_what_is_declared(values: np.ndarray, dtype: str) -> None:
    feature = spec("hidden.1@all", dtype, 3)
    back = decode(feature, encode(feature, values))[""]
    assert back.dtype == np.float32
    normal = np.abs(values) > 6.2e-5  # below, float16 has fewer digits
    exact = values.astype(np.float64)
    assert (np.abs(back - exact) <= feature.error * np.abs(exact))[normal].all()
    assert feature.error == {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    if dtype == "float32":
        assert back.tobytes() == values.tobytes()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)


@pytest.mark.parametrize(("kept", "vocab"), [(1, 40), (7, 40), (40, 40), (5, 65536), (5, 65537)])
def test_topk_keeps_the_likeliest_words_and_the_mass_of_all_others(kept: int, vocab: int) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (6, vocab)).astype(np.float32)
    feature = spec(f"lm_logits@labels:top{kept}", "float32", vocab)
    stored = encode(feature, logits)
    assert stored["ids"].dtype == (np.uint16 if vocab <= 65536 else np.int32)
    back, exact = decode(feature, stored), log_softmax(logits)
    assert back["ids"].dtype == np.int64
    for row in range(len(logits)):
        expected = sorted(range(vocab), key=lambda word, row=row: -exact[row, word])[:kept]
        assert back["ids"][row].tolist() == expected
        np.testing.assert_allclose(back["log_probs"][row], exact[row, expected], rtol=2e-7)
        others = np.delete(np.exp(exact[row]), expected).sum()
        assert back["log_tail"][row, 0] == (np.finfo(np.float32).min if kept == vocab else pytest.approx(np.log(others), rel=1e-6))


def test_topk_numbers_have_the_type_asked_for_but_the_tail_is_float32() -> None:
    stored = encode(spec("lm_logits@labels:top4", "float16", 30), np.random.default_rng(0).normal(0, 1, (3, 30)).astype(np.float32))
    assert {name: values.dtype.name for name, values in stored.items()} == {"ids": "uint16", "log_probs": "float16", "log_tail": "float32"}


def test_words_of_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    assert encode(spec("lm_logits@labels:top3", width=9), np.zeros((2, 9), np.float32))["ids"].tolist() == [[0, 1, 2]] * 2


def test_certainty_leaves_a_finite_tail() -> None:
    logits = np.zeros((1, 20), np.float32)
    logits[0, 3] = 3e4
    stored = encode(spec("lm_logits@labels:top1", width=20), logits)
    assert stored["log_tail"][0, 0] == pytest.approx(-3e4 + np.log(19), rel=1e-6)
    assert stored["log_probs"][0, 0] == 0


def test_select_keeps_chosen_and_true_logits_and_the_exact_log_sum_exp() -> None:
    logits = np.random.default_rng(1).normal(0, 9, (5, 60)).astype(np.float32)
    labels = np.array([3, -100, 59, 0, -100])
    back = decode(feature := spec("lm_logits@labels:select", "float16", 60, (9, 2)), encode(feature, logits, labels))
    np.testing.assert_array_equal(back["logits"], logits[:, [9, 2]].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(back["true_logit"][:, 0], [logits[0, 3], np.nan, logits[2, 59], logits[3, 0], np.nan])
    exact = logits.astype(np.float64)
    np.testing.assert_allclose(back["log_sum_exp"][:, 0], np.log(np.exp(exact).sum(1)), rtol=1e-7)


def test_select_without_words_keeps_the_true_one() -> None:
    feature = spec("lm_logits@labels:select", "float32", 60)
    assert [array.name for array in feature.arrays] == ["true_logit", "log_sum_exp"]
    assert set(encode(feature, np.zeros((2, 60), np.float32), np.array([1, 2]))) == {"true_logit", "log_sum_exp"}


def test_more_words_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="at most the 10 words"):
        spec("lm_logits@labels:top11", width=10)
    with pytest.raises(ValueError, match=r"word ids 0 to 9, found \[10\]"):
        spec("lm_logits@labels:select", width=10, ids=(3, 10))


def test_the_form_of_a_key_names_its_codec_and_a_spec_says_what_a_unit_costs() -> None:
    assert {codec_of(FeatureKey.parse(key)) for key in ("hidden.1", "lm_logits@labels:top4", "lm_logits@labels:select")} == set(CODECS)
    assert spec("hidden.1", "bfloat16", 768).unit_bytes == 1536
    assert spec("lm_logits@labels:top64", "float16", 30522).unit_bytes == 64 * 2 + 64 * 2 + 4
