"""Models in parts over two processes: DeepSpeed's ZeRO-3 answers as the whole model does."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from on_ranks import run_on_ranks
from transformers import PreTrainedModel

from online.models import ModelSpec, load_model
from online.sharding import Sharding
from store.shape import Head

pytestmark = pytest.mark.slow

Build = Callable[..., PreTrainedModel]
RANKS = 2
TOLERANCE = 1e-5
BF16_TOLERANCE = 0.1
EQUAL: list[tuple[str, Head, Head, str, dict[str, Any]]] = [
    ("bert", "masked_lm", "masked_lm", "float32", {}),
    ("bert", "masked_lm", "base", "float32", {}),
    ("bert", "multiple_choice", "multiple_choice", "float32", {}),
    ("mobilebert", "masked_lm", "masked_lm", "float32", {}),
    ("gpt2", "causal_lm", "causal_lm", "float32", {}),
    ("llama", "causal_lm", "causal_lm", "float32", {"offload": "cpu"}),
    ("llama", "classification", "classification", "float32", {}),
    ("qwen3", "causal_lm", "causal_lm", "float32", {}),
    ("qwen3", "token_classification", "token_classification", "bfloat16", {}),
]
"""Family, head of the weights on disk, head that they are loaded with, dtype, and what is special in the sharding."""


@pytest.fixture(scope="module")
def folder_of(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Head], str]:
    root = tmp_path_factory.mktemp("models")

    def save(name: str, head: Head) -> str:
        folder = root / f"{name}-{head}"
        if not folder.exists():
            tiny_model(name, head).save_pretrained(folder)
        return str(folder)

    return save


Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(folder_of: Callable[[str, Head], str], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of each rank, all from one start: DeepSpeed takes its time."""
    extensions = tmp_path_factory.mktemp("extensions")
    (extensions / "pin_memory").mkdir()
    (extensions / "pin_memory" / "lock").touch()
    nvme = {"offload": "nvme", "offload_folder": str(extensions / "swapped")}
    equal = [
        {"spec": {"model": folder_of(name, stored), "head": head, "dtype": dtype}, "sharding": sharding, "interrupted": name == "gpt2"}
        for name, stored, head, dtype, sharding in EQUAL
    ]
    bert = folder_of("bert", "masked_lm")
    refused = [
        {"spec": {"model": bert, "head": "classification"}},
        {"spec": {"model": bert, "head": "classification", "new_head": True}},
        {"spec": {"model": folder_of("llama", "classification"), "head": "classification", "labels": 5, "new_head": True}},
        {"spec": {"model": bert, "head": "masked_lm"}, "sharding": nvme},
    ]
    arguments = {"sharding": {"kind": "zero3", "size": RANKS}, "equal": equal, "refused": refused}
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    return run_on_ranks(RANKS, Path(__file__).with_name("sharded_ranks.py"), arguments, environment=environment)


@pytest.mark.parametrize("case", range(len(EQUAL)), ids=["-".join(map(str, case[:4])) for case in EQUAL])
def test_features_weights_and_fingerprint_are_those_of_the_whole_model(answers: Answers, case: int) -> None:
    tolerance = BF16_TOLERANCE if EQUAL[case][3] == "bfloat16" else TOLERANCE
    for answer in answers:
        found = answer["equal"][case]
        assert max(found["features"].values()) <= tolerance, found["features"]
        assert found["statics"]
        assert max(found["statics"].values()) == 0
        assert found["same_fingerprint"]


def test_every_site_was_compared(answers: Answers) -> None:
    sites = {key.partition("@")[0].partition(".")[0] for found in answers[0]["equal"] for key in found["features"]}
    assert sites == {
        "hidden", "final", "input", "query", "key", "value", "attention_scores", "attention_probs", "head_input", "lm_logits",
        "task_logits",
    }  # fmt: skip


def test_ranks_hold_equal_parts_that_make_up_the_model(answers: Answers) -> None:
    for found in zip(*(answer["equal"] for answer in answers), strict=True):
        assert sum(one["local"] for one in found) == found[0]["all"]
        assert max(one["local"] for one in found) <= found[0]["all"] / RANKS + 50  # one element of padding a parameter


def test_never_is_more_than_half_of_a_model_there_at_once(answers: Answers) -> None:
    for answer in answers:
        for (name, *_), found in zip(EQUAL, answer["equal"], strict=True):
            assert 0 < found["most_live"] < found["all"] / 2, name


def test_a_model_made_afterwards_is_whole(answers: Answers) -> None:
    assert {answer["later"] for answer in answers} == {answers[0]["equal"][0]["all"]}


def test_a_head_that_the_folder_lacks_is_refused_on_all_ranks(answers: Answers) -> None:
    for answer in answers:
        assert "has no classification head that fits: it lacks bert.pooler.dense.bias" in answer["refused"][0]


def test_a_random_head_is_refused(answers: Answers) -> None:
    for answer in answers:
        assert "new_head: true would draw" in answer["refused"][1]
        assert "new_head: true would draw score.weight at random" in answer["refused"][2]


def test_an_operator_whose_build_was_killed_is_named_with_its_lock(answers: Answers) -> None:
    for answer in answers:
        assert "pin_memory/lock exists" in answer["refused"][3]
        assert "AsyncIOBuilder().load()" in answer["refused"][3]


def test_without_deepspeed_the_command_that_installs_it_is_given(
    folder_of: Callable[[str, Head], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'teachercache\[sharded\]'"):
        load_model(ModelSpec(model=Path(folder_of("bert", "masked_lm")), head="masked_lm"), sharding=Sharding(kind="zero3"))
