"""LoRA students: only adapters move, sites stay where they were, and what is exported is a plain model that answers as the trained one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from online.batch import dense
from online.capture import Capture
from online.collate import collate
from online.models import LoadedModel, ModelSpec, forward, load_model
from store.features import FeatureKey
from store.reader import Store
from store.strict import parse
from student_train.adapters import LoraSpec, adapt, merge
from student_train.journal import read_journal
from student_train.recipe import TrainRecipe
from student_train.run import run

sys.path.insert(0, str(Path(__file__).parent))
from tiny_answers import gpt2, llama, recipe, write_model, write_rows

LORA = {"rank": 2, "alpha": 3.0}
CONFIGS: dict[str, Any] = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "teacher", llama(), 1)
    write_model(folder / "student", llama(hidden_size=24), 2)
    write_rows(folder)
    return folder


def student(folder: Path, config: PreTrainedConfig) -> LoadedModel:
    return load_model(ModelSpec(model=write_model(folder / "model", config, 3), head="causal_lm"))


def moved(loaded: LoadedModel) -> None:
    """Give the adapters something to add."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.3)


def logits(loaded: LoadedModel, world: Path) -> Tensor:
    with torch.no_grad():
        found = forward(loaded, collate(Store.open(world / "store"), torch.arange(8).numpy())).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_fresh_adapters_change_nothing_and_sites_are_found_behind_them(name: str, world: Path, tmp_path: Path) -> None:
    loaded = student(tmp_path, CONFIGS[name]())
    before = logits(loaded, world)
    said = adapt(loaded, LoraSpec(rank=2))
    assert "linear layers" in said
    assert torch.equal(logits(loaded, world), before)
    moved(loaded)
    keys = frozenset(FeatureKey(site, layer, "all") for site in ("query", "value") for layer in (1, 2))
    batch = collate(Store.open(world / "store"), torch.arange(4).numpy())
    with torch.no_grad(), Capture(loaded, keys | {FeatureKey("hidden", 0, "all")}) as capture:
        forward(loaded, batch)
    with_adapters = capture.features(batch)
    merge(loaded, LoraSpec(rank=2), tmp_path / "adapter")
    with torch.no_grad(), Capture(loaded, keys) as capture:
        forward(loaded, batch)
    for key, value in capture.features(batch).items():
        torch.testing.assert_close(value, dense(with_adapters, key), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_merged_weights_are_those_beside_the_adapters_plus_their_product(name: str, world: Path, tmp_path: Path) -> None:
    loaded = student(tmp_path, CONFIGS[name]())
    spec = LoraSpec(rank=2, alpha=3.0)
    adapt(loaded, spec)
    moved(loaded)
    states = {path: tensor.clone() for path, tensor in loaded.model.state_dict().items()}
    before = logits(loaded, world)
    merge(loaded, spec, tmp_path / "adapter")
    assert not any("lora" in path for path in loaded.model.state_dict())
    torch.testing.assert_close(logits(loaded, world), before, rtol=1e-4, atol=1e-5)
    layer = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}[name]
    added = states[f"{layer}.lora_B.default.weight"].double() @ states[f"{layer}.lora_A.default.weight"].double() * 3 / 2
    expected = states[f"{layer}.base_layer.weight"].double() + (added.T if name == "gpt2" else added)
    torch.testing.assert_close(loaded.model.state_dict()[f"{layer}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # that PeftModel asks transformers for
def test_peft_reads_the_adapters_beside_the_weights_that_they_were_trained_with(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    loaded = student(tmp_path, llama())
    spec = LoraSpec(rank=2, targets=("q_proj", "mlp.down_proj"))
    assert adapt(loaded, spec).startswith("adapters of rank 2 in 4 linear layers")
    moved(loaded)
    before = logits(loaded, world)
    merge(loaded, spec, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = collate(Store.open(world / "store"), torch.arange(8).numpy())
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(
            input_ids=batch.input_ids, attention_mask=batch.mask.long()
        )
    torch.testing.assert_close(found.logits[batch.mask], before[batch.mask], rtol=1e-4, atol=1e-5)


def test_only_adapters_and_what_is_named_train(tmp_path: Path) -> None:
    loaded = student(tmp_path, llama())
    adapt(loaded, LoraSpec(rank=1, targets=("v_proj",), train=("norm",)))
    training = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    pairs = {f"model.layers.{block}.self_attn.v_proj.lora_{part}.default.weight" for block in (0, 1) for part in "AB"}
    assert training == {*pairs, "model.norm.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_prj"]}, r"student.lora.targets: no linear layer of a block ends in 'q_prj'; did you mean 'q_proj'"),
        ({"targets": ["lm_head"]}, "no linear layer of a block ends in 'lm_head'"),
        ({"train": ["nrm"]}, "student.lora.train: no module ends in 'nrm'"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(student(tmp_path, llama()), parse(LoraSpec, {"rank": 1, **options}, "lora"))


def phase(world: Path, output: Path, methods: list[dict[str, Any]], **changes: Any) -> TrainRecipe:  # noqa: ANN401
    lora = {"model": {"model": str(world / "student"), "head": "causal_lm"}, "lora": LORA}
    return recipe(world, output, methods, {"student": lora, **changes})


def test_zero_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora trains on one rank or under DDP"):
        phase(world, tmp_path, [{"name": "lm_loss"}], zero={"stage": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [[{"name": "lm_loss"}, {"name": "lm_kd"}], [{"name": "gkd", "options": {"max_new_tokens": 4}}]],
    ids=["words", "gkd"],
)
def test_a_phase_moves_adapters_alone_and_exports_a_plain_student(methods: list[dict[str, Any]], world: Path, tmp_path: Path) -> None:
    made = phase(world, tmp_path / "out", methods, gradient_norms=1)
    run(made, ("test",))
    folder = tmp_path / "out" / "only"
    before, after = load_file(world / "student" / "model.safetensors"), load_file(folder / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 7
    for name, weight in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in adapters:
            assert torch.equal(after[name], weight), name
            continue
        product = adapters[f"{path}.lora_B.weight"].double() @ adapters[f"{path}.lora_A.weight"].double() * LORA["alpha"] / LORA["rank"]
        assert product.abs().max() > 0
        torch.testing.assert_close(after[name].double(), weight.double() + product, rtol=1e-5, atol=1e-6)
    logs = [line for line in read_journal(folder / "metrics.jsonl") if "gradient/block.1" in line]
    assert logs
    assert all(line["gradient/block.1"] > 0 for line in logs)
    assert not any("gradient/embeddings" in line for line in logs)
    result = json.loads((folder / "result.json").read_text())
    assert result["student"] == load_model(ModelSpec(model=folder / "student", head="causal_lm")).fingerprint
    assert any("adapters of rank 2 in 14 linear layers" in notice for notice in result["notices"])


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from student_train import train as training

    changes = {"trainer": {"save_steps": 2, "save_total_limit": 9}, "steps": 6}
    whole, cut = (phase(world, tmp_path / name, [{"name": "lm_kd"}], **changes) for name in ("whole", "cut"))
    run(whole, ("test",))
    publish = training.DistillationTrainer._publish

    def stopped(self: Any) -> None:  # noqa: ANN401
        publish(self)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.DistillationTrainer, "_publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(cut, ("test",))
    monkeypatch.undo()
    run(cut, ("test",))
    one, other = (load_file(tmp_path / name / "only" / "student" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
