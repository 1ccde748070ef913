"""What is written at a site is what the rest of the model computes from, in every family."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS
from torch import Tensor
from transformers import PreTrainedModel

from online.batch import Batch, Features, dense
from online.capture import Capture
from online.derive import attention_scores
from online.families import FAMILIES, submodule
from online.intervene import Intervene
from online.models import LoadedModel, forward
from online.places import put
from online.statics import live_statics
from online.written_attention import Write
from store.features import FeatureKey
from store.shape import Head

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LAYERS = 3
LAYERED = ("hidden", "input", "query", "key", "value", "attention_scores", "attention_probs")
SITES = ["hidden.0", *(f"{site}.{i}" for site in LAYERED for i in range(1, LAYERS + 1)), "final", "head_input", "lm_logits"]
ATTENTIONS = [(name, attention) for name in CONFIGS for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")]


def load(tiny_model: Build, name: str, attention: str = "eager") -> LoadedModel:
    head: Head = "causal_lm" if FAMILIES[name.partition(",")[0]].causal else "masked_lm"
    return LoadedModel.of(tiny_model(name, head, attention), head)


def keyed(writes: dict[str, Write]) -> dict[FeatureKey, Write]:
    return {FeatureKey.parse(name): write for name, write in writes.items()}


def logits(loaded: LoadedModel, batch: Batch, writes: dict[str, Write]) -> Tensor:
    """Of the tokens that are not padding."""
    with torch.no_grad(), Intervene(loaded, keyed(writes)):
        found: Tensor = forward(loaded, batch).logits[batch.mask]
    return found


def features(loaded: LoadedModel, batch: Batch, names: list[str], writes: dict[str, Write]) -> Features:
    with torch.no_grad(), Intervene(loaded, keyed(writes)), Capture(loaded, [FeatureKey.parse(name) for name in names]) as capture:
        forward(loaded, batch)
    with torch.no_grad():
        return capture.features(batch)


def at(found: Features, name: str) -> Tensor:
    return dense(found, FeatureKey.parse(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_site_written_with_itself_changes_nothing_to_the_bit(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded = load(tiny_model, name)
    for kind in ("right", "left", "packed"):
        if kind == "packed" and getattr(loaded.model.config, "trigram_input", False):
            continue
        batch = lay_out(kind)[0]
        plain = logits(loaded, batch, {})
        for site in SITES:
            assert torch.equal(logits(loaded, batch, {site: torch.clone}), plain), (kind, site)
        assert torch.equal(logits(loaded, batch, dict.fromkeys(SITES, torch.clone)), plain)


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_another_runs_hidden_states_give_its_outputs_from_there_on(name: str, attention: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = load(tiny_model, name, attention), lay_out("right")[0]
    torch.manual_seed(3)
    ids = torch.where(batch.mask, torch.randint(4, 61, batch.input_ids.shape), batch.input_ids)
    other = Batch(batch.rows, ids, batch.mask, None, None, None, None, None, batch.groups)
    theirs, ours = logits(loaded, other, {}), logits(loaded, batch, {})
    for site in ("hidden.0", "hidden.1", f"hidden.{LAYERS}", "final", "head_input"):
        seen: list[Tensor] = []
        logits(loaded, other, {site: lambda x, seen=seen: seen.append(x) or x})  # type: ignore[misc]
        assert torch.equal(logits(loaded, batch, {site: lambda x, seen=seen: seen[0]}), theirs)  # type: ignore[misc]
        some = logits(loaded, batch, {site: lambda x, seen=seen: put(x, seen[0][1:2], rows=torch.tensor([1]))})  # type: ignore[misc]
        row = batch.mask.nonzero()[:, 0]
        assert torch.equal(some[row == 1], theirs[row == 1])
        torch.testing.assert_close(some[row != 1], ours[row != 1], **TOLERANCE)


def changed(x: Tensor) -> Tensor:
    """Another tensor; pairs that may not attend keep their lowest score, and their probability 0."""
    noise = torch.linspace(-1, 1, x.shape[-1]).roll(1).expand_as(x) * torch.linspace(1, 2, x.shape[1]).view(1, -1, *[1] * (x.dim() - 2))
    return torch.where((x > torch.finfo(x.dtype).min) & (x != 0), x * 0.7 + noise, x)


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
@pytest.mark.parametrize("site", LAYERED[1:])
def test_attention_mixes_what_was_written(site: str, name: str, attention: str, tiny_model: Build, lay_out: LayOut) -> None:
    """By hand: softmax(scores(query, key)) value, with what was written in the place of one of these."""
    loaded, batch = load(tiny_model, name, attention), lay_out("right")[0]
    shape, seen = loaded.shape, []
    held: dict[str, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        held["new"] = changed(x)
        return held["new"]

    names = [f"{part}.2" for part in ("query", "key", "value", "attention_scores", "attention_probs")]
    before = features(loaded, batch, [*names, "hidden.1"], {})
    module = submodule(loaded.block(2), loaded.family.attention_output)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    after = features(loaded, batch, [*names, "hidden.1", "hidden.2"], {f"{site}.2": keep})
    handle.remove()
    parts = {part: at(before, f"{part}.2") for part in LAYERED[2:]}
    statics = live_statics(loaded, [f"2.{part}" for part in ("query_norm.weight", "key_norm.weight", "rotary")])
    if site == "input":
        weights = live_statics(loaded, [f"2.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")])
        past = name in ("mobilebert", "mobilebert, inverted")  # values are projected from hidden states
        for part in ("query", "key", "value"):
            source = at(before, "hidden.1") if part == "value" and past else held["new"]
            parts[part] = F.linear(source, weights[f"2.{part}.weight"], weights.get(f"2.{part}.bias"))
    else:
        parts[site] = held["new"]
    with torch.no_grad():
        if site in ("input", "query", "key"):
            parts["attention_scores"] = attention_scores(parts["query"], parts["key"], statics, 2, batch, shape, loaded.wiring)
        if site != "attention_probs" and site != "value":
            parts["attention_probs"] = parts["attention_scores"].softmax(-1)
        value_BTGC = parts["value"].unflatten(-1, (shape.kv_heads, shape.head_width))
        value_BHTC = value_BTGC.repeat_interleave(shape.heads // shape.kv_heads, dim=2).transpose(1, 2)
        expected_BTQ = (parts["attention_probs"] @ value_BHTC).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0][batch.mask], expected_BTQ[batch.mask], **TOLERANCE)
    assert torch.equal(at(after, "hidden.1"), at(before, "hidden.1"))
    if site in ("query", "key", "value"):
        for part in ("query", "key", "value"):  # of a fused projection a third is written
            expected = held["new"] * batch.mask[..., None] if part == site else at(before, f"{part}.2")
            torch.testing.assert_close(at(after, f"{part}.2"), expected, atol=0, rtol=0)


def test_uniform_attention_and_one_written_head_position_and_channel_equal_a_block_by_hand(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, batch = load(tiny_model, "bert"), lay_out("right")[0]
    block, mask = loaded.block(2), batch.mask
    before = features(loaded, batch, ["hidden.1", "value.2", "attention_probs.2", "query.2"], {})
    places = torch.zeros_like(mask)
    places[0, 3] = places[2, 0] = True
    pairs_B1TT = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)

    def uniform(probs_BHTT: Tensor) -> Tensor:
        return put(probs_BHTT, (pairs_B1TT / mask.sum(1)[:, None, None, None]).float(), heads=[1])

    def corner(value_BTW: Tensor) -> Tensor:
        return put(value_BTW, torch.tensor([5.0]), positions=places, heads=[3], of=4, channels=[7])

    after = features(loaded, batch, ["hidden.2"], {"attention_probs.2": uniform, "value.2": corner})
    hidden_BTW, value_BTW, probs_BHTT = (at(before, name).clone() for name in ("hidden.1", "value.2", "attention_probs.2"))
    value_BTW[0, 3, 3 * 8 + 7] = value_BTW[2, 0, 3 * 8 + 7] = 5.0
    for row in range(3):
        probs_BHTT[row, 1] = mask[row].float() / mask[row].sum()
    with torch.no_grad():
        mixed_BHTC = probs_BHTT @ value_BTW.unflatten(-1, (4, 8)).transpose(1, 2)
        attended = block.attention.output(mixed_BHTC.transpose(1, 2).flatten(2), hidden_BTW)
        expected_BTW = block.output(block.intermediate(attended), attended)
    torch.testing.assert_close(at(after, "hidden.2")[mask], expected_BTW[mask], **TOLERANCE)


@pytest.mark.parametrize(
    "site", ["hidden.1", "input.2", "query.2", "value.1", "attention_scores.2", "attention_probs.3", "hidden.3", "final"]
)
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "modernbert", "mobilebert", "gemma2"])
def test_gradients_of_what_is_written_and_of_what_remains_equal_finite_differences(name: str, site: str, tiny_model: Build) -> None:
    loaded = load(tiny_model, name)
    loaded.model.double().requires_grad_(False)
    ids = torch.tensor([[5, 9, 13], [7, 4, 1]])
    order = torch.arange(2)
    batch = Batch(order, ids, ids != 1, None, None, None, None, None, order)
    torch.manual_seed(0)
    sizes: list[Tensor] = []
    logits(loaded, batch, {"hidden.0": lambda x: sizes.append(x) or x, site: lambda x: sizes.append(x) or x})  # type: ignore[func-returns-value]
    attends = sizes[-1].dim() == 4
    values = torch.randn_like(sizes[-1][:1, :, -1:] if attends else sizes[-1][:1, -1:]).requires_grad_()
    weights = torch.randn(len(ids[ids != 1]), loaded.shape.vocab, dtype=torch.float64)
    added = torch.randn_like(sizes[0][:, :1, :2]).mul(0.1).requires_grad_()

    def run(values: Tensor, added: Tensor) -> Tensor:
        def embed(x: Tensor) -> Tensor:
            return torch.cat([torch.cat([x[:, :1, :2] + added, x[:, :1, 2:]], dim=2), x[:, 1:]], dim=1)

        def write(x: Tensor) -> Tensor:
            row, axis = x[:1], 2 if attends else 1  # the last token of the first row
            other, last = row.split([row.shape[axis] - 1, 1], dim=axis)
            return torch.cat([torch.cat([other, last + values], dim=axis), x[1:]])

        with Intervene(loaded, keyed({"hidden.0": embed, site: write})):
            found: Tensor = forward(loaded, batch).logits[batch.mask]
        return (found * weights).sum()

    coarse = name in ("qwen3", "modernbert", "gemma2")  # transformers computes their norms or rotary embeddings in float32
    steps = {"eps": 3e-3, "atol": 0.02, "rtol": 0.02} if coarse else {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4}
    gradients = torch.autograd.grad(run(values, added), (values, added))
    assert min(float(gradient.abs().max()) for gradient in gradients) > steps["atol"] * 5
    assert torch.autograd.gradcheck(run, (values, added), **steps)
