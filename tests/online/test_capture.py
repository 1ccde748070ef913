"""Captured features against transformers' own outputs, computed one document at a time without padding."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from online.batch import IGNORED, Batch, Features, dense
from online.capture import Capture
from online.families import FAMILIES
from online.masks import pair_mask
from online.models import HEADS, CustomModules, LoadedModel, ModelSpec, forward, load_model
from online.statics import live_statics
from store.features import FeatureKey
from store.shape import Head

VOCAB, PAD, LAYERS = 61, 1, 3
LENGTHS = (11, 7, 4)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}

_BERT = {"vocab_size": VOCAB, "pad_token_id": PAD, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_BERT, type_vocab_size=1),
    "xlm-roberta": lambda: AutoConfig.for_model("xlm-roberta", **_BERT),
    "distilbert": lambda: DistilBertConfig(vocab_size=VOCAB, pad_token_id=PAD, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48),
    "modernbert": lambda: ModernBertConfig(**_BERT, local_attention=6, norm_bias=True, attention_bias=True, classifier_bias=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, pad_token_id=PAD, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=40, scale_attn_by_inverse_layer_idx=True
    ),
    "llama": lambda: LlamaConfig(**_LLAMA, attention_bias=True, rope_parameters=_YARN),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**{**_LLAMA, "head_dim": 8}, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_LLAMA),
    "gemma": lambda: GemmaConfig(**_LLAMA),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA, sliding_window=4, layer_types=_TYPES, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_LLAMA, sliding_window=4, layer_types=_TYPES, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=1.5
    ),
    "gemma3_text, bidirectional": lambda: Gemma3TextConfig(**_LLAMA, sliding_window=6, layer_types=_TYPES, use_bidirectional_attention=True),
}
ATTENTIONS = [(name, attention) for name in CONFIGS for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(name: str, head: Head, attention: str = "eager", labels: int = 3) -> PreTrainedModel:
    """A random model with noise on every weight, biases and norms included."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels = labels
    model = HEADS[head].from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def word_head_of(name: str) -> Head:
    return "causal_lm" if FAMILIES[name.split(",")[0]].causal and "," not in name else "masked_lm" if "," not in name else "causal_lm"


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCAB, (length,), generator=generator) for length in LENGTHS]


@dataclass
class Layout:
    """A batch, and for each document its row and its place there."""

    batch: Batch
    places: list[tuple[int, slice]]


def lay_out(kind: str) -> Layout:
    texts, length = documents(), 16
    if kind == "packed":
        rows = [texts[:2], texts[2:]]
        length = sum(LENGTHS[:2])
    else:
        rows = [[text] for text in texts]
    ids = torch.full((len(rows), length), PAD)
    mask, numbers, positions = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.zeros_like(ids)
    places = []
    for row, members in enumerate(rows):
        start = length - len(members[0]) if kind == "left" else 0
        for number, text in enumerate(members):
            place = slice(start, start + len(text))
            ids[row, place], mask[row, place], numbers[row, place], positions[row, place] = text, True, number, torch.arange(len(text))
            places.append((row, place))
            start += len(text)
    labels = torch.where(mask & (ids % 3 == 0), ids, IGNORED)
    packed = kind == "packed"
    order = torch.arange(len(rows))
    batch = Batch(order, ids, mask, None, numbers if packed else None, positions if packed else None, labels, None, order)
    return Layout(batch, places)


def capture(loaded: LoadedModel, batch: Batch, names: list[str]) -> Features:
    keys = [FeatureKey.parse(name) for name in names]
    with torch.no_grad(), Capture(loaded, keys) as capture:
        forward(loaded, batch)
        return capture.features(batch)


def at(features: Features, name: str) -> Tensor:
    return dense(features, FeatureKey.parse(name))


def layered(site: str) -> list[str]:
    return [f"{site}.{i}" for i in range(1, LAYERS + 1)]


