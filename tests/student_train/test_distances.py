"""Distances of a probe, against their formulas in float64 on rows without padding, one at a time."""

import math
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from online.collate import collate
from online.models import HEADS, LoadedModel
from online.teacher import LiveTeacher
from store.reader import Store
from store.shape import Head
from student_train.bundle import Bundle
from student_train.distances import DISTANCES, Comparison, comparisons
from student_train.evaluate import HeldOut, held_out_rows
from student_train.probe import measured

Seen = dict[str, Any]
TEMPERATURES = (1.0, 5.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def bert(seed: int, layers: int, width: int, heads: int, head: Head = "classification") -> LoadedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return loud(LoadedModel.of(HEADS[head].from_config(config), head))


def llama(seed: int, layers: int, width: int, heads: int, kv_heads: int) -> LoadedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=2 * width, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return loud(LoadedModel.of(LlamaForCausalLM(config), "causal_lm"))


def loud(loaded: LoadedModel) -> LoadedModel:
    """With weights large enough that nothing is nearly uniform."""
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    loaded.model.eval()
    return loaded


def alone(loaded: LoadedModel, ids_T: Tensor) -> Seen:
    """All that a model makes of one row, in float64: lists by block of [T, W], by head where there are heads."""
    model: Any = deepcopy(loaded.model).double().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids_T[None], output_hidden_states=True, output_attentions=True)
        hidden = [h[0] for h in out.hidden_states]
        seen: Seen = {"hidden": hidden, "probs": [p[0] for p in out.attentions], "logits": out.logits[0]}
        seen["query"], seen["key"], seen["value"] = [None], [None], [None]
        for block in range(1, loaded.shape.layers + 1):
            if loaded.shape.family == "llama":
                layer = model.model.layers[block - 1]
                entering, projections = layer.input_layernorm(hidden[block - 1]), layer.self_attn
                names = {"query": projections.q_proj, "key": projections.k_proj, "value": projections.v_proj}
            else:
                layer = model.base_model.encoder.layer[block - 1]
                entering, own = hidden[block - 1], layer.attention.self
                names = {"query": own.query, "key": own.key, "value": own.value}
            for name, projection in names.items():
                seen[name].append(projection(entering))
    return seen


def of_rows(store: Store, student: LoadedModel, teacher: LoadedModel, rows: Iterable[int]) -> list[tuple[Seen, Seen]]:
    found = []
    for row in rows:
        batch = collate(store, torch.tensor([row]).numpy())
        ids_T = batch.input_ids[0][batch.mask[0]]
        found.append((alone(student, ids_T), alone(teacher, ids_T)))
    return found


def mean_over(values: list[float]) -> float:
    return sum(values) / len(values)


def pairs(tokens: int, causal: bool) -> list[tuple[int, int]]:
    return [(i, j) for i in range(tokens) for j in range(tokens) if j <= i or not causal]


def plain(found: list[tuple[Seen, Seen]], site: str, s: int, t: int) -> float:
    """Mean over all tokens of all rows."""
    return mean_over([float((a - b).square().mean()) for one, two in found for a, b in zip(one[site][s], two[site][t], strict=True)])


def scaled(found: list[tuple[Seen, Seen]], site: str, s: int, t: int, parts: int, causal: bool = False) -> float:
    """Mean over all pairs of tokens of all rows, and over parts of the width."""
    squares = []
    for one, two in found:
        for i, j in pairs(len(one[site][s]), causal):
            products = []
            for x in (one[site][s], two[site][t]):
                width = x.shape[1] // parts
                products.append(
                    [float(x[i][p * width : (p + 1) * width] @ x[j][p * width : (p + 1) * width]) / width**0.5 for p in range(parts)]
                )
            squares.append(mean_over([(a - b) ** 2 for a, b in zip(*products, strict=True)]))
    return mean_over(squares)


def scores_of(seen: Seen, block: int, heads: int) -> Tensor:
    """[H, T, T] q k / sqrt(d), of a BERT."""
    q, k = seen["query"][block], seen["key"][block]
    width = q.shape[1] // heads
    return torch.stack([q[:, h * width : (h + 1) * width] @ k[:, h * width : (h + 1) * width].T / width**0.5 for h in range(heads)])


