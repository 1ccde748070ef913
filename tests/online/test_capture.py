"""What Capture promises beside the numbers: positions, hooks, gradients, refusals, unknown families; masks and statics."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, PreTrainedModel

from online.batch import Batch, Features, dense
from online.capture import Capture
from online.masks import pair_mask
from online.models import HEADS, CustomModules, LoadedModel, forward
from online.statics import live_statics
from online.words import LEAST
from store.features import FeatureKey
from store.shape import Head

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LAYERS, VOCAB, PAD = 3, 61, 1
LENGTHS = (11, 7, 4)


def capture(loaded: LoadedModel, batch: Batch, names: list[str]) -> Features:
    keys = [FeatureKey.parse(name) for name in names]
    with torch.no_grad(), Capture(loaded, keys) as capture:
        forward(loaded, batch)
        return capture.features(batch)


def at(features: Features, name: str) -> Tensor:
    return dense(features, FeatureKey.parse(name))


def test_a_decoder_classifies_by_the_last_token_even_where_that_is_the_padding_token(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("gpt2", "classification"), "classification"), lay_out("right")[0]
    ids = batch.input_ids.clone()
    ids[0, LENGTHS[0] - 1] = PAD
    logits = at(capture(loaded, replace(batch, input_ids=ids), ["task_logits"]), "task_logits")
    model = loaded.model
    with torch.no_grad():
        expected = model.score(model.transformer(ids[:1, : LENGTHS[0]]).last_hidden_state)[0, -1]
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)


def test_segments_reach_models_that_have_them(tiny_model: Build, lay_out: LayOut) -> None:
    batch = lay_out("right")[0]
    segments = (torch.arange(16) > 3).long().expand(3, 16)
    for name, differs in (("bert", True), ("mobilebert", True), ("roberta", False), ("gpt2", False), ("distilbert", False)):
        loaded = LoadedModel.of(tiny_model(name, "base"), "base")
        plain, with_segments = (at(capture(loaded, b, ["final"]), "final") for b in (batch, replace(batch, segments=segments)))
        assert torch.equal(plain, with_segments) != differs, name


@pytest.mark.parametrize("positions", ["first", "last", "mean", "masked", "labels", "all"])
def test_word_logits_are_those_of_the_chosen_tokens(positions: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("gemma2", "causal_lm"), "causal_lm"), lay_out("right")[0]
    logits = at(capture(loaded, batch, [f"lm_logits@{positions}"]), f"lm_logits@{positions}")
    with torch.no_grad():
        whole_BTV = loaded.model(batch.input_ids, attention_mask=batch.mask.long()).logits
    rows = torch.arange(3)
    expected = {
        "all": whole_BTV * batch.mask[..., None],
        "first": whole_BTV[:, 0],
        "last": whole_BTV[rows, torch.tensor(LENGTHS) - 1],
        "mean": torch.stack([whole_BTV[row, :length].mean(0) for row, length in enumerate(LENGTHS)]),
        "labels": whole_BTV[batch.labelled],
        "masked": whole_BTV[batch.labelled],
    }
    assert batch.labelled.any()
    torch.testing.assert_close(logits, expected[positions], **TOLERANCE)


def test_the_word_head_never_sees_all_tokens_unless_asked(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm"), "masked_lm"), lay_out("right")[0]
    sizes: list[int] = []
    assert loaded.word_head is not None
    handle = loaded.word_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    capture(loaded, batch, ["hidden.1"])
    words = capture(loaded, batch, ["lm_logits@labels"])
    assert sizes == [0, 0]
    assert at(words, "lm_logits@labels").shape == (int(batch.labelled.sum()), VOCAB)
    handle.remove()
    assert sizes == [0, 0, LEAST * VOCAB]


def test_hooks_are_gone_after_the_pass_and_after_an_error(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm"), "masked_lm"), lay_out("right")[0]

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.model.modules())

    keys = [FeatureKey.parse(name) for name in ("hidden.0", "hidden.2", "query.1", "lm_logits")]
    with Capture(loaded, keys) as running:
        assert hooks() == 5
        forward(loaded, batch)
    assert hooks() == 0
    assert set(running.features(batch)) == set(keys)
    with pytest.raises(IndexError), Capture(loaded, keys) as running:
        forward(loaded, replace(batch, input_ids=batch.input_ids + VOCAB))
    assert hooks() == 0
    with pytest.raises(ValueError, match="run one forward pass"):
        running.features(batch)


def test_the_first_value_of_a_module_that_runs_twice_is_kept(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right")[0]
    other = replace(batch, input_ids=batch.input_ids.flip(1))
    with torch.no_grad(), Capture(loaded, [FeatureKey("hidden", 2)]) as running:
        forward(loaded, batch)
        forward(loaded, other)
    assert torch.equal(at(running.features(batch), "hidden.2"), at(capture(loaded, batch, ["hidden.2"]), "hidden.2"))


def gradients(loaded: LoadedModel, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    loaded.model.zero_grad()
    with Capture(loaded, [FeatureKey.parse(name) for name in names], grad=True) as running:
        forward(loaded, batch)
        features = running.features(batch)
    sum((at(features, name).clamp(min=-50).square().sum() for name in names), torch.zeros(())).backward()
    return {name: weight.grad.clone() for name, weight in loaded.model.named_parameters() if weight.grad is not None}


def checkpointed(model: PreTrainedModel, reentrant: bool) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["qwen3", "bert", "mobilebert"])
def test_gradients_are_the_same_under_checkpointing_and_reach_head_norms(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    model, batch = tiny_model(name, "base", "sdpa"), lay_out("right")[0]
    names = ["hidden.2", "value.1", "attention_scores.2", "final"]
    plain = gradients(LoadedModel.of(model, "base"), batch, names)
    again = gradients(LoadedModel.of(checkpointed(model, reentrant=False), "base"), batch, names)
    assert name != "qwen3" or plain["layers.1.self_attn.q_norm.weight"].abs().sum() > 0
    for weight, expected in plain.items():
        torch.testing.assert_close(again[weight], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_feature_without_gradient_under_reentrant_checkpointing_is_an_error(tiny_model: Build, lay_out: LayOut) -> None:
    model, batch = checkpointed(tiny_model("gpt2", "base", "sdpa"), reentrant=True), lay_out("right")[0]
    loaded = LoadedModel.of(model, "base")
    assert gradients(loaded, batch, ["hidden.2"])  # outputs of blocks do carry gradient
    for name in ("value.1", "input.2", "attention_probs.2"):
        with pytest.raises(ValueError, match="use_reentrant"):
            gradients(loaded, batch, [name])
    model.eval()
    with torch.no_grad(), Capture(loaded, [FeatureKey("final")], grad=True) as running:
        forward(loaded, batch)
        with pytest.raises(ValueError, match="no gradient"):
            running.features(batch)


def test_features_of_frozen_blocks_need_no_gradient(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right")[0]
    loaded.model.requires_grad_(False)
    loaded.block(LAYERS).requires_grad_(True)
    with Capture(loaded, [FeatureKey("hidden", 1), FeatureKey("hidden", LAYERS)], grad=True) as running:
        forward(loaded, batch)
        features = running.features(batch)
    assert not at(features, "hidden.1").requires_grad
    assert at(features, f"hidden.{LAYERS}").requires_grad


def test_half_precision_features_come_in_float32(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = LoadedModel.of(tiny_model("llama", "causal_lm", "sdpa").bfloat16(), "causal_lm"), lay_out("packed")[0]
    names = ["hidden.1", "hidden.1@mean", "attention_probs.1", "lm_logits@labels"]
    features = capture(loaded, batch, names)
    assert all(at(features, name).dtype == torch.float32 for name in names)
    assert torch.equal(at(features, "hidden.1"), at(features, "hidden.1").bfloat16().float())


@pytest.mark.parametrize(
    ("key", "head", "message"),
    [
        ("hidden.4", "base", "blocks 1 to 3"),
        ("query.0", "base", "blocks 1 to 3"),
        ("lm_logits", "base", "has the head base"),
        ("task_logits", "masked_lm", "expected a task head"),
        ("task_logits@all", "classification", "whole rows"),
        ("hidden.1@row", "base", "whole rows"),
        ("attention_probs.1@first", "base", "between all tokens"),
        ("lm_logits@labels:top4", "masked_lm", "form top4"),
    ],
)
def test_features_that_a_model_lacks_are_refused(key: str, head: Head, message: str, tiny_model: Build) -> None:
    with pytest.raises(ValueError, match=message):
        Capture(LoadedModel.of(tiny_model("bert", head), head), [FeatureKey.parse(key)])


def test_packed_documents_are_refused_by_heads_that_answer_for_rows(tiny_model: Build, lay_out: LayOut) -> None:
    for head in ("classification", "multiple_choice"):
        with pytest.raises(ValueError, match="packed documents"):
            forward(LoadedModel.of(tiny_model("bert", head), head), lay_out("packed")[0])


def test_an_unknown_family_serves_hidden_states_and_logits_from_module_paths(lay_out: LayOut) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
    model = HEADS["causal_lm"].from_config(config).eval()
    with pytest.raises(ValueError, match="unknown model family 'gpt_neox'"):
        LoadedModel.of(model, "causal_lm")
    custom = CustomModules(block="gpt_neox.layers.{i}", layers=LAYERS, width=32, final_norm="gpt_neox.final_layer_norm")
    loaded, batch = LoadedModel.of(model, "causal_lm", custom=custom), lay_out("right")[0]
    features = capture(loaded, batch, ["hidden.0", "hidden.1", "hidden.2", "hidden.3", "final", "head_input@last", "lm_logits@labels"])
    with torch.no_grad():
        expected = model(batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True)
    states = [at(features, f"hidden.{i}") for i in range(LAYERS)] + [at(features, "final")]
    for state, whole in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, whole * batch.mask[..., None], **TOLERANCE)
    torch.testing.assert_close(at(features, "lm_logits@labels"), expected.logits[batch.labelled], **TOLERANCE)
    with pytest.raises(ValueError, match="serves hidden, final and logits"):
        Capture(loaded, [FeatureKey("query", 1)])
    with pytest.raises(ValueError, match="packed documents"):
        forward(loaded, lay_out("packed")[0])
    with pytest.raises(ValueError, match=r"has no module 'gpt_neox.blocks.0'"):
        LoadedModel.of(model, "causal_lm", custom=custom.model_copy(update={"block": "gpt_neox.blocks.{i}"}))


def test_pair_masks_count_windows_from_the_token_itself_or_to_each_side(tiny_model: Build, lay_out: LayOut) -> None:
    batch = lay_out("packed")[0]
    for name in ("mistral", "modernbert"):
        shape = LoadedModel.of(tiny_model(name, "base"), "base").shape
        pairs_TT = pair_mask(batch, shape, 2)[0, 0]
        for query in range(18):
            for key in range(18):
                same = (query < LENGTHS[0]) == (key < LENGTHS[0])
                near = 0 <= query - key < 4 if name == "mistral" else abs(query - key) <= 3
                assert bool(pairs_TT[query, key]) == (same and near)


def test_statics_refuse_names_that_no_model_has(tiny_model: Build) -> None:
    loaded = LoadedModel.of(tiny_model("bert", "base"), "base")
    assert live_statics(loaded, ["1.norm.weight", "head.weight", "1.rotary", "3.query_norm.weight"]) == {}
    with pytest.raises(ValueError, match="unknown weight"):
        live_statics(loaded, ["1.dense.weight"])
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        live_statics(loaded, ["4.query.weight"])
