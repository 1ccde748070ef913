"""Captured features against transformers' own outputs, computed one document at a time without padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from online.batch import IGNORED, Batch, Features, dense
from online.capture import Capture
from online.families import FAMILIES
from online.models import LoadedModel, ModelSpec, forward, load_model
from online.statics import live_statics
from store.features import FeatureKey
from store.shape import Head

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LAYERS = 3


def capture(loaded: LoadedModel, batch: Batch, names: list[str]) -> Features:
    keys = [FeatureKey.parse(name) for name in names]
    with torch.no_grad(), Capture(loaded, keys) as capture:
        forward(loaded, batch)
        return capture.features(batch)


def at(features: Features, name: str) -> Tensor:
    return dense(features, FeatureKey.parse(name))


BIDIRECTIONAL = "gemma3_text, bidirectional"
MOBILE = ("mobilebert, inverted", "mobilebert, attention in the bottleneck", "mobilebert, no bottleneck")
NAMES = [*FAMILIES, BIDIRECTIONAL, *MOBILE]
ATTENTIONS = [(name, attention) for name in NAMES for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")]
OUTPUT_PROJECTIONS = ("attention.output.dense", "attention.out_lin", "attn.Wo", "attn.c_proj", "self_attn.o_proj")


def word_head_of(name: str) -> Head:
    return "causal_lm" if FAMILIES[name.partition(",")[0]].causal else "masked_lm"


def layered(site: str) -> list[str]:
    return [f"{site}.{i}" for i in range(1, LAYERS + 1)]


def attended(model: PreTrainedModel, text: Tensor) -> tuple[object, list[Tensor]]:
    """transformers' outputs for one document, and what each block's attention feeds its output projection."""
    seen: list[Tensor] = []
    projections = [module for name, module in model.named_modules() if name.endswith(OUTPUT_PROJECTIONS)]
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for module in projections]
    with torch.no_grad():
        output = model(text[None], output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    assert len(seen) == LAYERS
    return output, seen


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_features_equal_those_that_transformers_computes_for_each_document_alone(
    name: str, attention: str, kind: str, tiny_model: Build, lay_out: LayOut
) -> None:
    eager = tiny_model(name, word_head_of(name))
    model = tiny_model(name, word_head_of(name), attention)
    loaded, (batch, places) = LoadedModel.of(model, word_head_of(name)), lay_out(kind)
    if kind == "packed" and getattr(model.config, "trigram_input", False):
        with pytest.raises(ValueError, match="trigram_input mixes the words of neighbouring documents"):
            forward(loaded, batch)
        return
    sites = ["hidden.0", *layered("hidden"), *layered("value"), *layered("attention_scores"), *layered("attention_probs")]
    features = capture(loaded, batch, [*sites, "final", "lm_logits"])
    shape = loaded.shape
    for text, row, place in places:
        output, mixed = attended(eager, text)
        states = [at(features, f"hidden.{i}")[row, place] for i in range(LAYERS)] + [at(features, "final")[row, place]]
        for state, expected in zip(states, output.hidden_states, strict=True):
            torch.testing.assert_close(state, expected[0], **TOLERANCE)
        torch.testing.assert_close(at(features, "lm_logits")[row, place], output.logits[0], **TOLERANCE)
        for i in range(LAYERS):
            probs_HTT = output.attentions[i][0]
            torch.testing.assert_close(at(features, f"attention_probs.{i + 1}")[row, :, place, place], probs_HTT, **TOLERANCE)
            scores_HTT = at(features, f"attention_scores.{i + 1}")[row, :, place, place]
            torch.testing.assert_close(scores_HTT.softmax(-1), probs_HTT, **TOLERANCE)
            assert torch.equal(scores_HTT == torch.finfo(torch.float32).min, probs_HTT == 0)
            value_THC = at(features, f"value.{i + 1}")[row, place].unflatten(-1, (shape.kv_heads, shape.head_width))
            value_HTC = value_THC.transpose(0, 1).repeat_interleave(shape.heads // shape.kv_heads, dim=0)
            torch.testing.assert_close((probs_HTT @ value_HTC).transpose(0, 1).flatten(1), mixed[i], **TOLERANCE)


def reference_norm(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    if kind == "affine":
        assert bias is not None
        return x * weight + bias
    if kind == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * weight + (0 if bias is None else bias.double())
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if kind == "rms_one" else weight)


@pytest.mark.parametrize("name", NAMES)
def test_statics_and_wiring_turn_hidden_states_into_inputs_projections_and_logits(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model(name, word_head_of(name)), word_head_of(name)), lay_out("right")[0]
    mask, wiring = batch.mask, loaded.wiring
    sites = [f"{site}.{i}" for site in ("hidden", "input", "query", "key", "value") for i in range(1, LAYERS + 1)]
    captured = capture(loaded, batch, ["hidden.0", *sites, "final", "head_input", "lm_logits"])
    features = {str(key): dense(captured, key)[mask].double() for key in captured}
    fronts = [f"{part}.{w}" for part in ("norm", "bottleneck", "bottleneck_norm") for w in ("weight", "bias")]
    blocks = [f"{i}.{part}" for i in range(1, LAYERS + 1) for part in fronts]
    blocks += [f"{i}.{p}.{w}" for i in range(1, LAYERS + 1) for p in ("query", "key", "value") for w in ("weight", "bias")]
    tails = [f"{part}.{w}" for part in ("final_norm", "transform", "transform_norm", "head") for w in ("weight", "bias")]
    with torch.no_grad():
        statics = {key: value.double() for key, value in live_statics(loaded, [*blocks, *tails]).items()}

    def normed(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in statics:
            return x
        assert wiring.norm is not None
        return reference_norm(x, wiring.norm, statics[f"{name}.weight"], statics.get(f"{name}.bias"), wiring.norm_eps)

    def entering(i: int) -> Tensor:
        state = features[f"hidden.{i - 1}@all"]
        if f"{i}.bottleneck.weight" not in statics:
            return normed(f"{i}.norm", state)
        assert wiring.bottleneck_norm is not None
        squeezed = F.linear(state, statics[f"{i}.bottleneck.weight"], statics[f"{i}.bottleneck.bias"])
        weight, bias = statics[f"{i}.bottleneck_norm.weight"], statics[f"{i}.bottleneck_norm.bias"]
        return reference_norm(squeezed, wiring.bottleneck_norm, weight, bias, wiring.bottleneck_norm_eps)

    past = name in ("mobilebert", "mobilebert, inverted")  # values are projected from hidden states
    for i in range(1, LAYERS + 1):
        torch.testing.assert_close(entering(i), features[f"input.{i}@all"], **TOLERANCE)
        for site in ("query", "key", "value"):
            source = features[f"hidden.{i - 1}@all" if past and site == "value" else f"input.{i}@all"]
            projected = F.linear(source, statics[f"{i}.{site}.weight"], statics.get(f"{i}.{site}.bias"))
            torch.testing.assert_close(projected, features[f"{site}.{i}@all"], **TOLERANCE)
    torch.testing.assert_close(normed("final_norm", features[f"hidden.{LAYERS}@all"]), features["final@all"], **TOLERANCE)
    head_input = features["final@all"]
    if wiring.head_activation is not None:
        assert wiring.head_activation in ("gelu", "relu")
        activation = F.gelu if wiring.head_activation == "gelu" else F.relu
        head_input = activation(F.linear(head_input, statics["transform.weight"], statics["transform.bias"]))
        bias = statics.get("transform_norm.bias")
        head_input = reference_norm(head_input, "layer", statics["transform_norm.weight"], bias, wiring.head_norm_eps)
    torch.testing.assert_close(head_input, features["head_input@all"], **TOLERANCE)
    logits = F.linear(head_input, statics["head.weight"], statics.get("head.bias"))
    logits = logits if wiring.logit_cap is None else (logits / wiring.logit_cap).tanh() * wiring.logit_cap
    torch.testing.assert_close(logits, features["lm_logits@all"], **TOLERANCE)
    assert ("1.norm.weight" in statics) == (loaded.shape.pre_norm and wiring.first_norm)


@pytest.mark.parametrize("head", ["base", "classification", "token_classification", "multiple_choice"])
@pytest.mark.parametrize("name", [*FAMILIES, *MOBILE])
def test_every_head_answers_as_in_transformers(name: str, head: Head, tiny_model: Build, lay_out: LayOut) -> None:
    if head not in FAMILIES[name.partition(",")[0]].heads:
        with pytest.raises(ValueError, match="has no head"):
            LoadedModel.of(tiny_model(name, "base"), head)
        return
    model = tiny_model(name, head, "sdpa" if name != "gemma2" else "eager")
    loaded, (batch, places) = LoadedModel.of(model, head), lay_out("right")
    if head == "base":
        final = at(capture(loaded, batch, ["final"]), "final")
        for text, row, place in places:
            torch.testing.assert_close(final[row, place], model(text[None]).last_hidden_state[0], **TOLERANCE)
        return
    key = "task_logits@all" if head == "token_classification" else "task_logits@row"
    logits = at(capture(loaded, batch, [key]), key)
    assert loaded.shape.labels == (1 if head == "multiple_choice" else 3)
    for text, row, place in places:
        expected = model(text[None, None] if head == "multiple_choice" else text[None]).logits[0]
        torch.testing.assert_close(logits[row, place] if head == "token_classification" else logits[row], expected, **TOLERANCE)


@pytest.mark.parametrize(("folder", "head"), [("mlm", "masked_lm"), ("sst2", "classification")])
def test_a_real_teacher_answers_under_sdpa_as_transformers_does_in_eager(shared: Path, folder: str, head: Head) -> None:
    spec = ModelSpec(model=shared / "teachers" / folder, head=head)
    loaded, eager = load_model(spec), load_model(spec, attention="eager").model
    assert loaded.tokenizer is not None
    encoded = loaded.tokenizer(["a gripping and moving film", "dull"], padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    order = torch.arange(2)
    batch = Batch(order, ids, mask, None, None, None, torch.where(mask, ids, IGNORED), None, order)
    key = "lm_logits@labels" if head == "masked_lm" else "task_logits"
    features = capture(loaded, batch, ["hidden.0", "hidden.6", "attention_probs.6", key])
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(at(features, "hidden.6")[mask], expected.hidden_states[6][mask], **TOLERANCE)
    probs_BTHT = at(features, "attention_probs.6").transpose(1, 2)
    torch.testing.assert_close(probs_BTHT[mask], expected.attentions[5].transpose(1, 2)[mask], **TOLERANCE)
    logits = expected.logits[mask] if head == "masked_lm" else expected.logits
    torch.testing.assert_close(at(features, key), logits, atol=1e-4, rtol=1e-4)
