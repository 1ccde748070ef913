"""The codec topband: its bands cover the vocabulary, and both halves keep the same."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online.bands import log_masses, top_banded
from store.codecs import decode, encode, feature_spec
from store.codecs.topband import NONE, starts
from store.features import FeatureKey
from store.forms import word_form


@settings(deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 255))
def test_bands_begin_at_the_first_word_and_none_is_empty(words: int, bands: int) -> None:
    bands = min(words, bands)
    found = [*starts(words, bands), words]
    assert found[0] == 0
    assert len(found) == bands + 1
    assert all(before < after for before, after in itertools.pairwise(found))


def test_bands_widen_with_the_ids() -> None:
    first = starts(30_522, 12)
    assert list(first) == [math.floor(1000 * (31.522 ** (b / 12) - 1)) for b in range(12)]


def test_masses_are_those_of_the_words_that_are_not_kept_within_a_step() -> None:
    generator = np.random.default_rng(0)
    logits = (generator.standard_normal((40, 5000)) * 3).astype(np.float32)
    spec = feature_spec(FeatureKey.parse("lm_logits@all:top6band12"), "float32", 5000)
    kept = decode(spec, encode(spec, logits))
    probs = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    bounds = [*starts(5000, 12), 5000]
    for row in range(40):
        likeliest = sorted(range(5000), key=lambda word, row=row: (-logits[row, word], word))[:6]
        assert kept["ids"][row].tolist() == likeliest
        assert np.allclose(np.exp(kept["log_probs"][row]), probs[row, likeliest], rtol=1e-5)
        for band in range(12):
            mass = sum(probs[row, word] for word in range(bounds[band], bounds[band + 1]) if word not in likeliest)
            assert abs(kept["bands"][row, band] / -16 - math.log(mass)) <= 1 / 32 + 1e-9


def test_the_device_keeps_what_numpy_keeps() -> None:
    generator = np.random.default_rng(1)
    logits = (generator.standard_normal((64, 2000)) * 4).astype(np.float32)
    logits[:, 700:] -= 60  # bands without mass
    form = word_form("top5band9")
    assert form is not None
    spec = feature_spec(FeatureKey.parse("lm_logits@all:top5band9"), "float32", 2000)
    kept, found = encode(spec, logits), top_banded(torch.from_numpy(logits), form)
    assert found.ids.tolist() == kept["ids"].tolist()
    assert np.allclose(found.log_probs.numpy(), kept["log_probs"], atol=2e-6)
    assert np.abs(found.bands.numpy() - kept["bands"]).max() <= 1  # a mass on the edge of a step may round to either side
    assert (found.bands.numpy() != kept["bands"]).mean() < 0.01
    assert found.bands[:, -1].tolist() == [NONE] * 64
    assert log_masses(found.bands)[:, -1].exp().tolist() == [0.0] * 64


def test_more_bands_than_words_are_refused() -> None:
    with pytest.raises(ValueError, match="top2band9: the vocabulary has 8 words"):
        feature_spec(FeatureKey.parse("lm_logits@all:top2band9"), "float16", 8)
