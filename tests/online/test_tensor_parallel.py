"""Models of which two processes compute a part of every matrix product answer as the whole model does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from on_ranks import run_on_ranks
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from online.families import FAMILIES
from online.models import ModelSpec, load_model
from online.sharding import Sharding
from store.shape import Head

Build = Callable[..., PreTrainedModel]
Answers = list[dict[str, Any]]
RANKS, VOCAB = 2, 61
WORD_TOLERANCE = 2e-6
TOLERANCE, BF16_TOLERANCE = 1e-5, 0.1  # partial sums are rounded to bfloat16 before they are added
EQUAL: list[tuple[str, Head, Head, str]] = [
    ("bert", "masked_lm", "masked_lm", "float32"),
    ("bert", "masked_lm", "base", "float32"),
    ("bert", "multiple_choice", "multiple_choice", "bfloat16"),
    ("roberta", "masked_lm", "masked_lm", "float32"),
    ("xlm-roberta", "classification", "classification", "float32"),
    ("distilbert", "masked_lm", "masked_lm", "float32"),
    ("electra", "masked_lm", "masked_lm", "float32"),
    ("llama", "causal_lm", "causal_lm", "float32"),
    ("llama", "causal_lm", "causal_lm", "bfloat16"),
    ("tied llama", "causal_lm", "causal_lm", "float32"),
    ("mistral", "classification", "classification", "float32"),
    ("qwen2", "token_classification", "token_classification", "float32"),
    ("qwen3", "causal_lm", "causal_lm", "float32"),
    ("gemma", "causal_lm", "base", "float32"),
    ("gemma2", "causal_lm", "causal_lm", "float32"),
    ("gemma3_text", "causal_lm", "causal_lm", "float32"),
]
"""Family, head of the weights on disk (float32), head that they are loaded with, and dtype. Decoders have 4 heads on 2 key-value heads,
and the vocabulary is odd."""


@pytest.fixture(scope="module")
def answers(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of each rank, all from one start."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, head: Head) -> str:
        folder = root / f"{name}-{head}"
        if not folder.exists():
            model = tiny_model(name.removeprefix("tied "), head)
            if name.startswith("tied "):
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.save_pretrained(folder)
        return str(folder)

    equal = [{"spec": {"model": save(name, stored), "head": head, "dtype": dtype}} for name, stored, head, dtype in EQUAL]
    refused = [{"spec": {"model": save("bert", "masked_lm"), "head": "classification"}}]
    arguments = {"sharding": {"kind": "tp", "size": RANKS}, "equal": equal, "refused": refused, "together": True, "interrupted": True}
    return run_on_ranks(RANKS, Path(__file__).with_name("sharded_ranks.py"), arguments)


CASES = pytest.mark.parametrize("case", range(len(EQUAL)), ids=["-".join(case) for case in EQUAL])


@CASES
def test_features_weights_and_fingerprint_are_those_of_the_whole_model(answers: Answers, case: int) -> None:
    tolerance = BF16_TOLERANCE if EQUAL[case][3] == "bfloat16" else TOLERANCE
    for answer in answers:
        found = answer["equal"][case]
        assert max(found["features"].values()) <= tolerance, found["features"]
        assert max(found["statics"].values()) == 0
        assert found["same_fingerprint"]


@CASES
def test_what_is_kept_of_words_follows_from_the_parts_of_the_ranks(answers: Answers, case: int) -> None:
    """The same words to the bit, beside numbers whose sums are taken in another order."""
    found = [answer["equal"][case]["words"] for answer in answers]
    assert found[0] == found[1]
    assert bool(found[0]) == (EQUAL[case][2] in ("masked_lm", "causal_lm"))
    assert all(same and difference <= WORD_TOLERANCE for same, difference in found[0].values()), found[0]


@CASES
def test_little_is_held_by_both_ranks(answers: Answers, case: int) -> None:
    """Positions, norms, biases and the layers of heads that are no word heads: in these models of width 32 their share is large."""
    found = [answer["equal"][case] for answer in answers]
    held_twice = sum(one["local"] for one in found) - found[0]["all"]
    assert 0 < held_twice < found[0]["all"] * (0.5 if EQUAL[case][0] == "distilbert" else 0.2)  # which has 512 positions
    assert max(one["local"] for one in found) - min(one["local"] for one in found) <= 2 * 33  # an odd word and its bias, twice


def test_every_family_whose_projections_are_apart_is_split(answers: Answers) -> None:
    apart = {name for name, family in FAMILIES.items() if len(family.projections) == 3} - {"mobilebert"}  # refused below
    assert {name.removeprefix("tied ") for name, *_ in EQUAL} == apart


def test_a_model_made_afterwards_is_whole(answers: Answers) -> None:
    assert {answer["later"] for answer in answers} == {answers[0]["equal"][0]["all"]}


def test_weights_that_the_folder_lacks_are_refused_on_all_ranks(answers: Answers) -> None:
    for answer in answers:
        assert "has no classification head that fits: it lacks bert.pooler.dense.bias" in answer["refused"][0]


SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(**SIZES, num_attention_heads=3), "sharding.size 2 does not divide num_attention_heads 3"),
        (LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1), "sharding.size 2 does not divide num_key_value_heads 1"),
        ("gpt2", "gpt2 keeps query, key and value in one matrix.*expected sharding.kind zero3 or fsdp"),
        ("mobilebert", "mobilebert multiplies words with two matrices at once.*expected sharding.kind zero3 or fsdp"),
        ("modernbert", "modernbert keeps query, key and value in one matrix.*expected sharding.kind zero3 or fsdp"),
    ],
)
def test_what_cannot_be_split_is_refused_before_any_weight_is_read(
    config: PreTrainedConfig | str, message: str, tiny_model: Build, tmp_path: Path
) -> None:
    config = tiny_model(config, "base").config if isinstance(config, str) else config
    config.save_pretrained(tmp_path)  # and no weights
    head: Head = "causal_lm" if FAMILIES[config.model_type].causal else "masked_lm"
    with pytest.raises(ValueError, match=message):
        load_model(ModelSpec(model=tmp_path, head=head), sharding=Sharding(kind="tp", size=2))


def test_a_single_rank_splits_nothing() -> None:
    with pytest.raises(ValueError, match="kind tp with size 1: expected the number of ranks"):
        Sharding(kind="tp")
