"""The planner against the cheapest of all subsets, with derivations written down once more as rules."""

from collections.abc import Iterable
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.planner import TYPICAL, Plan, Units, cover, plan, uncovered
from store.features import ITEM_BYTES, FeatureKey, StoreDtype
from store.shape import Head, ModelShape, Wiring


def shape(pre_norm: bool = False, heads: int = 12, kv_heads: int = 12, head: Head = "masked_lm", attends: bool = True) -> ModelShape:
    return ModelShape(
        family="bert" if attends else "custom", head=head, layers=2, width=384, heads=heads, kv_heads=kv_heads, head_width=32,
        vocab=1000, causal=False, pre_norm=pre_norm, windows=(None, None), attends=attends,
    )  # fmt: skip


POST = Wiring(attention_scale=(1.0, 1.0), head_activation="gelu")
PRE = Wiring(norm="rms", attention_scale=(1.0, 1.0), rotary=True, head_norm="rms")


def planned(
    *names: str, of: ModelShape | None = None, wiring: Wiring = POST, units: Units = TYPICAL, dtype: StoreDtype = "float32"
) -> Plan:
    return plan({FeatureKey.parse(name): dtype for name in names}, of or shape(), wiring, units)


def stored(*names: str, of: ModelShape | None = None, wiring: Wiring = POST) -> set[str]:
    return {str(key).removesuffix("@all") for key in planned(*names, of=of, wiring=wiring).stored}


def test_attention_and_values_of_a_block_follow_from_its_input() -> None:
    found = planned("attention_scores.2", "value.2")
    assert list(map(str, found.stored)) == ["input.2@all"]
    assert set(found.statics) == {f"2.{projection}.{part}" for projection in ("query", "key", "value") for part in ("weight", "bias")}
    assert found.derived[FeatureKey("attention_scores", 2)] == (FeatureKey("input", 2),)


def test_an_alias_that_is_wanted_anyway_costs_nothing() -> None:
    assert stored("attention_scores.2", "value.2", "hidden.1") == {"hidden.1"}
    assert stored("attention_probs.1", "hidden.0", "final", "hidden.2") <= {"hidden.0", "input.1", "final", "hidden.2"}
    assert len(stored("attention_probs.1", "hidden.0", "final", "hidden.2")) == 2


def test_a_pre_norm_input_is_normed_from_a_hidden_state_that_is_wanted_anyway() -> None:
    found = planned("attention_scores.2", "hidden.1", of=shape(pre_norm=True), wiring=PRE)
    assert list(map(str, found.stored)) == ["hidden.1@all"]
    assert {"2.norm.weight", "2.query_norm.weight", "2.key_norm.weight", "2.rotary"} <= set(found.statics)
    assert "2.query_norm.bias" not in found.statics


def test_a_first_block_without_norm_reads_the_embeddings_as_they_are() -> None:
    wiring = PRE.model_copy(update={"norm": "layer", "first_norm": False})
    found = planned("value.1", "hidden.0", of=shape(pre_norm=True), wiring=wiring)
    assert set(map(str, found.stored)) == {"hidden.0@all"}
    assert found.statics == ("1.value.weight", "1.value.bias")


def test_grouped_values_alone_are_smaller_than_the_input() -> None:
    grouped = shape(pre_norm=True, kv_heads=3)
    assert stored("value.2", of=grouped, wiring=PRE) == {"value.2"}
    assert stored("value.2", "key.2", of=grouped, wiring=PRE) == {"value.2", "key.2"}
    assert stored("value.2", "attention_scores.2", of=grouped, wiring=PRE) == {"input.2"}


def test_word_logits_are_stored_as_the_input_of_the_head_at_the_tokens_that_are_wanted() -> None:
    assert stored("lm_logits@labels") == {"head_input@labels"}
    assert stored("lm_logits@masked", "lm_logits@labels") <= {"head_input@labels", "head_input@masked"}
    assert len(stored("lm_logits@masked", "lm_logits@labels")) == 1
    assert stored("lm_logits@labels", "lm_logits") == {"head_input"}
    assert stored("lm_logits@labels", "hidden.2") == {"hidden.2"}
    assert stored("hidden.2@first", "hidden.2@mean") == {"hidden.2@first", "hidden.2@mean"}


