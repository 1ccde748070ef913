"""The NumPy half of each codec against definitions in float64 and against other implementations of bfloat16."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from small_store import spec

from store import CODECS, FeatureKey, FeatureSpec, decode, encode, feature_spec
from store.codecs import codec_of, float8
from store.codecs.cast import DTYPE_ERROR, restore, round_bits, round_to
from store.features import MANTISSA
from store.shards import fill_value, numpy_dtype

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
    assert stored["ids"].dtype == (np.uint16 if vocab <= 65536 else np.uint8)
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


def test_form_and_type_of_a_key_name_its_codec_and_a_spec_says_what_a_unit_costs() -> None:
    kept = [
        ("hidden.1", "bfloat16"),
        ("hidden.1", "int8"),
        ("hidden.1", "float8"),
        ("lm_logits@labels:top4", "float16"),
        ("lm_logits@labels:top4p95min2", "float16"),
        ("lm_logits@labels:draw50tau80", "float16"),
        ("lm_logits@labels:top4draw9x2", "float16"),
        ("lm_logits@labels:top6band12", "float16"),
        ("lm_logits@labels:select", "float32"),
    ]
    assert [codec_of(FeatureKey.parse(key), dtype) for key, dtype in kept] == [
        *("cast", "int8", "float8", "topk", "topk", "draw", "topdraw", "topband", "select")
    ]
    assert set(CODECS) == {"cast", "int8", "float8", "topk", "draw", "topdraw", "topband", "select"}
    assert [spec("hidden.1", dtype, 768).unit_bytes for dtype in ("int8", "float8")] == [772, 772]
    assert spec("hidden.1", "bfloat16", 768).unit_bytes == 1536
    assert spec("lm_logits@labels:top64", "float16", 30522).unit_bytes == 64 * 2 + 64 * 2 + 4


# int8 and float8: a scale for each unit


SCALED = ("int8", "float8")
UNITS = st.tuples(st.integers(0, 4), st.integers(1, 9))
ANY = arrays.arrays(np.float32, UNITS, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
"""Zeros, denormal numbers and the largest there are, all in one unit."""


@st.composite
def units_of_one_size(draw: st.DrawFn) -> np.ndarray:
    """Numbers of one magnitude or a few below it, as features are."""
    numbers = draw(arrays.arrays(np.float64, draw(UNITS), elements=st.floats(-1, 1)))
    return (numbers * 2.0 ** draw(st.integers(-126, 127))).astype(np.float32)


def within_bounds(feature: FeatureSpec, values: np.ndarray, back: np.ndarray) -> np.ndarray:
    """[n, W] whether the declared bound holds, in float64; always true in units that hold nothing but denormal numbers."""
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(1, keepdims=True)
    bound = feature.error * np.abs(exact) + feature.error_of_largest * largest
    return (np.abs(back - exact) <= bound) | (largest < np.finfo(np.float32).tiny)


@settings(max_examples=300, deadline=None)
@given(ANY | units_of_one_size(), st.sampled_from(SCALED))
@example(np.array([[3.4028235e38, -3.4028235e38, 1e38]], np.float32), "int8")
@example(np.array([[1.1754944e-38, 1e-40, -4.6e-41]], np.float32), "int8")
@example(np.array([[1.1754944e-38, 1e-40, -4.6e-41]], np.float32), "float8")
def test_the_error_of_scaled_numbers_is_within_what_is_declared(values: np.ndarray, dtype: str) -> None:
    feature = spec("hidden.1@all", dtype, values.shape[1])
    stored = encode(feature, values)
    assert [(array.name, numpy_dtype(array)) for array in feature.arrays] == [(name, stored[name].dtype) for name in ("values", "scale")]
    back = decode(feature, stored)[""]
    assert back.dtype == np.float32
    assert np.isfinite(back).all()
    assert within_bounds(feature, values, back).all()
    assert (back[values == 0] == 0).all()
    assert np.array_equal(np.sign(back) * (back != 0), np.sign(values) * (back != 0)), "no number changes its sign"


def test_the_declared_bounds_of_scaled_numbers_are_those_of_half_a_step() -> None:
    """And are not much wider than needed: the worst of many numbers comes near."""
    assert [(spec("hidden.1", dtype).error, spec("hidden.1", dtype).error_of_largest) for dtype in SCALED] == [
        (0, 1 / 253),
        (1 / 16, 2**-10 / 448),
    ]
    line = np.linspace(-1, 1, 100_001, dtype=np.float32)[None]
    far = {
        dtype: np.abs(decode(spec("hidden.1", dtype, line.shape[1]), encode(spec("hidden.1", dtype, line.shape[1]), line))[""] - line)
        for dtype in SCALED
    }
    assert 1 / 254.5 < far["int8"].max() < 1 / 253
    big = np.abs(line) > 0.01
    assert 0.058 < (far["float8"][big] / np.abs(line[big])).max() < 1 / 16


@pytest.mark.parametrize("dtype", SCALED)
def test_every_unit_uses_the_whole_range_of_its_format(dtype: str) -> None:
    values = (np.random.default_rng(0).normal(size=(50, 16)) * 10.0 ** np.arange(-25, 25)[:, None]).astype(np.float32)
    stored = encode(spec("hidden.1", dtype, 16), values)
    largest = restore(stored["values"], "int8" if dtype == "int8" else "float8_e4m3fn")[np.arange(50), np.abs(values).argmax(1)]
    assert (np.abs(largest) == {"int8": 127, "float8": 448}[dtype]).all()
    assert stored["scale"].shape == (50, 1)


@pytest.mark.parametrize("dtype", SCALED)
def test_a_unit_of_zeros_is_zeros_and_what_is_missing_is_nan(dtype: str) -> None:
    feature = spec("hidden.1", dtype, 3)
    assert encode(feature, np.zeros((2, 3), np.float32))["scale"].tolist() == [[0], [0]]
    assert (decode(feature, encode(feature, np.zeros((2, 3), np.float32)))[""] == 0).all()
    missing = {array.name: np.full((2, array.width), fill_value(array), numpy_dtype(array)) for array in feature.arrays}
    assert np.isnan(decode(feature, missing)[""]).all()


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_unit_with_a_number_that_is_not_finite_does_not_read_as_numbers(dtype: str, bad: float) -> None:
    values = np.ones((3, 4), np.float32)
    values[1, 2] = bad
    back = decode(spec("hidden.1", dtype, 4), encode(spec("hidden.1", dtype, 4), values))[""]
    assert not np.isfinite(back[1]).any()
    np.testing.assert_allclose(back[[0, 2]], 1)


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, 20, elements=st.floats(-448, 448, width=32) | st.floats(-(2**-5), 2**-5, width=32)))
def test_float8_rounds_to_the_nearest_even_as_others_do(values: np.ndarray) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.testing.assert_array_equal(float8.codes(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_each_float8_code_stands_for_what_others_read_in_it_and_ties_go_to_even() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(float8.VALUES, every.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert float8.codes(float8.VALUES).tolist() == [0x7F if code in (0x7F, 0xFF) else code for code in range(256)]
    between = (float8.VALUES[:0x7E].astype(np.float64) + float8.VALUES[1:0x7F]) / 2
    assert float8.codes(between.astype(np.float32)).tolist() == [code + code % 2 for code in range(0x7E)]


# Fewer mantissa bits


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(-6e4, 6e4, width=32)), st.sampled_from(sorted(MANTISSA)), st.integers(1, 23))
def test_kept_bits_round_to_the_nearest_even_within_what_is_declared(values: np.ndarray, dtype: str, bits: int) -> None:
    bits = min(bits, MANTISSA[dtype])
    feature = feature_spec(FeatureKey("hidden", 1), dtype, 4, keep_bits=bits, compression="zstd")
    back = decode(feature, encode(feature, values))[""]
    exact = values.astype(np.float64)
    normal = np.abs(exact) > 6.2e-5
    mantissa, exponent = np.frexp(exact)  # from a half to 1
    nearest = np.ldexp(np.rint(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1)
    fits = normal & (np.abs(nearest) <= (65504 if dtype == "float16" else np.inf))
    np.testing.assert_array_equal(back[fits], nearest[fits].astype(np.float32))
    assert (np.abs(back - exact) <= feature.error * np.abs(exact))[fits].all()
    assert feature.error == (0 if (dtype, bits) == ("float32", 23) else 2.0 ** -(bits + 1))


@given(st.integers(1, 22), st.integers(0, 2**22))
def test_rounding_leaves_nan_and_infinity_alone(bits: int, payload: int) -> None:
    nan = np.array([0x7FC00000 | payload, 0xFFC00000 | payload, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(round_bits(nan, bits)).all()
    assert round_bits(np.array([np.inf, -np.inf, 0.0], np.float32), bits).tolist() == [np.inf, -np.inf, 0]


def test_numbers_beside_the_rounded_ones_keep_every_bit_and_arrays_of_single_numbers_stay_raw() -> None:
    words = feature_spec(FeatureKey.parse("lm_logits@labels:top4"), "float16", 50, (), 5, "zstd")
    assert [(array.name, array.keep_bits, array.compression) for array in words.arrays] == [
        ("ids", None, "zstd"),
        ("log_probs", 5, "zstd"),
        ("log_tail", None, "none"),
    ]
    assert words.error == 2.0**-6
    chosen = feature_spec(FeatureKey.parse("lm_logits@labels:select"), "float32", 50, (3, 4), 5, "zstd")
    assert [(array.keep_bits, array.compression) for array in chosen.arrays] == [(5, "zstd"), (None, "none"), (None, "none")]
    alone = feature_spec(FeatureKey.parse("lm_logits@labels:select"), "bfloat16", 50, (), 5, "zstd")
    assert [(array.name, array.keep_bits) for array in alone.arrays] == [("true_logit", None), ("log_sum_exp", None)]
    assert alone.exact


def test_a_spec_says_how_its_numbers_are_kept() -> None:
    key = FeatureKey("hidden", 1)
    kept = [
        feature_spec(key, "bfloat16", 8, keep_bits=4, compression="zstd"),
        feature_spec(key, "int8", 8, compression="zstd"),
        spec("hidden.1", "float8"),
    ]
    assert [feature.kept_as for feature in kept] == ["bfloat16 of 4 bits, zstd", "int8, zstd", "float8_e4m3fn"]
    assert [feature.exact for feature in (*kept, spec("hidden.1"))] == [False, False, False, True]
    assert feature_spec(key, "bfloat16", 8, keep_bits=7) == spec("hidden.1", "bfloat16"), "all bits are no rounding"
    assert FeatureSpec.model_validate_json(kept[0].model_dump_json()) == kept[0]


def test_what_a_type_cannot_keep_is_refused() -> None:
    key, words = FeatureKey("hidden", 1), FeatureKey.parse("lm_logits@labels:top4")
    with pytest.raises(ValueError, match="expected 1 to 7, all that bfloat16 has, found 8"):
        feature_spec(key, "bfloat16", 8, keep_bits=8)
    with pytest.raises(ValueError, match="int8 has no mantissa"):
        feature_spec(key, "int8", 8, keep_bits=4)
    with pytest.raises(ValueError, match=r"lm_logits@labels:top4: expected dtype float32, float16, bfloat16 .* found float8"):
        feature_spec(words, "float8", 8)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_spec_with_the_arrays_of_another_codec_is_refused(codec: str) -> None:
    tree = spec("hidden.1").model_dump() | {"codec": codec}
    if codec == "cast":
        tree["arrays"] = spec("hidden.1", "int8").model_dump()["arrays"]
    with pytest.raises(ValidationError, match=f"codec {codec} of hidden.1@all has no arrays"):
        FeatureSpec.model_validate(tree)
