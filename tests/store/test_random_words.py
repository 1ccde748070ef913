"""Nuclei and words drawn at random, as NumPy keeps them: loops in float64, and what they come to on average."""

import math

import numpy as np
import pytest

from store.codecs import decode, encode, feature_spec
from store.codecs.draw import chosen
from store.codecs.topdraw import points
from store.codecs.topk import UNUSED
from store.features import FeatureKey, FeatureSpec, StoreDtype
from store.forms import word_form
from store.seeds import token_seeds, uniforms

LOGITS = (np.random.default_rng(0).normal(0, 2, (40, 23)) * 1.5).astype(np.float32)
NEAR = LOGITS / 2
"""Without words that have nearly all of the mass."""
SEEDS = token_seeds(np.arange(40))


def spec(form: str, dtype: StoreDtype = "float32", words: int = 23) -> FeatureSpec:
    return feature_spec(FeatureKey.parse(f"lm_logits@labels:{form}"), dtype, words)


def softmax(logits: np.ndarray, power: float = 1.0) -> list[float]:
    masses = [math.exp(float(logit) * power) for logit in logits]
    return [mass / sum(masses) for mass in masses]


def at(shares: list[float], point: float) -> int:
    """The word at a point of the running sum of shares."""
    running = 0.0
    for word, share in enumerate(shares):
        running += share
        if running > point:
            return word
    return len(shares) - 1


@pytest.mark.parametrize(
    ("form", "share", "least"), [("top9p8", 0.8, 1), ("top9p5min3", 0.5, 3), ("top23p999", 0.999, 1), ("top3p99", 0.99, 1)]
)
def test_a_nucleus_has_the_fewest_likeliest_words_that_reach_its_mass(form: str, share: float, least: int) -> None:
    found, most, used = decode(spec(form), encode(spec(form), NEAR)), word_form(form), set()
    assert most is not None
    for unit, logits in enumerate(NEAR):
        p = softmax(logits)
        order, kept, mass = sorted(range(23), key=lambda word: -p[word]), [], 0.0
        for word in order:
            if len(kept) < most.top and (mass < share or len(kept) < least):
                kept.append(word)
                mass += p[word]
        unused = most.top - len(kept)
        used.add(len(kept))
        assert found["ids"][unit].tolist() == kept + [0] * unused
        np.testing.assert_allclose(found["log_probs"][unit], [math.log(p[word]) for word in kept] + [UNUSED] * unused, rtol=1e-5)
        rest = math.fsum(p[word] for word in order[len(kept) :])
        assert found["log_tail"][unit, 0] == pytest.approx(math.log(rest) if rest else np.finfo(np.float32).min, rel=1e-5)
    assert form == "top3p99" or len(used) > 2
    assert min(used) >= least


@pytest.mark.parametrize(("form", "power"), [("draw12", 1.0), ("draw12tau80", 0.8), ("draw7tau150x3", 1.5), ("draw300", 1.0)])
def test_draws_are_where_their_numbers_lie_on_the_running_sum(form: str, power: float) -> None:
    named, kept = word_form(form), spec(form, "float16")
    assert named is not None
    found = decode(kept, encode(kept, LOGITS, seeds=SEEDS))
    for unit, logits in enumerate(LOGITS):
        t, q = softmax(logits), softmax(logits, power)
        words = [at(q, point) for point in uniforms(SEEDS[unit : unit + 1], named.drawn)[0]]
        for number in range(named.samples):
            places = slice(number * named.draws, (number + 1) * named.draws)
            drawn = words[places]
            distinct = sorted(set(drawn))
            unused = [0] * (named.draws - len(distinct))
            assert found["ids"][unit, places].tolist() == distinct + unused
            assert found["counts"][unit, places].tolist() == [drawn.count(word) for word in distinct] + unused
            if power != 1:
                expected = [math.log(t[word] / q[word]) for word in distinct] + unused
                np.testing.assert_allclose(found["log_weights"][unit, places], expected, rtol=2.0**-10, atol=1e-6)
    assert ("log_weights" in found) == (power != 1)


@pytest.mark.parametrize("form", ["top4draw9", "top1draw5x3", "top22draw2"])
def test_beside_the_likeliest_words_others_lie_evenly_on_the_running_sum_of_the_rest(form: str) -> None:
    named, kept = word_form(form), spec(form)
    assert named is not None
    found = decode(kept, encode(kept, LOGITS, seeds=SEEDS))
    for unit, logits in enumerate(LOGITS):
        t = softmax(logits)
        head = sorted(range(23), key=lambda word: -t[word])[: named.top]
        rest = [0.0 if word in head else share for word, share in enumerate(t)]
        mass = math.fsum(rest)
        expected = list(head)
        for start in uniforms(SEEDS[unit : unit + 1], named.samples)[0]:
            expected += [at(rest, (start + j) / named.draws * mass) for j in range(named.draws)]
        assert found["ids"][unit].tolist() == expected
        assert not set(expected[named.top :]) & set(head)
        np.testing.assert_allclose(found["log_probs"][unit], [math.log(t[word]) for word in head], rtol=1e-5, atol=1e-7)
        assert found["log_tail"][unit, 0] == pytest.approx(math.log(mass), rel=1e-5)


def test_over_all_random_numbers_each_word_has_exactly_its_mass() -> None:
    """Masses are 24ths, so that the steps of a grid of 24 * 5 * 7 numbers end where words do: the sum over it is the integral."""
    masses = np.array([3, 0, 7, 1, 1, 8, 2, 0, 2])
    with np.errstate(divide="ignore"):
        scores = np.log(masses)[None]
    grid = (np.arange(840) + 0.5) / 840
    share = np.bincount(chosen(scores, grid[None])[0], minlength=9) / 840
    np.testing.assert_allclose(share, masses / 24, atol=1e-12)
    for draws in (5, 7):
        found = np.bincount(chosen(scores, points(grid[None], draws).reshape(1, -1))[0], minlength=9) / (840 * draws)
        np.testing.assert_allclose(found, masses / 24, atol=1e-12)


def test_a_word_without_mass_is_never_drawn_wherever_the_point() -> None:
    scores = np.full((1, 50), -np.inf)
    scores[0, [7, 31]] = [0.0, -60.0]  # the second has e**-60 of the first
    ends = np.array([[0.0, 2.0**-49, 0.5, 1 - 2.0**-49, 1.0]])
    assert set(chosen(scores, ends)[0].tolist()) == {7}


def test_where_no_mass_is_left_the_tail_is_finite_in_every_type() -> None:
    logits = np.zeros((1, 9), np.float32)
    logits[0, 2] = 3e4
    for dtype in ("float32", "float16", "bfloat16"):
        kept = spec("top1draw3", dtype, 9)
        found = decode(kept, encode(kept, logits, seeds=SEEDS[:1]))
        assert found["log_probs"].tolist() == [[0.0]]
        assert found["log_tail"][0, 0] == pytest.approx(-3e4, rel=1e-2)
    logits[0, 2] = 1e6
    kept = spec("top1draw3", "float16", 9)
    assert decode(kept, encode(kept, logits, seeds=SEEDS[:1]))["log_tail"].tolist() == [[UNUSED]]
