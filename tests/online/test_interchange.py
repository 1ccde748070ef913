"""Counterfactual answers: what a model says once each row has taken hidden states of its partner."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from online.batch import Batch, Features, dense
from online.capture import Capture
from online.interchange import answered, counterfactual, written
from online.models import LoadedModel, forward
from online.teacher import LiveTeacher
from store.features import FeatureKey
from store.intervention import Intervention

LOGITS, LAST = FeatureKey("lm_logits"), FeatureKey("hidden", 3)
LENGTHS = (9, 12, 12, 5)
PLANS = {0: {1: 4, 2: 5, 8: 11}, 2: {0: 4, 3: 0, 4: 1}}
"""Token of rows 0 and 2 -> token of rows 1 and 3 that takes its place, and the other way round."""


@pytest.fixture(scope="module")
def by_hand() -> ModuleType:
    path = Path(__file__).parents[1] / "student_train" / "golden" / "by_hand.py"
    spec = importlib.util.spec_from_file_location("by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bert() -> LoadedModel:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20, max_position_embeddings=32
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return LoadedModel.of(model, "masked_lm")


def pairs(draws: tuple[int, int] = (4, 5)) -> Batch:
    """Four rows, padded: 0 and 1 are partners, and 2 and 3."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(4, 30, mask.shape, generator=generator).where(mask, 0)
    plan = torch.full(mask.shape, -1)
    for row, places in PLANS.items():
        for token, there in places.items():
            plan[row, token], plan[row + 1, there] = there, token
    order = torch.arange(4)
    return Batch(
        order, ids, mask, None, None, None, torch.where(mask & (ids % 3 == 0), ids, -100), None, order // 2,
        interchange=plan, draws=torch.tensor(draws).repeat_interleave(2),
    )  # fmt: skip


