"""Features derived from what the planner stores, against transformers' own eager outputs for each document alone."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from online.batch import Batch, Features, TopK, dense
from online.capture import Capture
from online.derive import Statics, derive, steps
from online.families import FAMILIES
from online.models import LoadedModel, forward
from online.planner import plan
from online.statics import live_statics
from online.teacher import float_statics
from store.features import FeatureKey
from store.shape import Head

LAYERS = 3
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
NAMES = [*FAMILIES, "mobilebert, inverted", "mobilebert, attention in the bottleneck", "mobilebert, no bottleneck"]

TinyModel = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]


def word_head(name: str) -> Head:
    return "causal_lm" if FAMILIES[name.partition(",")[0]].causal else "masked_lm"


def load(tiny_model: TinyModel, name: str, attention: str = "eager") -> LoadedModel:
    return LoadedModel.of(tiny_model(name, word_head(name), attention), word_head(name))


def keys(*names: str) -> list[FeatureKey]:
    return [FeatureKey.parse(name) for name in names]


def captured(loaded: LoadedModel, batch: Batch, wanted: Iterable[FeatureKey]) -> Features:
    with torch.no_grad(), Capture(loaded, wanted) as capture:
        forward(loaded, batch)
        return capture.features(batch)


def from_stored(loaded: LoadedModel, batch: Batch, wanted: list[FeatureKey]) -> Features:
    """``wanted``, from the few features that the planner would store of them."""
    what = plan(dict.fromkeys(wanted, "float32"), loaded.shape, loaded.wiring)
    statics = float_statics(live_statics(loaded, what.statics))
    return derive(wanted, captured(loaded, batch, what.stored), statics, batch, loaded.shape, loaded.wiring)


def at(features: Features, name: str) -> Tensor:
    return dense(features, FeatureKey.parse(name))


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_and_logits_derived_from_stored_features_are_those_of_transformers(
    name: str, kind: str, tiny_model: TinyModel, lay_out: LayOut
) -> None:
    eager, loaded = tiny_model(name, word_head(name)), load(tiny_model, name, "eager" if name == "gemma2" else "sdpa")
    if kind == "packed" and getattr(eager.config, "trigram_input", False):
        pytest.skip("trigrams would mix the words of neighbouring documents: refused, as test_capture_parity.py shows")
    batch, places = lay_out(kind)
    wanted = keys(
        *(f"{site}.{i}" for i in (1, 2, 3) for site in ("hidden", "attention_probs", "attention_scores")), "hidden.0", "lm_logits"
    )
    what = plan(dict.fromkeys(wanted, "float32"), loaded.shape, loaded.wiring)
    assert sorted(key.site for key in what.stored if key.site not in ("hidden", "input", "final")) == []
    assert len(what.stored) == LAYERS + 1
    features = from_stored(loaded, batch, wanted)
    for text, row, place in places:
        with torch.no_grad():
            output = eager(text[None], output_attentions=True)
        torch.testing.assert_close(at(features, "lm_logits")[row, place], output.logits[0], **TOLERANCE)
        for i in (1, 2, 3):
            probs_HTT = output.attentions[i - 1][0]
            torch.testing.assert_close(at(features, f"attention_probs.{i}")[row, :, place, place], probs_HTT, **TOLERANCE)
            scores_HTT = at(features, f"attention_scores.{i}")[row, :, place, place]
            assert torch.equal(scores_HTT == torch.finfo(torch.float32).min, probs_HTT == 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_site_and_choice_of_tokens_derives_to_what_is_captured(name: str, tiny_model: TinyModel, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, name), lay_out("right")
    sites = [f"{site}.{i}" for i in (1, 2, 3) for site in ("input", "query", "key", "value")] + [
        "hidden.0",
        "final",
        "head_input",
        "lm_logits",
    ]
    wanted = keys(*(f"{site}@{positions}" for site in sites for positions in ("all", "first", "last", "labels", "masked", "mean")))
    direct = captured(loaded, batch, wanted)
    stored = captured(loaded, batch, keys("hidden.0", "hidden.1", "hidden.2", "hidden.3"))
    names = {static for key in wanted for static in plan({key: "float32"}, loaded.shape, loaded.wiring).statics}
    names |= set(plan(dict.fromkeys([*stored, *wanted], "float32"), loaded.shape, loaded.wiring).statics)
    derived = derive(wanted, stored, float_statics(live_statics(loaded, names)), batch, loaded.shape, loaded.wiring)
    for key in wanted:
        found, expected = dense(derived, key), dense(direct, key)
        if key.positions == "all":
            found, expected = found[batch.mask], expected[batch.mask]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


def test_aliases_of_post_norm_models_read_both_ways(tiny_model: TinyModel, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, "bert"), lay_out("right")
    direct = captured(loaded, batch, keys("input.2", "final", "hidden.1", "hidden.3"))
    for name, source in (("hidden.1", "input.2"), ("input.2", "hidden.1"), ("hidden.3", "final"), ("final", "hidden.3")):
        have = {FeatureKey.parse(source): at(direct, source)}
        assert torch.equal(at(derive(keys(name), have, {}, batch, loaded.shape, loaded.wiring), name), at(direct, name))


def test_pre_norm_hidden_states_do_not_follow_from_normed_ones(tiny_model: TinyModel) -> None:
    loaded = load(tiny_model, "llama")
    assert steps(FeatureKey("hidden", 1), loaded.shape, loaded.wiring) == []
    assert steps(FeatureKey("hidden", 3), loaded.shape, loaded.wiring) == []
    modern = load(tiny_model, "modernbert")
    assert [step.sources for step in steps(FeatureKey("hidden", 0), modern.shape, modern.wiring)] == [(FeatureKey("input", 1),)]


def test_word_logits_are_computed_for_the_wanted_tokens_alone(tiny_model: TinyModel, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, "bert"), lay_out("right")
    assert steps(keys("lm_logits@labels")[0], loaded.shape, loaded.wiring)[0].sources == (FeatureKey("head_input", positions="labels"),)
    features = from_stored(loaded, batch, keys("lm_logits@labels", "final", "lm_logits@labels:top5"))
    assert at(features, "lm_logits@labels").shape == (int(batch.labelled.sum()), loaded.shape.vocab)
    top = features[FeatureKey.parse("lm_logits@labels:top5")]
    assert isinstance(top, TopK)
    torch.testing.assert_close(top.log_probs, at(features, "lm_logits@labels").log_softmax(-1).topk(5).values)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_autocast_does_not_reach_derivations(name: str, tiny_model: TinyModel, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, name), lay_out("right")
    wanted = keys("attention_scores.2", "value.2", "lm_logits@labels")
    what = plan(dict.fromkeys(wanted, "float32"), loaded.shape, loaded.wiring)
    stored, statics = captured(loaded, batch, what.stored), float_statics(live_statics(loaded, what.statics))
    plain = derive(wanted, stored, statics, batch, loaded.shape, loaded.wiring)
    with torch.autocast("cpu", torch.bfloat16):
        under = derive(wanted, stored, statics, batch, loaded.shape, loaded.wiring)
    for key in wanted:
        assert torch.equal(dense(plain, key), dense(under, key))


def test_what_does_not_follow_is_an_error_that_names_what_is_there(tiny_model: TinyModel, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, "bert"), lay_out("right")
    have, nothing = captured(loaded, batch, keys("hidden.1")), dict[str, Tensor]()
    statics: Statics = nothing
    for name in ("hidden.2", "value.2", "lm_logits"):  # the weights of value.2 are not at hand
        with pytest.raises(ValueError, match=f"{name}@all does not follow from hidden.1@all"):
            derive(keys(name), have, statics, batch, loaded.shape, loaded.wiring)
