"""Models in slices over two processes: FSDP2 answers as the whole model does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from on_ranks import run_on_ranks
from transformers import GPTNeoXConfig, PreTrainedModel

from online.models import HEADS
from online.sharding import Sharding
from store.shape import Head

Build = Callable[..., PreTrainedModel]
Answers = list[dict[str, Any]]
RANKS, VOCAB = 2, 61
TOLERANCE, BF16_TOLERANCE = 1e-5, 0.1
EQUAL: list[tuple[str, Head, Head, str]] = [
    ("bert", "masked_lm", "masked_lm", "float32"),
    ("bert", "masked_lm", "base", "float32"),
    ("roberta", "classification", "classification", "float32"),
    ("distilbert", "multiple_choice", "multiple_choice", "float32"),
    ("mobilebert", "masked_lm", "masked_lm", "float32"),
    ("mobilebert, inverted", "masked_lm", "base", "float32"),
    ("modernbert", "token_classification", "token_classification", "float32"),
    ("gpt2", "causal_lm", "causal_lm", "float32"),
    ("llama", "causal_lm", "causal_lm", "float32"),
    ("llama", "causal_lm", "causal_lm", "bfloat16"),
    ("qwen3", "causal_lm", "causal_lm", "float32"),
    ("gemma3_text", "causal_lm", "causal_lm", "bfloat16"),
    ("tied llama", "causal_lm", "causal_lm", "float32"),
]
"""Family, head of the weights on disk (float32), head that they are loaded with, and dtype."""


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
    config = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    HEADS["causal_lm"].from_config(config).save_pretrained(root / "custom")  # type: ignore[attr-defined]
    modules = {"block": "gpt_neox.layers.{i}", "layers": 3, "width": 32, "final_norm": "gpt_neox.final_layer_norm"}
    equal.append({"spec": {"model": str(root / "custom"), "head": "causal_lm", "modules": modules}})
    bert, wider = Path(save("bert", "masked_lm")), root / "wider"
    wider.mkdir()
    (wider / "model.safetensors").symlink_to(bert / "model.safetensors")
    (wider / "config.json").write_text(json.dumps({**json.loads((bert / "config.json").read_text()), "vocab_size": VOCAB + 1}))
    refused = [
        {"spec": {"model": str(bert), "head": "classification"}},
        {"spec": {"model": str(bert), "head": "classification", "new_head": True}},
        {"spec": {"model": str(wider), "head": "masked_lm"}},
    ]
    arguments = {"sharding": {"kind": "fsdp", "size": RANKS}, "equal": equal, "refused": refused, "interrupted": True}
    return run_on_ranks(RANKS, Path(__file__).with_name("sharded_ranks.py"), arguments)


CASES = pytest.mark.parametrize("case", range(len(EQUAL) + 1), ids=[*("-".join(case) for case in EQUAL), "custom"])


@CASES
def test_features_weights_and_fingerprint_are_those_of_the_whole_model(answers: Answers, case: int) -> None:
    tolerance = BF16_TOLERANCE if case < len(EQUAL) and EQUAL[case][3] == "bfloat16" else TOLERANCE
    for answer in answers:
        found = answer["equal"][case]
        assert max(found["features"].values()) <= tolerance, found["features"]
        assert max(found["statics"].values()) == 0
        assert found["same_fingerprint"]


@CASES
def test_ranks_hold_slices_that_make_up_the_model(answers: Answers, case: int) -> None:
    found = [answer["equal"][case] for answer in answers]
    assert sum(one["local"] for one in found) == found[0]["all"]
    assert max(one["local"] for one in found) < found[0]["all"] * 0.52


@CASES
def test_never_are_two_blocks_gathered_at_once(answers: Answers, case: int) -> None:
    for answer in answers:  # one of three blocks, and what lies outside of them
        assert 0 < answer["equal"][case]["most_live"] < answer["equal"][case]["all"] * 0.65


def test_a_model_made_afterwards_is_whole(answers: Answers) -> None:
    assert {answer["later"] for answer in answers} == {answers[0]["equal"][0]["all"]}


def test_weights_that_the_folder_lacks_are_refused_on_all_ranks(answers: Answers) -> None:
    for answer in answers:
        lacking, random, wider = answer["refused"]
        assert "has no classification head that fits: it lacks bert.pooler.dense.bias" in lacking
        assert "new_head: true would draw" in random
        assert "cannot be loaded with the head masked_lm" in wider  # although the slice of the first rank would fit


def test_a_single_rank_shards_nothing() -> None:
    with pytest.raises(ValueError, match="kind fsdp with size 1: expected the number of ranks"):
        Sharding(kind="fsdp")
