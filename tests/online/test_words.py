"""Word logits made a few tokens at a time are those made at once: any head, any positions, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from online import words
from online.batch import Batch, Features, TopK, dense
from online.capture import Capture
from online.derive import derive
from online.encode import encode
from online.families import FAMILIES
from online.models import LoadedModel, forward
from online.statics import live_statics
from online.teacher import LiveTeacher, float_statics
from online.vocabulary import top_k
from online.words import LEAST, Words, as_words, each
from store.codecs import feature_spec
from store.features import FeatureKey

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
VOCAB = 61
HEADS = {
    "bert": "a transform and a bias, tied",
    "mobilebert": "two matrices",
    "gpt2": "tied, no bias",
    "llama": "untied",
    "gemma2": "soft cap",
}


def load(tiny_model: Build, name: str) -> LoadedModel:
    head = "causal_lm" if FAMILIES[name].causal else "masked_lm"
    return LoadedModel.of(tiny_model(name, head, "eager" if name == "gemma2" else "sdpa"), head)


def captured(loaded: LoadedModel, batch: Batch, key: FeatureKey, grad: bool = False) -> Features:
    with torch.set_grad_enabled(grad), Capture(loaded, [key], grad=grad) as capture:
        forward(loaded, batch)
        return capture.features(batch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most five tokens a chunk."""
    monkeypatch.setattr(words, "AT_ONCE", 5 * VOCAB)
    monkeypatch.setattr(words, "SMALLEST", 1)