def map_distance(maps: list[tuple[Tensor, Tensor]], causal: bool = False) -> float:
    squares = []
    for one, two in maps:
        if len(one) != len(two):
            one, two = one.mean(0, keepdim=True), two.mean(0, keepdim=True)
        squares += [float((one[:, i, j] - two[:, i, j]).square().mean()) for i, j in pairs(one.shape[1], causal)]
    return mean_over(squares)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 KL of two lists of logits, term by term."""

    def shares(logits: Tensor) -> list[float]:
        weights = [math.exp(float(z) / temperature) for z in logits]
        return [weight / sum(weights) for weight in weights]

    p, q = shares(teacher), shares(student)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def probed(store: Store, student: LoadedModel, teacher: LoadedModel, compared: tuple[Comparison, ...], limit: int) -> dict[str, float]:
    bundle = Bundle(student, [])
    rows = held_out_rows(store, "train", limit)
    return measured(bundle, HeldOut(store, rows, LiveTeacher(teacher, {one.teacher_key for one in compared}), False, ""), compared)


def test_every_distance_of_two_classifiers_is_its_formula(tiny: ModuleType, taught: Path) -> None:
    student, teacher, store = bert(1, 2, 16, 4), bert(2, 4, 16, 4), Store.open(taught)
    compared = comparisons(None, "uniform", TEMPERATURES, student.shape, teacher.shape, labelled=False)
    values = probed(store, student, teacher, compared, 35)  # more than one batch of 32
    found = of_rows(store, student, teacher, range(35))
    expected = {
        "embedding": plain(found, "hidden", 0, 0),
        "embedding_relation": scaled(found, "hidden", 0, 0, 1),
        **{f"soft.T{t:g}": mean_over([divergence(one["logits"], two["logits"], t) for one, two in found]) for t in TEMPERATURES},
    }
    for s, t in ((1, 2), (2, 4)):
        at = f".{s}-{t}"
        expected |= {
            f"hidden{at}": plain(found, "hidden", s, t),
            f"hidden_relation{at}": scaled(found, "hidden", s, t, 1),
            f"attention{at}": map_distance([(scores_of(one, s, 4), scores_of(two, t, 4)) for one, two in found]),
            f"attention_probs{at}": map_distance([(one["probs"][s - 1], two["probs"][t - 1]) for one, two in found]),
            f"attention_relation{at}": map_distance(
                [tuple(p @ p.mT / p.shape[-1] ** 0.5 for p in (one["probs"][s - 1], two["probs"][t - 1])) for one, two in found]
            ),
        }
        for site in ("query", "key", "value"):
            expected |= {f"{site}{at}": plain(found, site, s, t), f"{site}_relation{at}": scaled(found, site, s, t, 4)}
    assert values.keys() == expected.keys()
    assert values == pytest.approx(expected, rel=2e-4)


def test_other_widths_and_heads_leave_relations_and_means_of_heads(tiny: ModuleType, taught: Path) -> None:
    student, teacher, store = bert(1, 2, 12, 2), bert(2, 3, 24, 6), Store.open(taught)
    compared = comparisons(None, [(2, 3)], (1.0,), student.shape, teacher.shape, labelled=False)
    values = probed(store, student, teacher, compared, 6)
    found = of_rows(store, student, teacher, range(6))
    expected = {
        "embedding_relation": scaled(found, "hidden", 0, 0, 1),
        "hidden_relation.2-3": scaled(found, "hidden", 2, 3, 1),
        "query_relation.2-3": scaled(found, "query", 2, 3, 2),
        "key_relation.2-3": scaled(found, "key", 2, 3, 2),
        "value_relation.2-3": scaled(found, "value", 2, 3, 2),
        "attention.2-3": map_distance([(scores_of(one, 2, 2), scores_of(two, 3, 6)) for one, two in found]),
        "attention_probs.2-3": map_distance([(one["probs"][1], two["probs"][2]) for one, two in found]),
        "attention_relation.2-3": map_distance(
            [
                tuple((m := p.mean(0, keepdim=True)) @ m.mT / m.shape[-1] ** 0.5 for p in (one["probs"][1], two["probs"][2]))
                for one, two in found
            ]
        ),
        "soft.T1": mean_over([divergence(one["logits"], two["logits"], 1.0) for one, two in found]),
    }
    assert values.keys() == expected.keys()
    assert values == pytest.approx(expected, rel=2e-4)


def test_decoders_are_compared_among_the_tokens_that_both_see_and_by_their_words(tiny: ModuleType, taught: Path) -> None:
    student, teacher, store = llama(1, 1, 16, 2, 2), llama(2, 2, 32, 4, 2), Store.open(taught)
    names = ("hidden_relation", "query_relation", "key_relation", "attention_probs", "l_sp")
    values = probed(store, student, teacher, comparisons(names, "uniform", (1.0,), student.shape, teacher.shape, labelled=False), 5)
    found = of_rows(store, student, teacher, range(5))
    # the last hidden state of transformers is behind the final norm, so block 1 of the teacher is compared, not its last one
    middle = comparisons(("hidden_relation",), [(1, 1)], (1.0,), student.shape, teacher.shape)[0]
    assert (str(middle.student_key), str(middle.teacher_key)) == ("hidden.1@all", "hidden.1@all")
    expected = {
        "query_relation.1-2": scaled(found, "query", 1, 2, 2, causal=True),
        "key_relation.1-2": scaled(found, "key", 1, 2, 2, causal=True),
        "attention_probs.1-2": map_distance([(one["probs"][0], two["probs"][1]) for one, two in found], causal=True),
        "l_sp.T15": mean_over([divergence(a, b, 15.0) for one, two in found for a, b in zip(one["logits"], two["logits"], strict=True)]),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=2e-4)
    assert values.keys() == expected.keys() | {"hidden_relation.1-2"}


def test_words_are_those_of_labelled_tokens(many_words: Path) -> None:
    store = Store.open(many_words / "store")
    vocabulary = store.manifest.passes["tiny"].shape.vocab
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64,
        )  # fmt: skip
        models.append(loud(LoadedModel.of(HEADS["masked_lm"].from_config(config), "masked_lm")))
    student, teacher = models
    compared = comparisons(("words", "l_sp"), "uniform", TEMPERATURES, student.shape, teacher.shape)
    values = probed(store, student, teacher, compared, 4)
    labelled: dict[str, list[float]] = {name: [] for name in ("words.T1", "words.T5", "l_sp.T15")}
    for row in held_out_rows(store, "train", 4):
        batch = collate(store, torch.tensor([row]).numpy())
        real_T = batch.mask[0]
        ones = [alone(model, batch.input_ids[0][real_T])["logits"] for model in models]
        for token, (a, b) in enumerate(zip(*ones, strict=True)):
            labelled["l_sp.T15"].append(divergence(a, b, 15.0))
            if batch.labelled[0][real_T][token]:
                labelled["words.T1"].append(divergence(a, b, 1.0))
                labelled["words.T5"].append(divergence(a, b, 5.0))
    assert 0 < len(labelled["words.T1"]) < len(labelled["l_sp.T15"])
    assert values == pytest.approx({name: mean_over(numbers) for name, numbers in labelled.items()}, rel=2e-4)


def test_a_model_is_at_no_distance_from_itself_and_keeps_its_mode(taught: Path) -> None:
    teacher = bert(2, 2, 16, 4)
    student, store = deepcopy(teacher), Store.open(taught)
    compared = comparisons(None, "uniform", TEMPERATURES, student.shape, teacher.shape, labelled=False)
    bundle = Bundle(student, [])
    bundle.train()
    data = HeldOut(store, held_out_rows(store, "train", 8), LiveTeacher(teacher, {one.teacher_key for one in compared}), False, "")
    values = measured(bundle, data, compared)
    assert max(map(abs, values.values())) < 1e-9
    assert bundle.training
    assert all(weight.grad is None for weight in bundle.parameters())


def test_a_distance_that_two_models_do_not_have_is_refused_with_one_that_they_have() -> None:
    narrow, wide = bert(1, 2, 12, 2).shape, bert(2, 3, 24, 6).shape
    with pytest.raises(
        ValueError, match=r"hidden: expected equal widths of hidden .*found 12 and 24; the distance of the same name with _relation"
    ):
        comparisons(("hidden",), "uniform", (1.0,), narrow, wide)
    with pytest.raises(ValueError, match=r"l_sp: lm_logits needs a student with a head of masked_lm, causal_lm"):
        comparisons(("l_sp",), "uniform", (1.0,), narrow, wide)
    with pytest.raises(ValueError, match=r"unknown distance 'hiden'; did you mean 'hidden'"):
        comparisons(("hiden",), "uniform", (1.0,), narrow, wide)
    with pytest.raises(ValueError, match=r"layers: the teacher has blocks 1 to 3, found 4"):
        comparisons(None, [(1, 4)], (1.0,), narrow, wide)
    words = bert(1, 2, 12, 2, "masked_lm").shape
    with pytest.raises(ValueError, match="words: the rows have no labelled tokens; l_sp compares"):
        comparisons(("words",), "uniform", (1.0,), words, words, labelled=False)


def test_every_distance_says_what_it_is_and_names_are_unique() -> None:
    shape = bert(2, 4, 16, 4).shape
    names = [one.name for one in comparisons(None, "uniform", TEMPERATURES, shape, shape)]
    assert len(names) == len(set(names))
    assert all(distance.about for distance in DISTANCES.values())
