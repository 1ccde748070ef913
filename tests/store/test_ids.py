"""Word ids of large vocabularies lie in as many bits as they need, in the store and on a device alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from online import ids as on_device
from store.codecs import decode, encode, feature_spec
from store.codecs.ids import ids_array, pack, unpack
from store.features import ArraySpec, FeatureKey

LARGEST = 1 << 24


@settings(max_examples=150, deadline=None)
@given(words=st.integers(2, LARGEST), count=st.integers(1, 70), units=st.integers(0, 4), seed=st.integers(0, 2**32 - 1))
def test_any_ids_of_any_vocabulary_come_back_from_both_halves(words: int, count: int, units: int, seed: int) -> None:
    bits = max(8, (words - 1).bit_length())
    ids = np.random.default_rng(seed).integers(0, words, (units, count))
    ids[: units // 2] = words - 1
    packed = pack(ids, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (units, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits), ids)
    of_device = on_device.pack(torch.from_numpy(ids), bits)
    np.testing.assert_array_equal(of_device.numpy(), packed)
    np.testing.assert_array_equal(on_device.unpack(of_device, bits).numpy(), ids)


@pytest.mark.parametrize("bits", [8, 13, 17, 18, 24])
def test_an_id_has_the_bits_from_its_place_on_the_lowest_first(bits: int) -> None:
    ids = np.random.default_rng(bits).integers(0, 1 << bits, (3, 11))
    for row, packed in zip(ids.tolist(), pack(ids, bits), strict=True):
        number = sum(word << (place * bits) for place, word in enumerate(row))
        assert packed.tobytes() == number.to_bytes(-(-11 * bits // 8), "little")


@pytest.mark.parametrize(
    ("words", "dtype", "width", "bits"),
    [(200, "uint16", 7, None), (65_536, "uint16", 7, None), (65_537, "uint8", 15, 17), (150_000, "uint8", 16, 18),
     (200_000, "uint8", 16, 18), (LARGEST, "uint8", 21, 24)],
)  # fmt: skip
def test_small_vocabularies_have_plain_ids_and_others_the_bits_they_need(words: int, dtype: str, width: int, bits: int | None) -> None:
    array = ids_array(7, words)
    assert (array.dtype, array.width, array.bits, array.numbers) == (dtype, width, bits, 7)


@pytest.mark.parametrize("words", [150_000, 200_000])
def test_the_likeliest_of_many_words_keep_their_ids(words: int) -> None:
    logits = np.random.default_rng(1).normal(size=(5, words)).astype(np.float32)
    logits[0, words - 1] = logits[1, 131_072] = 20
    spec = feature_spec(FeatureKey.parse("lm_logits@labels:top9"), "float16", words)
    assert spec.unit_bytes == 21 + 18 + 4
    stored = encode(spec, logits)
    np.testing.assert_array_equal(decode(spec, stored)["ids"], np.argsort(-logits, axis=1, kind="stable")[:, :9])


def test_bits_are_of_bytes() -> None:
    for wrong in ({"dtype": "int32", "width": 4}, {"dtype": "uint8", "width": 2}):
        with pytest.raises(ValidationError, match="ids of 17 bits lie in uint8, 3 or more"):
            ArraySpec.model_validate({"name": "ids", "bits": 17, **wrong})