OUTPUT_PROJECTIONS = ("attention.output.dense", "attention.out_lin", "attn.Wo", "attn.c_proj", "self_attn.o_proj")


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
def test_features_equal_those_that_transformers_computes_for_each_document_alone(name: str, attention: str, kind: str) -> None:
    eager = tiny_model(name, word_head_of(name))
    model = tiny_model(name, word_head_of(name), attention)
    loaded, layout = LoadedModel.of(model, word_head_of(name)), lay_out(kind)
    sites = ["hidden.0", *layered("hidden"), *layered("value"), *layered("attention_scores"), *layered("attention_probs")]
    features = capture(loaded, layout.batch, [*sites, "final", "lm_logits"])
    shape = loaded.shape
    for text, (row, place) in zip(documents(), layout.places, strict=True):
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
    if kind == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * weight + (0 if bias is None else bias.double())
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if kind == "rms_one" else weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_statics_and_wiring_turn_hidden_states_into_inputs_projections_and_logits(name: str) -> None:
    loaded, layout = LoadedModel.of(tiny_model(name, word_head_of(name), "eager"), word_head_of(name)), lay_out("right")
    mask, wiring = layout.batch.mask, loaded.wiring
    sites = [f"{site}.{i}" for site in ("hidden", "input", "query", "key", "value") for i in range(1, LAYERS + 1)]
    features = {
        str(key): value[mask].double()
        for key, value in capture(loaded, layout.batch, ["hidden.0", *sites, "final", "head_input", "lm_logits"]).items()
        if isinstance(value, Tensor)
    }
    blocks = [f"{i}.{part}" for i in range(1, LAYERS + 1) for part in ("norm.weight", "norm.bias")]
    blocks += [f"{i}.{p}.{w}" for i in range(1, LAYERS + 1) for p in ("query", "key", "value") for w in ("weight", "bias")]
    tails = [f"{part}.{w}" for part in ("final_norm", "transform", "transform_norm", "head") for w in ("weight", "bias")]
    with torch.no_grad():
        statics = {key: value.double() for key, value in live_statics(loaded, [*blocks, *tails]).items()}

    def normed(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in statics:
            return x
        assert wiring.norm is not None
        return reference_norm(x, wiring.norm, statics[f"{name}.weight"], statics.get(f"{name}.bias"), wiring.norm_eps)

    for i in range(1, LAYERS + 1):
        torch.testing.assert_close(normed(f"{i}.norm", features[f"hidden.{i - 1}@all"]), features[f"input.{i}@all"], **TOLERANCE)
        for site in ("query", "key", "value"):
            projected = F.linear(features[f"input.{i}@all"], statics[f"{i}.{site}.weight"], statics.get(f"{i}.{site}.bias"))
            torch.testing.assert_close(projected, features[f"{site}.{i}@all"], **TOLERANCE)
    torch.testing.assert_close(normed("final_norm", features[f"hidden.{LAYERS}@all"]), features["final@all"], **TOLERANCE)
    head_input = features["final@all"]
    if wiring.head_activation is not None:
        assert wiring.head_activation == "gelu"
        head_input = F.gelu(F.linear(head_input, statics["transform.weight"], statics["transform.bias"]))
        bias = statics.get("transform_norm.bias")
        head_input = reference_norm(head_input, "layer", statics["transform_norm.weight"], bias, wiring.head_norm_eps)
    torch.testing.assert_close(head_input, features["head_input@all"], **TOLERANCE)
    logits = F.linear(head_input, statics["head.weight"], statics.get("head.bias"))
    logits = logits if wiring.logit_cap is None else (logits / wiring.logit_cap).tanh() * wiring.logit_cap
    torch.testing.assert_close(logits, features["lm_logits@all"], **TOLERANCE)
    assert ("1.norm.weight" in statics) == (loaded.shape.pre_norm and wiring.first_norm)


@pytest.mark.parametrize("head", ["base", "classification", "token_classification", "multiple_choice"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "," not in name])
def test_every_head_answers_as_in_transformers(name: str, head: Head) -> None:
    if head not in FAMILIES[name].heads:
        with pytest.raises(ValueError, match="has no head"):
            LoadedModel.of(tiny_model(name, "base"), head)
        return
    model = tiny_model(name, head, "sdpa" if name != "gemma2" else "eager")
    loaded, layout = LoadedModel.of(model, head), lay_out("right")
    if head == "base":
        final = at(capture(loaded, layout.batch, ["final"]), "final")
        for text, (row, place) in zip(documents(), layout.places, strict=True):
            torch.testing.assert_close(final[row, place], model(text[None]).last_hidden_state[0], **TOLERANCE)
        return
    key = "task_logits@all" if head == "token_classification" else "task_logits@row"
    logits = at(capture(loaded, layout.batch, [key]), key)
    assert loaded.shape.labels == (1 if head == "multiple_choice" else 3)
    for text, (row, place) in zip(documents(), layout.places, strict=True):
        expected = model(text[None, None] if head == "multiple_choice" else text[None]).logits[0]
        torch.testing.assert_close(logits[row, place] if head == "token_classification" else logits[row], expected, **TOLERANCE)


def test_a_decoder_classifies_by_the_last_token_even_where_that_is_the_padding_token() -> None:
    loaded, layout = LoadedModel.of(tiny_model("gpt2", "classification"), "classification"), lay_out("right")
    ids = layout.batch.input_ids.clone()
    ids[0, LENGTHS[0] - 1] = PAD
    logits = at(capture(loaded, replace(layout.batch, input_ids=ids), ["task_logits"]), "task_logits")
    model = loaded.model
    with torch.no_grad():
        expected = model.score(model.transformer(ids[:1, : LENGTHS[0]]).last_hidden_state)[0, -1]
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)


