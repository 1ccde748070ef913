"""Students whose blocks are random while embeddings and head are the source's: MobileBERT's start."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn
from transformers import BertConfig, LlamaConfig, MobileBertConfig, ModernBertConfig, PreTrainedConfig, PreTrainedModel

from online.families import FAMILIES
from online.models import HEADS, load_config
from store.manifest import Task
from store.shape import Head
from student_train.blocks import Source
from student_train.blueprint import derived_blueprint
from student_train.init import Start, build, check_start
from student_train.needs import needs
from student_train.recipe import StudentSpec, TrainRecipe

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES),
    "modernbert": lambda: ModernBertConfig(**SIZES, local_attention=6),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=1),
    "mobilebert": lambda: MobileBertConfig(
        **SIZES, embedding_size=6, intra_bottleneck_size=32, normalization_type="layer_norm", num_feedforward_networks=1
    ),
}
THIN = {"intra_bottleneck_size": 8, "intermediate_size": 12, "normalization_type": "no_norm", "num_feedforward_networks": 2}
NO_TASK = Task(kind="none")
Teacher = Callable[..., tuple[PreTrainedModel, Source]]


@pytest.fixture
def teacher(tmp_path: Path, stores: ModuleType) -> Teacher:
    """``teacher(family, head)``: a random model with noise on every weight, and its folder."""

    def make(family: str, head: Head) -> tuple[PreTrainedModel, Source]:
        torch.manual_seed(1)
        model = HEADS[head].from_config(CONFIGS[family]())
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(tmp_path / "teacher")
        stores.tokenizer().save_pretrained(tmp_path / "teacher")
        return model, Source(tmp_path / "teacher", head)

    return make


def start(source: Source, changes: dict[str, object], seed: int = 0, task: Task = NO_TASK, **spec: object) -> Start:
    student = StudentSpec.model_validate({"random": changes, "rest": "source", **spec})
    blueprint = derived_blueprint(student, source, load_config(source.folder), task)
    check_start(blueprint)
    return build(blueprint, seed)


def in_block(family: str, name: str) -> bool:
    return FAMILIES[family].block.removesuffix("{i}") in name


@pytest.mark.parametrize(("family", "head"), [("bert", "masked_lm"), ("bert", "base"), ("modernbert", "masked_lm"), ("llama", "causal_lm")])
def test_all_but_the_blocks_is_the_sources(family: str, head: Head, teacher: Teacher) -> None:
    model, source = teacher(family, head)
    made, again, other = (start(source, {"num_hidden_layers": 2, "intermediate_size": 12}, seed) for seed in (0, 0, 1))
    assert made.notices == ()
    assert made.fingerprint == again.fingerprint != other.fingerprint
    expected, found = model.state_dict(), made.student.model.state_dict()
    outside = [name for name in found if not in_block(family, name)]
    assert set(outside) == {name for name in expected if not in_block(family, name)}
    for name in outside:
        assert torch.equal(found[name], expected[name]), name
    assert made.student.shape.layers == 2
    for name, module in made.student.model.named_modules():
        if in_block(family, name) and isinstance(module, nn.Linear):
            assert 0.005 < float(module.weight.detach().std()) < 0.03, name
            assert module.bias is None or not module.bias.any()
        if in_block(family, name) and "norm" in type(module).__name__.lower():
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name


def test_a_norm_of_another_kind_is_not_taken_over(teacher: Teacher) -> None:
    model, source = teacher("mobilebert", "masked_lm")
    made = start(source, THIN)
    found, expected = made.student.model.state_dict(), model.state_dict()
    norm = "mobilebert.embeddings.LayerNorm"
    assert [notice.partition(" starts")[0] for notice in made.notices] == [norm]
    assert torch.equal(found[f"{norm}.weight"], torch.ones(16))
    assert not found[f"{norm}.bias"].any()
    taken = [name for name in found if not in_block("mobilebert", name) and not name.startswith(norm)]
    assert {"cls.predictions.dense.weight", "mobilebert.embeddings.embedding_transformation.weight"} < set(taken)
    assert all(torch.equal(found[name], expected[name]) for name in taken)
    same = start(source, {"intra_bottleneck_size": 8})
    assert same.notices == ()
    assert torch.equal(same.student.model.state_dict()[f"{norm}.weight"], expected[f"{norm}.weight"])


def test_a_new_head_is_random(teacher: Teacher) -> None:
    model, source = teacher("bert", "masked_lm")
    made = start(source, {}, head="classification", task=Task(kind="classification", classes=("a", "b")))
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(made.student.model.state_dict()[words], model.state_dict()[words])
    assert [notice.partition(" starts")[0] for notice in made.notices] == ["bert.pooler.dense", "classifier"]


def test_what_cannot_be_taken_over_is_refused(teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm")
    with pytest.raises(ValueError, match=r"lacks weights that the student needs, or has them in other sizes: embeddings\.LayerNorm\.bias"):
        start(source, {"hidden_size": 8})
    (source.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; expected the safetensors files of a whole model"):
        start(source, {})
    shipped = Source(source.folder, "masked_lm", "bert")
    with pytest.raises(ValueError, match=r"dump pass bert with 'ship_layers: \[1\]', or give the teacher's folder as student.source"):
        start(shipped, {})
    with pytest.raises(ValueError, match="rest says what becomes of embeddings and head beside random blocks: give random"):
        StudentSpec.model_validate({"layers": [1], "rest": "source"})


def test_a_dump_is_told_to_ship_what_the_student_starts_from(stores: ModuleType, tmp_path: Path) -> None:
    teacher = stores.write_teacher(tmp_path / "teacher", "classification")
    phase = {
        "name": "p", "student": {"random": {}, "rest": "source"}, "data": [{"store": str(tmp_path / "store"), "pass_name": "tiny"}],
        "methods": [{"name": "kd"}], "steps": 1,
    }  # fmt: skip
    recipe = TrainRecipe.model_validate({"output": str(tmp_path / "out"), "phases": [phase]})
    assert yaml.safe_load(needs([recipe], {"": teacher}))["ship_layers"] == [1]
