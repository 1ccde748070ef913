"""Interventions among other contexts: Capture inside and around, two at once, heads, modes; what is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from online.batch import Batch, dense
from online.capture import Capture
from online.intervene import Intervene
from online.models import LoadedModel, forward
from online.places import put
from online.taps import attention_module
from online.written_attention import Write
from store.features import FeatureKey
from store.shape import Head

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def keys(*names: str) -> list[FeatureKey]:
    return [FeatureKey.parse(name) for name in names]


def written(loaded: LoadedModel, **writes: Write) -> Intervene:
    """``hidden_2=f`` writes hidden.2 with f."""
    return Intervene(
        loaded, {FeatureKey.parse(name[:-2] + "." + name[-1] if name[-1].isdigit() else name): f for name, f in writes.items()}
    )


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("site", ["hidden.0", "hidden.2", "input.2", "value.2", "final"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mobilebert"])
def test_capture_inside_sees_what_was_written_and_capture_around_what_was_there(
    name: str, site: str, tiny_model: Build, lay_out: LayOut
) -> None:
    loaded, batch = LoadedModel.of(tiny_model(name, "base"), "base"), lay_out("right")[0]
    key, later = keys(site, "hidden.3")
    with torch.no_grad():
        with Capture(loaded, [key, later]) as plain:
            forward(loaded, batch)
        with Intervene(loaded, {key: double}), Capture(loaded, [key, later]) as inside:
            forward(loaded, batch)
        with Capture(loaded, [key, later]) as around, Intervene(loaded, {key: double}):
            forward(loaded, batch)
    before, new, old = (dense(capture.features(batch), key) for capture in (plain, inside, around))
    assert torch.equal(new, before * 2)
    assert torch.equal(old, before)
    if site != "final":  # both see the rest of the model as it ran
        unwritten, seen_inside, seen_around = (dense(capture.features(batch), later) for capture in (plain, inside, around))
        assert torch.equal(seen_inside, seen_around)
        assert not torch.equal(seen_inside, unwritten)


def test_an_intervention_inside_another_gets_what_that_one_wrote(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm"), "masked_lm"), lay_out("right")[0]
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.no_grad(), written(loaded, hidden_1=double, attention_scores_2=lambda x: keep(x * 0.5)):
        inner = written(loaded, hidden_1=lambda x: x + 1, attention_scores_2=lambda x: keep(x - 0.25))
        with inner, written(loaded, attention_probs_2=keep):
            both = forward(loaded, batch).logits
        outer = forward(loaded, batch).logits
    with torch.no_grad(), written(loaded, hidden_1=lambda x: x * 2 + 1, attention_scores_2=lambda x: x * 0.5 - 0.25):
        assert torch.equal(forward(loaded, batch).logits, both)
    with torch.no_grad(), written(loaded, hidden_1=double, attention_scores_2=lambda x: x * 0.5):
        assert torch.equal(forward(loaded, batch).logits, outer)
    assert len(seen) == 3 + 1
    assert torch.equal(seen[1], seen[0] - 0.25)
    assert torch.equal(seen[2], seen[1].softmax(-1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_is_left_behind_after_a_pass_or_an_error(attention: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm", attention), "masked_lm"), lay_out("right")[0]
    modules = [attention_module(loaded, layer) for layer in (1, 2, 3)]

    def traces() -> int:
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.model.modules())
        return hooks + sum(module.config is not loaded.model.config for module in modules)

    with torch.no_grad():
        plain = forward(loaded, batch).logits
        with written(loaded, hidden_1=double, query_2=double, head_input=double, attention_probs_1=double, attention_scores_3=double):
            assert traces() == 3 + 2 + 2
            assert loaded.model.config._attn_implementation == attention
            forward(loaded, batch)
        assert traces() == 0
        with pytest.raises(IndexError), written(loaded, hidden_1=double, attention_probs_1=double):
            forward(loaded, replace(batch, input_ids=batch.input_ids + 61))
        assert traces() == 0
        assert torch.equal(forward(loaded, batch).logits, plain)


@pytest.mark.parametrize("name", ["bert", "gemma2", "mobilebert"])
def test_word_logits_and_the_heads_input_are_written_with_and_without_capture(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    head: Head = "causal_lm" if name == "gemma2" else "masked_lm"
    loaded, batch = LoadedModel.of(tiny_model(name, head), head), lay_out("right")[0]
    every, labels = keys("lm_logits", "lm_logits@labels")
    with torch.no_grad():
        with Capture(loaded, [every]) as capture:
            forward(loaded, batch)
        plain = dense(capture.features(batch), every)
        with written(loaded, lm_logits=lambda x: put(x, 9.0, channels=[5])):
            logits = forward(loaded, batch).logits[batch.mask]
        assert (logits[:, 5] == 9.0).all()  # also above a soft cap
        torch.testing.assert_close(logits[:, 6:], plain[batch.mask][:, 6:], **TOLERANCE)
        with written(loaded, head_input=double):
            expected = forward(loaded, batch).logits
            with Capture(loaded, [every, labels]) as capture:
                forward(loaded, batch)
            inside = capture.features(batch)  # while the intervention still holds
        torch.testing.assert_close(dense(inside, every)[batch.mask], expected[batch.mask], **TOLERANCE)
        torch.testing.assert_close(dense(inside, labels), expected[batch.labelled], **TOLERANCE)
        assert not torch.allclose(expected[batch.mask], plain[batch.mask], atol=1e-2)
        around = "a Capture around Intervene feeds the language-model head nothing"
        with pytest.raises(ValueError, match=around), Capture(loaded, [every]), written(loaded, head_input=double):
            forward(loaded, batch)
        for contexts in (
            (written(loaded, lm_logits=double), Capture(loaded, [])),
            (Capture(loaded, []), written(loaded, lm_logits=double)),
        ):
            with pytest.raises(ValueError, match="Capture computes word logits after the pass"), contexts[0], contexts[1]:
                forward(loaded, batch)


@pytest.mark.parametrize(("name", "head"), [("bert", "classification"), ("gpt2", "classification"), ("bert", "token_classification")])
def test_task_logits_are_written(name: str, head: Head, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model(name, head), head), lay_out("right")[0]
    key = FeatureKey.parse("task_logits@all" if head == "token_classification" else "task_logits@row")
    with torch.no_grad():
        with Capture(loaded, [key]) as plain:
            forward(loaded, batch)
        with Intervene(loaded, {key: lambda x: x.flip(-1)}), Capture(loaded, [key]) as capture:
            output = forward(loaded, batch).logits
        assert torch.equal(dense(capture.features(batch), key), dense(plain.features(batch), key).flip(-1))
        if name == "bert":
            assert torch.equal(output.float() * (batch.mask[..., None] if output.dim() == 3 else 1), dense(capture.features(batch), key))


def test_dropout_of_written_attention_is_that_of_eager_attention(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right")[0]
    loaded.model.train()
    torch.manual_seed(5)
    expected = forward(loaded, batch).last_hidden_state
    torch.manual_seed(5)
    with written(loaded, attention_scores_1=torch.clone, attention_probs_2=torch.clone, attention_probs_3=torch.clone):
        found = forward(loaded, batch).last_hidden_state
    assert torch.equal(found[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_without_padding_for_which_sdpa_leaves_the_mask_out_attend_as_before(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model(name, "base", "sdpa"), "base"), lay_out("right")[0]
    full = Batch(batch.rows[:1], batch.input_ids[:1, :11], batch.mask[:1, :11], None, None, None, None, None, batch.groups[:1])
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = forward(loaded, full).last_hidden_state
        with written(loaded, attention_probs_1=lambda x: seen.append(x) or x, attention_scores_2=torch.clone):  # type: ignore[func-returns-value]
            found = forward(loaded, full).last_hidden_state
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert bool((seen[0].triu(1) == 0).all()) == (name == "llama")


def test_half_precision_sites_are_written_in_it(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("llama", "base", "sdpa").bfloat16(), "base"), lay_out("packed")[0]
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.no_grad(), written(loaded, hidden_1=keep, attention_scores_2=keep, attention_probs_2=keep):
        forward(loaded, batch)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 3
    refusal = r"hidden.1@all: expected .* and type torch.bfloat16, found .* and torch.float32"
    with pytest.raises(ValueError, match=refusal), torch.no_grad(), written(loaded, hidden_1=lambda x: x.float()):
        forward(loaded, batch)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_is_refused_where_gradients_are_wanted(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right")[0]
    loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    loaded.model.train()
    with pytest.raises(ValueError, match="gradient checkpointing computes blocks anew"), written(loaded, hidden_1=double):
        forward(loaded, batch)
    with torch.no_grad(), written(loaded, hidden_1=double):
        forward(loaded, batch)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden.4", "blocks 1 to 3"),
        ("query.0", "blocks 1 to 3"),
        ("lm_logits", "has the head base"),
        ("hidden.2@masked", "a site is written as a whole; expected hidden.2@all"),
        ("hidden.2:width4", "the form width4"),
    ],
)
def test_sites_that_cannot_be_written_are_refused(name: str, message: str, tiny_model: Build) -> None:
    loaded = LoadedModel.of(tiny_model("bert", "base"), "base")
    with pytest.raises(ValueError, match=message):
        Intervene(loaded, {FeatureKey.parse(name): double})


def test_another_shape_and_a_write_that_never_happened_are_errors(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right")[0]
    for writes in ({"query_2": lambda x: x[:, 1:]}, {"attention_probs_2": lambda x: x[:, :1]}):
        with pytest.raises(ValueError, match="expected a tensor of shape"), torch.no_grad(), written(loaded, **writes):
            forward(loaded, batch)
    with pytest.raises(ValueError, match=r"hidden\.1@all, key\.2@all: not written"), written(loaded, hidden_1=double, key_2=double):
        pass
