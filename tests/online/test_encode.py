"""The device half of the codecs against their NumPy half and against float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from online import vocabulary
from online.batch import IGNORED, Batch, Selected, TopK
from online.encode import assemble, encode
from online.vocabulary import top_k
from store import codecs
from store.features import MANTISSA, Dtype, FeatureKey, FeatureSpec, StoreDtype

DTYPES: tuple[StoreDtype, ...] = ("float32", "float16", "bfloat16", "int8", "float8")
FLOATS: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
LENGTHS = (5, 2, 7)


def batch(vocab: int = 40) -> Batch:
    length_B = torch.tensor(LENGTHS)
    mask = torch.arange(8) < length_B[:, None]
    ids = torch.randint(vocab, mask.shape)
    labels = torch.where(mask & (torch.rand(mask.shape) < 0.5), ids, IGNORED)
    labels[0, 0] = ids[0, 0]
    rows = torch.tensor([11, 4, 27])
    return Batch(rows, ids, mask, None, None, None, labels, None, rows)


def values(key: FeatureKey, batch: Batch, width: int) -> Tensor:
    """Random values as Capture gives them: ``all`` with something on padding."""
    lead = {"all": batch.mask.shape, "labels": (int(batch.labelled.sum()),)}.get(key.positions, (len(batch.rows),))
    return torch.randn(*lead, width) * 3


def packed(key: FeatureKey, value: Tensor, batch: Batch) -> NDArray[np.float32]:
    return (value[batch.mask] if key.positions == "all" else value).numpy()


def packed_labels(key: FeatureKey, batch: Batch) -> NDArray[np.int64]:
    assert batch.token_labels is not None
    if key.positions == "last":
        return batch.token_labels[torch.arange(3), batch.lengths - 1].numpy()
    return batch.token_labels[batch.mask if key.positions == "all" else batch.labelled].numpy()


def equal(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hidden.1", "hidden.1@first", "hidden.1@mean", "head_input@labels", "task_logits@row"])
def test_what_the_device_keeps_is_bit_for_bit_what_numpy_keeps(name: str, dtype: StoreDtype) -> None:
    key, rows = FeatureKey.parse(name), batch()
    value = values(key, rows, 6)
    spec = codecs.feature_spec(key, dtype, 6)
    equal(encode(key, value, rows, spec), codecs.encode(spec, packed(key, value, rows)))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=32)
    | st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=32),
    exponent=st.integers(-149, 0),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_both_halves_keep_the_same_bits_of_any_numbers(values: list[float], exponent: int, dtype: StoreDtype, data: st.DataObject) -> None:
    numbers = np.array(values[: len(values) // 4 * 4], np.float32).reshape(-1, 4)
    with np.errstate(under="ignore"):
        numbers[0] *= np.float32(2.0) ** exponent
    bits = data.draw(st.none() | st.integers(1, MANTISSA[dtype])) if dtype in MANTISSA else None
    spec = codecs.feature_spec(key := FeatureKey("hidden", 1, "first"), dtype, 4, keep_bits=bits, compression="zstd")
    expected = codecs.encode(spec, numbers)
    rows = replace(batch(), rows=torch.arange(len(numbers)))
    if not np.isfinite(codecs.decode(spec, expected)[""]).all():  # too large for float16, or rounded beyond the largest float32
        with pytest.raises(ValueError, match="does not fit"):
            encode(key, torch.from_numpy(numbers), rows, spec)
        return
    found = encode(key, torch.from_numpy(numbers), rows, spec)
    equal(found, expected)
    back = assemble(key, spec, found, rows)
    assert isinstance(back, Tensor)
    np.testing.assert_array_equal(back.numpy().view(np.uint32), codecs.decode(spec, expected)[""].view(np.uint32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["lm_logits@labels:select", "lm_logits:select", "lm_logits@last:select"])
@pytest.mark.parametrize("ids", [(), (3, 39, 0)])
def test_selected_logits_are_those_that_numpy_selects(name: str, dtype: Dtype, ids: tuple[int, ...]) -> None:
    key, rows = FeatureKey.parse(name), batch()
    value = values(key, rows, 40)
    spec = codecs.feature_spec(key, dtype, 40, ids, 4, "zstd")
    found, expected = encode(key, value, rows, spec), codecs.encode(spec, packed(key, value, rows), packed_labels(key, rows))
    np.testing.assert_allclose(found.pop("log_sum_exp"), expected.pop("log_sum_exp"), rtol=1e-6)
    equal(found, expected)


@pytest.mark.parametrize("chunk", [40, 120, 1 << 24])
@pytest.mark.parametrize("name", ["lm_logits@labels:top7", "lm_logits:top40", "lm_logits@last:top1"])
def test_likeliest_words_are_those_that_numpy_finds_also_among_equals(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    key, rows = FeatureKey.parse(name), batch()
    value = values(key, rows, 40).round()
    spec = codecs.feature_spec(key, "float32", 40)
    found, expected = encode(key, value, rows, spec), codecs.encode(spec, packed(key, value, rows))
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    assert found["ids"].dtype == np.uint16
    for part in ("log_probs", "log_tail"):
        assert found[part].dtype == np.float32
        np.testing.assert_allclose(found[part], expected[part], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("chunk", [1 << 13, 1 << 24])
@pytest.mark.parametrize("words", [1999, 2048])
def test_likeliest_words_of_a_large_vocabulary_are_found_also_among_equals(words: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    logits = torch.randn(24, words)
    logits[1:9] = (logits[1:9] * 4).round()  # words tie within and across groups
    logits[9:12] = -torch.inf
    logits[9:12, 5::200] = 1.0
    logits[12:14] = 0.0
    logits[14, words - 1] = 50.0
    found = top_k(logits, 20)
    exact = logits.double().numpy()
    order = np.argsort(-exact, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found.ids, order)
    log_sum = np.logaddexp.reduce(exact, axis=1, keepdims=True)
    finite = np.isfinite(np.take_along_axis(exact, order, 1))
    expected = np.take_along_axis(exact, order, 1) - log_sum
    np.testing.assert_allclose(found.log_probs.numpy()[finite], expected[finite], atol=2e-5, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([-60.0, -1.0, 0.0, 0.5, 0.5 + 2**-20, 3.0, 40.0, 90.0]) | st.floats(-80, 80, width=32), min_size=2, max_size=12
    ),
    data=st.data(),
)
def test_tail_mass_is_exact_however_peaked_the_words_are(logits: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(logits)))
    found = top_k(torch.tensor([logits]), k)
    exact = np.array(logits, np.float32).astype(np.float64)
    order = np.argsort(-exact, kind="stable")
    log_sum = np.logaddexp.reduce(exact)
    assert found.ids[0].tolist() == order[:k].tolist()
    np.testing.assert_allclose(found.log_probs[0], exact[order[:k]] - log_sum, atol=2e-5, rtol=2e-6)
    if k == len(logits):
        assert float(found.log_tail) == np.finfo(np.float32).min
    else:
        np.testing.assert_allclose(found.log_tail[0], np.logaddexp.reduce(exact[order[k:]]) - log_sum, atol=2e-5, rtol=2e-6)


def test_the_mass_of_kept_words_and_tail_is_one_in_half_precision_too() -> None:
    found = top_k((torch.randn(50, 3000) * 4).bfloat16(), 64)
    torch.testing.assert_close(found.log_probs.exp().sum(-1) + found.log_tail.exp(), torch.ones(50), atol=1e-5, rtol=0)


def test_more_words_than_the_vocabulary_has_are_refused() -> None:
    with pytest.raises(ValueError, match="the vocabulary has 3 words"):
        top_k(torch.zeros(1, 3), 4)


@pytest.mark.parametrize("name", ["hidden.1", "hidden.1@mean", "head_input@labels"])
def test_what_is_read_back_is_bit_for_bit_what_was_captured_with_zeros_on_padding(name: str) -> None:
    key, rows = FeatureKey.parse(name), batch()
    value = values(key, rows, 6)
    spec = codecs.feature_spec(key, "float32", 6)
    back = assemble(key, spec, encode(key, value, rows, spec), rows)
    assert isinstance(back, Tensor)
    assert torch.equal(back, torch.where(rows.mask[..., None], value, 0.0) if key.positions == "all" else value)


def kept(key: FeatureKey, dtype: StoreDtype, bits: int | None = None) -> FeatureSpec:
    return codecs.feature_spec(key, dtype, 64, keep_bits=bits, compression="none" if bits is None else "zstd")


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "bits"), [("float16", None), ("bfloat16", None), ("bfloat16", 3), ("float32", 9), ("int8", None), ("float8", None)]
)
def test_what_is_read_back_stays_within_the_declared_error(dtype: StoreDtype, bits: int | None, teacher: torch.dtype) -> None:
    key, rows = FeatureKey("hidden", 1), batch()
    value = values(key, rows, 64).to(teacher)
    spec = kept(key, dtype, bits)
    back = assemble(key, spec, encode(key, value, rows, spec), rows)
    assert isinstance(back, Tensor)
    assert back.dtype == torch.float32
    assert (back[~rows.mask] == 0).all()
    exact, found = value.double()[rows.mask], back.double()[rows.mask]
    bound = spec.error * exact.abs() + spec.error_of_largest * exact.abs().amax(-1, keepdim=True)
    assert ((found - exact).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize(("dtype", "bits"), [("int8", None), ("float8", None), ("bfloat16", 3)])
def test_no_tokens_are_no_values(dtype: StoreDtype, bits: int | None) -> None:
    key, rows = FeatureKey("hidden", 1, "labels"), batch()
    spec, none = kept(key, dtype, bits), torch.zeros(0, 64)
    stored = encode(key, none, rows, spec)
    assert {name: array.shape for name, array in stored.items()} == {array.name: (0, array.width) for array in spec.arrays}
    assert torch.equal(torch.as_tensor(assemble(key, spec, stored, rows)), none)


@pytest.mark.parametrize("positions", ["all", "labels", "first"])
def test_words_are_read_back_with_the_leading_shape_of_their_positions(positions: str) -> None:
    rows = batch()
    lead = {"all": rows.mask.shape, "labels": (int(rows.labelled.sum()),), "first": (3,)}[positions]
    top, chosen = FeatureKey("lm_logits", None, positions, "top3"), FeatureKey("lm_logits", None, positions, "select")
    value = values(top, rows, 40)
    spec = codecs.feature_spec(top, "float32", 40)
    likeliest = assemble(top, spec, encode(top, value, rows, spec), rows)
    assert isinstance(likeliest, TopK)
    assert likeliest.ids.dtype == torch.int64
    assert (likeliest.ids.shape, likeliest.log_probs.shape, likeliest.log_tail.shape) == ((*lead, 3), (*lead, 3), lead)
    spec = codecs.feature_spec(chosen, "float32", 40, (5, 2))
    selected = assemble(chosen, spec, encode(chosen, value, rows, spec), rows)
    assert isinstance(selected, Selected)
    assert selected.ids.tolist() == [5, 2]
    assert (selected.logits.shape, selected.true_logit.shape, selected.log_sum_exp.shape) == ((*lead, 2), lead, lead)


@pytest.mark.parametrize(
    ("bad", "dtype", "message"),
    [
        (7e4, "float16", r"7e\+04 does not fit float16, whose largest number is 6.55e\+04; store it with dtype: bfloat16"),
        (float("nan"), "float32", "the teacher answers NaN or infinity"),
        (float("inf"), "bfloat16", "the teacher answers NaN or infinity"),
        (float("nan"), "int8", "the teacher answers NaN or infinity"),
        (float("-inf"), "int8", "the teacher answers NaN or infinity"),
        (float("nan"), "float8", "the teacher answers NaN or infinity"),
        (float("inf"), "float8", "the teacher answers NaN or infinity"),
    ],
)
@pytest.mark.parametrize(("name", "place"), [("hidden.1", (2, 3)), ("hidden.1@last", (2,)), ("head_input@labels", (-1,))])
def test_a_number_that_is_not_finite_as_stored_names_row_and_feature(
    bad: float, dtype: StoreDtype, message: str, name: str, place: tuple[int, ...]
) -> None:
    key, rows = FeatureKey.parse(name), batch()
    assert rows.token_labels is not None
    rows.token_labels[2, 6] = 1
    value = values(key, rows, 6)
    value[place][1] = bad
    spec = codecs.feature_spec(key, dtype, 6)
    with pytest.raises(ValueError, match=rf"{key} of row 27 \(b.txt, record 2\): .*{message}"):
        encode(key, value, rows, spec, ["a.txt", "a.txt", "b.txt, record 2"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_may_hold_anything(dtype: StoreDtype) -> None:
    key, rows = FeatureKey("hidden", 1), batch()
    value = values(key, rows, 6).masked_fill(~rows.mask[..., None], torch.nan)
    spec = codecs.feature_spec(key, dtype, 6)
    assert np.isfinite(codecs.decode(spec, encode(key, value, rows, spec))[""]).all()