def test_segments_reach_models_that_have_them() -> None:
    batch = lay_out("right").batch
    segments = (torch.arange(16) > 3).long().expand(3, 16)
    for name, differs in (("bert", True), ("roberta", False), ("gpt2", False), ("distilbert", False)):
        loaded = LoadedModel.of(tiny_model(name, "base"), "base")
        plain, with_segments = (at(capture(loaded, b, ["final"]), "final") for b in (batch, replace(batch, segments=segments)))
        assert torch.equal(plain, with_segments) != differs, name


@pytest.mark.parametrize("positions", ["first", "last", "mean", "masked", "labels", "all"])
def test_word_logits_are_those_of_the_chosen_tokens(positions: str) -> None:
    loaded, batch = LoadedModel.of(tiny_model("gemma2", "causal_lm"), "causal_lm"), lay_out("right").batch
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


def test_the_word_head_never_sees_all_tokens_unless_asked() -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm"), "masked_lm"), lay_out("right").batch
    sizes: list[int] = []
    assert loaded.word_head is not None
    handle = loaded.word_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    capture(loaded, batch, ["hidden.1"])
    capture(loaded, batch, ["lm_logits@labels"])
    handle.remove()
    assert sizes == [0, 0, int(batch.labelled.sum()) * VOCAB]


def test_hooks_are_gone_after_the_pass_and_after_an_error() -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "masked_lm"), "masked_lm"), lay_out("right").batch

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