def reference(loaded: LoadedModel, batch: Batch, layers: list[list[int]], by_hand: ModuleType) -> list[tuple[list[Tensor], Tensor]]:
    """Hidden states and logits of each row, row by row, by hand."""
    weights = by_hand.weights_of(loaded.model)
    ids = [batch.input_ids[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    own = [by_hand.bert(weights, 2, 3, some, {})[0] for some in ids]
    found = []
    for row, some in enumerate(ids):
        partner = {0: 1, 1: 0, 2: 3, 3: 2}[row]
        plan = PLANS[row] if row in PLANS else {there: token for token, there in PLANS[partner].items()}
        blocks = layers[int(batch.draws[row]) % len(layers)]
        found.append(by_hand.bert(weights, 2, 3, some, {b: {t: own[partner][b][at] for t, at in plan.items()} for b in blocks}))
    return found


@pytest.mark.parametrize("layers", [[[1]], [[2], [3]], [[1, 2], [3]], [[3, 1], [2]]])
def test_a_teachers_counterfactuals_equal_those_by_hand(layers: list[list[int]], by_hand: ModuleType) -> None:
    loaded, batch = bert(), pairs()
    answers = answered(loaded, batch, [LOGITS, *(FeatureKey("hidden", block) for block in range(4))], Intervention(layers=layers))
    plain = answered(loaded, batch, [LOGITS])
    for row, (hidden, logits) in enumerate(reference(loaded, batch, layers, by_hand)):
        length = LENGTHS[row]
        torch.testing.assert_close(dense(answers, LOGITS)[row, :length].double(), logits, rtol=1e-5, atol=2e-5)
        assert (dense(plain, LOGITS)[row, :length].double() - logits).abs().max() > 0.01
        for block, expected in enumerate(hidden):
            torch.testing.assert_close(dense(answers, FeatureKey("hidden", block))[row, :length].double(), expected, rtol=1e-5, atol=2e-5)


def test_a_row_that_is_swapped_with_itself_answers_as_before_to_the_bit() -> None:
    loaded, batch = bert(), pairs()
    twice = batch.input_ids[[0, 0, 2, 2]], batch.mask[[0, 0, 2, 2]]
    same = torch.where(twice[1], torch.arange(16), -1)
    batch = dataclasses.replace(batch, input_ids=twice[0], mask=twice[1], token_labels=None, interchange=same)
    keys = [LOGITS, LAST, FeatureKey("attention_probs", 2)]
    plain, swapped = answered(loaded, batch, keys), answered(loaded, batch, keys, Intervention(layers=((1, 3), (2,))))
    for key in keys:
        assert torch.equal(dense(plain, key), dense(swapped, key)), key


def test_each_pair_has_the_alternative_of_its_draw_and_rows_without_a_plan_none() -> None:
    loaded, batch = bert(), pairs(draws=(6, 9))
    both = dense(answered(loaded, batch, [LOGITS], Intervention(layers=((1,), (3,)))), LOGITS)
    first, second = (dense(answered(loaded, batch, [LOGITS], Intervention(layers=((block,),))), LOGITS) for block in (1, 3))
    assert torch.equal(both[:2], first[:2])
    assert torch.equal(both[2:], second[2:])
    assert not torch.equal(first[:2], second[:2])
    none = dataclasses.replace(batch, interchange=torch.full_like(batch.interchange, -1))
    assert torch.equal(
        dense(answered(loaded, none, [LOGITS], Intervention(layers=((2,),))), LOGITS), dense(answered(loaded, batch, [LOGITS]), LOGITS)
    )


def test_gradient_reaches_the_weights_also_through_the_partners_states(by_hand: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, batch, layers = bert(), pairs(), [[2], [1]]
    own = _own(loaded, batch, layers)
    direction = torch.randn(*batch.mask.shape, 30, generator=torch.Generator().manual_seed(1))
    names = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.2.output.dense.bias"]
    weights = [dict(loaded.model.named_parameters())[name] for name in names]

    def slopes(states: Features) -> tuple[Tensor, ...]:
        after = dense(counterfactual(loaded, batch, [LOGITS], layers, states), LOGITS)
        return torch.autograd.grad((after * direction * batch.mask[..., None]).sum(), weights, retain_graph=True)

    mine, cut = slopes(own), slopes({key: dense(own, key).detach() for key in own})
    exact = {name: weight.requires_grad_() for name, weight in by_hand.weights_of(loaded.model).items()}
    monkeypatch.setattr(by_hand, "weights_of", lambda model: exact)
    found = reference(loaded, batch, layers, by_hand)
    total = sum((logits * direction[row, : LENGTHS[row]]).sum() for row, (_, logits) in enumerate(found))
    for one, without, true in zip(mine, cut, torch.autograd.grad(total, [exact[name] for name in names]), strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))
        assert not torch.allclose(one, without, rtol=1e-3) or true.dim() == 1  # the last block is behind what is exchanged


def _own(loaded: LoadedModel, batch: Batch, layers: list[list[int]]) -> Features:
    with Capture(loaded, written(layers), grad=True) as capture:
        forward(loaded, batch)
        return capture.features(batch)


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "gpt2"])
def test_what_follows_from_stored_features_is_what_the_model_went_on_with(name: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert name in CONFIGS
    head = "causal_lm" if name in ("llama", "gpt2") else "masked_lm"
    loaded = LoadedModel.of(tiny_model(name, head), head)
    last = loaded.shape.layers
    batch, intervention = pairs(), Intervention(layers=((1, last), (2,)))
    sites = ["hidden", "input", "query", "key", "value", "attention_scores", "attention_probs"]
    keys = [FeatureKey(site, block) for site in sites for block in range(1, last + 1)] + [FeatureKey("final"), LOGITS]
    live = LiveTeacher(loaded, keys, intervention=intervention).features(batch, {})
    captured = answered(loaded, batch, keys, intervention)
    plain = answered(loaded, batch, keys)
    for key in keys:
        value, expected = dense(live, key), dense(captured, key)
        real = batch.mask[:, None, :, None] if key.site.startswith("attention") else batch.mask[..., None]
        torch.testing.assert_close(value * real, expected * real, rtol=1e-4, atol=1e-4)
    assert not torch.equal(dense(captured, FeatureKey("hidden", 1)), dense(plain, FeatureKey("hidden", 1)))


def test_rows_without_their_partners_are_refused() -> None:
    loaded, batch = bert(), dataclasses.replace(pairs(), interchange=None, draws=None)
    with pytest.raises(ValueError, match="an intervention needs rows in pairs, both in a batch; build rows with interchange"):
        answered(loaded, batch, [LOGITS], Intervention(layers=((1,),)))
    with pytest.raises(ValueError, match="the model has blocks 1 to 3"):
        LiveTeacher(loaded, [LOGITS], intervention=Intervention(layers=((4,),)))
