"""A model's outline says of weights on disk what loading them whole would say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from online.models import HEADS, load_config
from online.skeleton import largest_block, largest_parameter, load_skeleton
from store.shape import Head


@pytest.mark.parametrize(
    ("name", "stored", "head", "labels"),
    [
        ("bert", "masked_lm", "base", 3),
        ("bert", "base", "masked_lm", 3),
        ("roberta", "classification", "classification", 5),
        ("distilbert", "masked_lm", "token_classification", 3),
        ("modernbert", "base", "classification", 3),
        ("gpt2", "causal_lm", "classification", 3),
        ("llama", "base", "causal_lm", 3),
        ("qwen3", "causal_lm", "base", 3),
        ("gemma3_text", "causal_lm", "classification", 3),
    ],
)
def test_the_loading_info_is_that_of_a_model_loaded_whole(
    name: str, stored: Head, head: Head, labels: int, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model(name, stored).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.num_labels = labels
    arguments = {"pretrained_model_name_or_path": str(tmp_path), "config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    skeleton, found = load_skeleton(HEADS[head], arguments)
    expected = HEADS[head].from_pretrained(**arguments, output_loading_info=True)[1]  # type: ignore[attr-defined]
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        assert set(found[kind]) == set(expected[kind]), kind
    assert all(weight.is_meta for weight in skeleton.parameters())


def test_weights_of_another_shape_are_refused_as_for_a_whole_model(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_model("bert", "classification").save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.num_labels = 5
    arguments = {"pretrained_model_name_or_path": str(tmp_path), "config": config, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_skeleton(HEADS["classification"], arguments)


def test_weights_in_several_files_are_found_and_none_are_named(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_model("gpt2", "causal_lm").save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    arguments = {"pretrained_model_name_or_path": str(tmp_path), "config": load_config(tmp_path), "dtype": torch.float32}
    assert not load_skeleton(HEADS["causal_lm"], arguments)[1]["missing_keys"]
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(OSError, match=r"neither model\.safetensors nor"):
        load_skeleton(HEADS["causal_lm"], arguments)


def test_the_largest_block_and_parameter() -> None:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4
    )
    with torch.device("meta"):
        model = HEADS["causal_lm"].from_config(config)  # type: ignore[attr-defined]
    attention, projections, norms = 16 * 16 + 2 * 16 * 8 + 16 * 16, 3 * 16 * 40, 2 * 16
    assert largest_block(model) == attention + projections + norms
    assert largest_parameter(model) == 1000 * 16