def test_the_first_value_of_a_module_that_runs_twice_is_kept() -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right").batch
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
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_gradients_are_the_same_under_checkpointing_and_reach_head_norms(name: str) -> None:
    model, batch = tiny_model(name, "base", "sdpa"), lay_out("right").batch
    names = ["hidden.2", "value.1", "attention_scores.2", "final"]
    plain = gradients(LoadedModel.of(model, "base"), batch, names)
    again = gradients(LoadedModel.of(checkpointed(model, reentrant=False), "base"), batch, names)
    assert name != "qwen3" or plain["layers.1.self_attn.q_norm.weight"].abs().sum() > 0
    for weight, expected in plain.items():
        torch.testing.assert_close(again[weight], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_feature_without_gradient_under_reentrant_checkpointing_is_an_error() -> None:
    model, batch = checkpointed(tiny_model("gpt2", "base", "sdpa"), reentrant=True), lay_out("right").batch
    loaded = LoadedModel.of(model, "base")
    assert gradients(loaded, batch, ["hidden.2"])  # outputs of blocks do carry gradient
    for name in ("value.1", "input.2", "attention_probs.2"):
        with pytest.raises(ValueError, match="use_reentrant"):
            gradients(loaded, batch, [name])
    with torch.no_grad(), pytest.raises(ValueError, match="no gradient"), Capture(loaded, [FeatureKey("final")], grad=True) as running:
        forward(loaded, batch)
        running.features(batch)


def test_features_of_frozen_blocks_need_no_gradient() -> None:
    loaded, batch = LoadedModel.of(tiny_model("bert", "base"), "base"), lay_out("right").batch
    loaded.model.requires_grad_(False)
    loaded.block(LAYERS).requires_grad_(True)
    with Capture(loaded, [FeatureKey("hidden", 1), FeatureKey("hidden", LAYERS)], grad=True) as running:
        forward(loaded, batch)
        features = running.features(batch)
    assert not at(features, "hidden.1").requires_grad
    assert at(features, f"hidden.{LAYERS}").requires_grad


def test_half_precision_features_come_in_float32() -> None:
    loaded, batch = LoadedModel.of(tiny_model("llama", "causal_lm", "sdpa").bfloat16(), "causal_lm"), lay_out("packed").batch
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
def test_features_that_a_model_lacks_are_refused(key: str, head: Head, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capture(LoadedModel.of(tiny_model("bert", head), head), [FeatureKey.parse(key)])


def test_packed_documents_are_refused_by_heads_that_answer_for_rows() -> None:
    for head in ("classification", "multiple_choice"):
        with pytest.raises(ValueError, match="packed documents"):
            forward(LoadedModel.of(tiny_model("bert", head), head), lay_out("packed").batch)


def test_an_unknown_family_serves_hidden_states_and_logits_from_module_paths() -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
    model = HEADS["causal_lm"].from_config(config).eval()
    with pytest.raises(ValueError, match="unknown model family 'gpt_neox'"):
        LoadedModel.of(model, "causal_lm")
    custom = CustomModules(block="gpt_neox.layers.{i}", layers=LAYERS, width=32, final_norm="gpt_neox.final_layer_norm")
    loaded, batch = LoadedModel.of(model, "causal_lm", custom=custom), lay_out("right").batch
    features = capture(loaded, batch, ["hidden.0", *layered("hidden"), "final", "head_input@last", "lm_logits@labels"])
    with torch.no_grad():
        expected = model(batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True)
    states = [at(features, f"hidden.{i}") for i in range(LAYERS)] + [at(features, "final")]
    for state, whole in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, whole * batch.mask[..., None], **TOLERANCE)
    torch.testing.assert_close(at(features, "lm_logits@labels"), expected.logits[batch.labelled], **TOLERANCE)
    with pytest.raises(ValueError, match="serves hidden, final and logits"):
        Capture(loaded, [FeatureKey("query", 1)])
    with pytest.raises(ValueError, match="packed documents"):
        forward(loaded, lay_out("packed").batch)
    with pytest.raises(ValueError, match="has no module 'gpt_neox.blocks.0'"):
        LoadedModel.of(model, "causal_lm", custom=custom.model_copy(update={"block": "gpt_neox.blocks.{i}"}))


def test_pair_masks_count_windows_from_the_token_itself_or_to_each_side() -> None:
    batch = lay_out("packed").batch
    for name in ("mistral", "modernbert"):
        shape = LoadedModel.of(tiny_model(name, "base"), "base").shape
        pairs_TT = pair_mask(batch, shape, 2)[0, 0]
        for query in range(18):
            for key in range(18):
                same = (query < LENGTHS[0]) == (key < LENGTHS[0])
                near = 0 <= query - key < 4 if name == "mistral" else abs(query - key) <= 3
                assert bool(pairs_TT[query, key]) == (same and near)


def test_statics_refuse_names_that_no_model_has() -> None:
    loaded = LoadedModel.of(tiny_model("bert", "base"), "base")
    assert live_statics(loaded, ["1.norm.weight", "head.weight", "1.rotary", "3.query_norm.weight"]) == {}
    with pytest.raises(ValueError, match="unknown weight"):
        live_statics(loaded, ["1.dense.weight"])
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        live_statics(loaded, ["4.query.weight"])


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