def test_likeliest_words_are_stored_unless_they_are_wider_than_the_input_of_the_head() -> None:
    assert stored("lm_logits@labels:top8") == {"lm_logits@labels:top8"}
    assert stored("lm_logits@labels:top300") == {"head_input@labels"}
    assert stored("lm_logits@labels:top8", "lm_logits@labels") == {"head_input@labels"}
    assert stored("lm_logits@labels:select", "lm_logits") == {"head_input", "lm_logits@labels:select"}


def test_a_source_is_kept_in_a_type_that_holds_every_type_asked_of_it() -> None:
    keys = [FeatureKey("attention_scores", 1), FeatureKey("value", 1)]
    for dtypes, kept in ((("float16", "float16"), "float16"), (("float16", "bfloat16"), "float32"), (("bfloat16", "float32"), "float32")):
        assert plan(dict(zip(keys, dtypes, strict=True)), shape(), POST).stored == {FeatureKey("input", 1): kept}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "of", "wiring", "reason"),
    [
        ("attention_scores.1", shape(pre_norm=True), PRE.model_copy(update={"rotary_by_length": True}), "change with the length"),
        ("attention_probs.1", shape(attends=False), Wiring(), "module paths"),
        ("value.1", shape(attends=False), Wiring(), "module paths"),
        ("attention_probs.1@first", shape(), POST, "every pair of tokens"),
    ],
)
def test_what_can_be_neither_stored_nor_derived_is_refused_with_the_reason(name: str, of: ModelShape, wiring: Wiring, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        planned(name, of=of, wiring=wiring)


def test_projections_of_a_model_with_length_dependent_rotary_embedding_are_derived_all_the_same() -> None:
    wiring = PRE.model_copy(update={"rotary_by_length": True})
    assert stored("query.1", "key.1", "value.1", of=shape(pre_norm=True), wiring=wiring) == {"input.1"}


def test_a_custom_model_keeps_what_is_asked_and_takes_positions_from_all_tokens() -> None:
    assert stored("hidden.1", "hidden.1@first", "final", of=shape(attends=False), wiring=Wiring()) == {"hidden.1", "final"}


def test_a_reader_takes_the_fewest_bytes_of_what_a_store_holds() -> None:
    held = {FeatureKey.parse(name): size for name, size in (("hidden.1", 1536), ("value.2", 384), ("hidden.1@first", 1536))}
    weights = {"2.query.weight", "2.key.weight", "2.value.weight"}

    def reads(*names: str) -> set[str]:
        return {str(key) for key in cover(map(FeatureKey.parse, names), held, weights, shape(), POST).stored}

    assert reads("value.2") == {"value.2@all"}
    assert reads("hidden.1@first") == {"hidden.1@first"}
    assert reads("attention_probs.2", "value.2", "hidden.1@first") == {"hidden.1@all"}
    wanted = [FeatureKey.parse(name) for name in ("value.2", "value.1", "lm_logits@labels")]
    assert uncovered(wanted, held, weights, shape(), POST) == wanted[1:]
    assert uncovered([FeatureKey("attention_scores", 2)], held, {"2.query.weight"}, shape(), POST)


# Against brute force


Rules = list[tuple[str, tuple[str, ...]]]
"""(key, keys it follows from)"""


def block_rules(pre_norm: bool) -> Rules:
    rules: Rules = []
    for at in ("all", "first"):
        rules += [(f"input.1@{at}", (f"hidden.0@{at}",))] + ([] if pre_norm else [(f"hidden.0@{at}", (f"input.1@{at}",))])
        rules += [(f"{site}.1@{at}", (f"input.1@{at}",)) for site in ("query", "key", "value")]
    rules += [(f"{site}@first", (f"{site}@all",)) for site in ("hidden.0", "input.1", "query.1", "key.1", "value.1")]
    return [*rules, ("attention_scores.1@all", ("query.1@all", "key.1@all")), ("attention_probs.1@all", ("attention_scores.1@all",))]


def head_rules(transform: bool) -> Rules:
    rules: Rules = []
    for at in ("all", "labels"):
        rules += [(f"final@{at}", (f"hidden.2@{at}",)), (f"hidden.2@{at}", (f"final@{at}",)), (f"head_input@{at}", (f"final@{at}",))]
        rules += [(f"lm_logits@{at}", (f"head_input@{at}",)), (f"lm_logits@{at}:top90", (f"lm_logits@{at}",))]
        rules += [] if transform else [(f"final@{at}", (f"head_input@{at}",))]
    return rules + [(f"{site}@labels", (f"{site}@all",)) for site in ("hidden.2", "final", "head_input", "lm_logits")]


def closure(keys: Iterable[str], rules: Rules) -> set[str]:
    known = set(keys)
    while new := {key for key, sources in rules if key not in known and known.issuperset(sources)}:
        known |= new
    return known


def row_bytes(name: str, of: ModelShape, units: Units, dtype: StoreDtype) -> float:
    key = FeatureKey.parse(name)
    count = 1 if key.per_row else units.tokens if key.positions == "all" else units.labelled
    if key.form:
        return count * (int(key.form[3:]) * (2 + ITEM_BYTES[dtype]) + 4)
    return count * of.width_of(key.site) * ITEM_BYTES[dtype]


def brute_force(wanted: set[str], rules: Rules, of: ModelShape, units: Units, dtype: StoreDtype) -> float:
    storable = sorted(
        {key for key, _ in rules if "attention" not in key} | {key for _, sources in rules for key in sources if "attention" not in key}
    )
    choices = (choice for size in range(1, 5) for choice in combinations(storable, size))
    return min(sum(row_bytes(key, of, units, dtype) for key in choice) for choice in choices if wanted <= closure(choice, rules))


UNITS = st.builds(Units, tokens=st.integers(2, 300).map(float), labelled=st.floats(0.1, 2.0))
DTYPES: st.SearchStrategy[StoreDtype] = st.sampled_from(["float32", "float16"])


def check(wanted: set[str], rules: Rules, of: ModelShape, wiring: Wiring, units: Units, dtype: StoreDtype) -> None:
    found = planned(*wanted, of=of, wiring=wiring, units=units, dtype=dtype)
    kept = {str(key) for key in found.stored}
    assert wanted <= closure(kept, rules)
    assert all(key not in closure(kept - {key}, rules) for key in kept), "a feature and its source are both stored"
    cost = sum(row_bytes(key, of, units, dtype) for key in kept)
    assert cost == pytest.approx(brute_force(wanted, rules, of, units, dtype))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), pre_norm=st.booleans(), heads=st.sampled_from([6, 12, 24]), kv_heads=st.sampled_from([2, 6]), units=UNITS, dtype=DTYPES
)
def test_no_subset_of_a_block_is_cheaper(
    data: st.DataObject, pre_norm: bool, heads: int, kv_heads: int, units: Units, dtype: StoreDtype
) -> None:
    rules = block_rules(pre_norm)
    wanted = data.draw(st.sets(st.sampled_from(sorted(closure(["hidden.0@all"], rules))), min_size=1, max_size=4))
    check(wanted, rules, shape(pre_norm, heads, kv_heads), PRE if pre_norm else POST, units, dtype)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), transform=st.booleans(), units=UNITS, dtype=DTYPES)
def test_no_subset_of_the_head_is_cheaper(data: st.DataObject, transform: bool, units: Units, dtype: StoreDtype) -> None:
    rules = head_rules(transform)
    wanted = data.draw(st.sets(st.sampled_from(sorted(closure(["hidden.2@all"], rules))), min_size=1, max_size=4))
    check(wanted, rules, shape(), POST if transform else Wiring(attention_scale=(1.0, 1.0)), units, dtype)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("int8", "int8", "int8"),
        ("int8", "bfloat16", "bfloat16"),
        ("float16", "float8", "float16"),
        ("int8", "float8", "bfloat16"),
        ("bfloat16", "float16", "float32"),
        ("float8", "float32", "float32"),
    ],
)
def test_a_key_that_is_wanted_in_two_types_is_kept_in_the_smallest_that_is_as_exact(
    one: StoreDtype, other: StoreDtype, both: StoreDtype
) -> None:
    scores, value = FeatureKey("attention_scores", 2), FeatureKey("value", 2)
    for requests in ({scores: one, value: other}, {scores: other, value: one}):
        assert plan(requests, shape(), POST).stored == {FeatureKey("input", 2): both}