@pytest.mark.parametrize("positions", ["all", "labels", "last"])
@pytest.mark.parametrize("name", HEADS)
def test_chunks_give_the_logits_of_the_model_itself(
    name: str, positions: str, tiny_model: Build, lay_out: LayOut, small_chunks: None
) -> None:
    loaded, (batch, _) = load(tiny_model, name), lay_out("right")
    key = FeatureKey("lm_logits", positions=positions)
    with torch.no_grad():
        whole_BTV = forward(loaded, batch).logits
    chosen = {"all": batch.mask, "labels": batch.labelled}.get(positions)
    expected = whole_BTV[torch.arange(len(batch.mask)), batch.lengths - 1] if chosen is None else whole_BTV[chosen]
    value = captured(loaded, batch, key)[key]
    assert isinstance(value, Words)
    chunks = list(value.chunks())
    assert max(map(len, chunks)) <= 5
    assert len(chunks) == max(1, -(-len(expected) // 5))
    torch.testing.assert_close(torch.cat(chunks), expected, atol=2e-5, rtol=2e-5)
    found = value.dense()
    assert found.shape == ((*batch.mask.shape, VOCAB) if positions == "all" else expected.shape)
    if positions == "all":
        assert (found[~batch.mask] == 0).all()
        found = found[batch.mask]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_in_chunks_has_the_gradients_of_one_on_whole_logits(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, name), lay_out("right")
    key = FeatureKey("lm_logits")

    def slopes(at_once: int) -> tuple[Tensor, dict[str, Tensor]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words, "AT_ONCE", at_once)
            patch.setattr(words, "SMALLEST", 1)
            value = captured(loaded, batch, key, grad=True)[key]
            assert isinstance(value, Words)
            loss = each(lambda logits_MV: logits_MV.logsumexp(-1) - logits_MV[:, 7], value).sum()
            loaded.model.zero_grad()
            loss.backward()
        return loss.detach(), {name: weight.grad.clone() for name, weight in loaded.model.named_parameters() if weight.grad is not None}

    loss, grads = slopes(5 * VOCAB)
    loaded.model.zero_grad()
    logits_BTV = forward(loaded, batch).logits
    expected = (logits_BTV.logsumexp(-1) - logits_BTV[..., 7])[batch.mask].sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=2e-4, rtol=2e-5)
    for name, weight in loaded.model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(grads.get(name, torch.zeros_like(weight)), weight.grad, atol=5e-5, rtol=5e-4)
    torch.testing.assert_close(slopes(1 << 20)[0], loss, atol=2e-4, rtol=2e-5)


def test_logits_of_all_tokens_never_exist_while_chunks_are_learned_from(tiny_model: Build, lay_out: LayOut, small_chunks: None) -> None:
    loaded, (batch, _) = load(tiny_model, "llama"), lay_out("right")
    sizes: list[int] = []
    assert loaded.word_head is not None
    handle = loaded.word_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    key = FeatureKey("lm_logits")
    value = captured(loaded, batch, key, grad=True)[key]
    assert isinstance(value, Words)
    sizes.clear()
    each(lambda logits_MV: logits_MV.square().sum(-1), value).sum().backward()
    handle.remove()
    tokens = int(batch.mask.sum())
    assert set(sizes) == {LEAST}  # five tokens or four, filled up
    assert len(sizes) == 2 * -(-tokens // 5)  # once forward, once more backward


@pytest.mark.parametrize("positions", ["all", "labels"])
@pytest.mark.parametrize("name", HEADS)
def test_what_is_dumped_in_chunks_is_what_is_derived_in_chunks_and_what_whole_logits_give(
    name: str, positions: str, tiny_model: Build, lay_out: LayOut, small_chunks: None
) -> None:
    loaded, (batch, _) = load(tiny_model, name), lay_out("right")
    logits, top = FeatureKey("lm_logits", positions=positions), FeatureKey("lm_logits", positions=positions, form="top4")
    value = captured(loaded, batch, logits)[logits]
    assert isinstance(value, Words)
    spec = feature_spec(top, "float32", VOCAB)
    arrays = encode(top, value, batch, spec)
    expected = top_k(value.logits, 4)
    assert torch.equal(torch.from_numpy(arrays["ids"].astype("int64")), expected.ids)
    assert torch.equal(torch.from_numpy(arrays["log_probs"]), expected.log_probs)
    source = FeatureKey("head_input", positions=positions)
    have, statics = captured(loaded, batch, source), float_statics(live_statics(loaded, ("head.weight", "head.bias")))
    derived = derive([top], have, statics, batch, loaded.shape, loaded.wiring)[top]
    (live,) = LiveTeacher(loaded, [top]).features(batch, {}).values()
    for one in (derived, live):
        assert isinstance(one, TopK)
        of_units = TopK(*(column[batch.mask] for column in one)) if positions == "all" else one
        assert torch.equal(of_units.ids, expected.ids)
        torch.testing.assert_close(of_units.log_probs, expected.log_probs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("vocab", [VOCAB, 30_000])
def test_the_logits_of_a_token_do_not_depend_on_how_many_are_asked_for_with_it(vocab: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(48, vocab)
    input_UW = torch.randn(300, 48)
    with torch.no_grad():
        exact = torch.nn.functional.linear(input_UW, head.weight, head.bias)
        for units in (1, 2, 15, 16, 129, 300):
            value = Words(input_UW[:units], head, vocab)
            assert torch.equal(torch.cat(list(value.chunks())), exact[:units])


def test_chunks_are_about_equal_and_no_larger_than_they_may() -> None:
    large = Words(torch.zeros(1000, 1), None, 150_000)
    assert sum(large.parts()) == 1000
    assert max(large.parts()) <= words.SMALLEST
    assert min(large.parts()) >= words.SMALLEST // 2
    assert Words(torch.zeros(0, 1), None, 5).parts() == [0]


def test_autocast_and_gradient_are_those_of_the_pass_whenever_logits_are_made(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = load(tiny_model, "llama"), lay_out("right")
    key = FeatureKey("lm_logits", positions="labels")
    with torch.autocast("cpu", torch.bfloat16), Capture(loaded, [key], grad=True) as capture:
        forward(loaded, batch)
        later, now = capture.features(batch), dense(capture.features(batch), key)
    assert torch.equal(dense(later, key), now)
    assert not torch.equal(dense(captured(loaded, batch, key), key), now)  # bfloat16 shows
    assert now.requires_grad
    assert now.dtype == torch.float32
    assert not dense(captured(loaded, batch, key), key).requires_grad


def test_some_units_and_some_words_are_taken_before_logits_are_made() -> None:
    torch.manual_seed(0)
    head, input_UW = torch.nn.Linear(8, VOCAB), torch.randn(30, 8)
    value, kept, few = Words(input_UW, head, VOCAB), torch.tensor([5, 0, 60]), torch.arange(30) % 3 == 0
    assert torch.equal(value.at(few).logits, value.logits[few])
    assert torch.equal(value.among(kept).logits, value.logits[:, kept])
    assert value.among(kept).vocab == 3
    assert torch.equal(as_words(value.logits).logits, value.logits)
