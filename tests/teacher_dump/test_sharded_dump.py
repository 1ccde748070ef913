"""A teacher that lies over two ranks makes the store that one rank makes."""

from collections.abc import Callable
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from tiny_dump import VOCAB, Outcome, Tree, World, files_of, make_tokenizer
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from online.models import HEADS
from store.reader import Store

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": VOCAB}
DECODERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True),
}
KINDS = {"zero3": ("bert", *DECODERS), "fsdp": ("bert", *DECODERS), "tp": ("bert", "llama", "qwen3")}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in DECODERS.items():
        torch.manual_seed(4)
        model = HEADS["causal_lm"].from_config(config).eval()  # type: ignore[attr-defined]
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture
def recipe_of(masked_recipe: Tree, world: World, decoders: dict[str, Path]) -> Callable[[str], Tree]:
    def recipe(family: str) -> Tree:
        features = [
            "hidden.*@all",
            "final@mean",
            "input.2",
            "query.1",
            "key.2",
            "value.2",
            "attention_probs.1",
            "head_input",
            "lm_logits@labels:top8",
        ]
        tree = {**masked_recipe, "features": features, "ship_layers": "all", "batch_tokens": 64}
        if family == "bert":
            return tree
        rows = {**masked_recipe["rows"], "objective": "causal"}
        return {**tree, "rows": rows, "teacher": {"model": str(decoders[family]), "head": "causal_lm"}}

    return recipe


def assert_same_answers(found: Path, expected: Path) -> None:
    """Row by row within TOLERANCE; weights, fingerprints and plan to the bit."""
    stores = [Store.open(path) for path in (found, expected)]
    infos = [store.manifest.passes["bert"].model_dump(exclude={"made"}) for store in stores]
    assert infos[0] == infos[1]  # with fingerprint of the teacher and checksums of its weights
    rows = np.arange(len(stores[0].rows))
    for spec in stores[1].manifest.passes["bert"].features:
        key = spec.feature.of("bert")
        arrays = [store.read(key, rows) for store in stores]
        for name, values in arrays[1].items():
            np.testing.assert_allclose(arrays[0][name], values, rtol=0, atol=TOLERANCE, err_msg=f"{key} {name}")
    shipped = [{name: content for name, (_, _, content) in files_of(path / "model").items()} for path in (found, expected)]
    differing = {"bert/recipe.yaml", "bert/derived_errors.json", "bert/word_errors.json"}  # the first says how, the others are measured
    assert shipped[0].keys() == shipped[1].keys()
    assert {name for name in shipped[1] if shipped[0][name] != shipped[1][name]} <= differing


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_a_sharded_teacher_makes_the_store_of_one_rank(
    family: str, kind: str, recipe_of: Callable[[str], Tree], write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe, alone, store = write(recipe_of(family)), tmp_path / "alone", tmp_path / "sharded"
    sharding = [f"store={store}", f"sharding.kind={kind}", "sharding.size=2"]
    job = jobs.start(recipe, 2, tmp_path / "said", sharding, replica=2)
    if family not in KINDS[kind]:
        assert job.codes() == [2, 2], job.said()
        assert "tensor parallel" in job.ranks[0].text
        return
    assert job.codes() == [0, 0], job.said()
    assert teacher_dump("run", recipe, f"store={alone}").code == 0
    assert_same_answers(store, alone)
    assert teacher_dump("verify", store).code == 0
