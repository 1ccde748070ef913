"""Where a student's first weights come from: every family tensor by tensor, heads, widths, and what is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MobileBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from online.families import FAMILIES
from online.models import HEADS, load_config
from store.manifest import Task
from store.shape import Head
from student_train.blocks import Source
from student_train.blueprint import chosen_blocks, continued_blueprint, derived_blueprint, folder_blueprint
from student_train.init import Start, build
from student_train.recipe import StudentSpec

_BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 10, "bos_token_id": 1, "eos_token_id": 1}
_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=6),
    "roberta": lambda: RobertaConfig(**_BERT),
    "xlm-roberta": lambda: AutoConfig.for_model("xlm-roberta", **_BERT),
    "distilbert": lambda: DistilBertConfig(vocab_size=40, dim=16, n_layers=4, n_heads=2, hidden_dim=24),
    "mobilebert": lambda: MobileBertConfig(**_BERT, embedding_size=6, intra_bottleneck_size=8),
    "modernbert": lambda: ModernBertConfig(**_BERT, local_attention=6, layer_types=_TYPES),
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=1),
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**{**_LLAMA, "head_dim": 8}, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "qwen3": lambda: Qwen3Config(**_LLAMA, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_LLAMA),
    "gemma2": lambda: Gemma2Config(**_LLAMA, sliding_window=4, layer_types=_TYPES),
    "gemma3_text": lambda: Gemma3TextConfig(**_LLAMA, sliding_window=4, layer_types=_TYPES),
}
Teacher = Callable[..., tuple[PreTrainedModel, Source]]
NO_TASK = Task(kind="none")


@pytest.fixture
def teacher(tmp_path: Path, stores: ModuleType) -> Teacher:
    """``teacher(family, head)``: a random model with noise on every weight, and its folder."""

    def make(family: str, head: Head, **saving: str) -> tuple[PreTrainedModel, Source]:
        torch.manual_seed(1)
        model = HEADS[head].from_config(CONFIGS[family]())
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(tmp_path / "teacher", **saving)
        stores.tokenizer().save_pretrained(tmp_path / "teacher")
        return model, Source(tmp_path / "teacher", head)

    return make


def start(source: Source, seed: int = 0, task: Task = NO_TASK, **spec: object) -> Start:
    return build(derived_blueprint(StudentSpec.model_validate(spec), source, load_config(source.folder), task), seed)


@pytest.mark.parametrize("head", ["lm", "classification", "base"])
@pytest.mark.parametrize("family", CONFIGS)
def test_chosen_blocks_are_the_teachers_tensor_by_tensor(family: str, head: str, teacher: Teacher) -> None:
    assert CONFIGS.keys() == FAMILIES.keys()
    kind = ("causal_lm" if FAMILIES[family].causal else "masked_lm") if head == "lm" else head
    model, source = teacher(family, kind)
    student = start(source, layers=[1, 4, 3]).student
    assert student.shape.layers == 3
    expected = model.state_dict()
    prefix = FAMILIES[family].block.removesuffix("{i}")
    taken_over = set()
    for name, weight in student.model.state_dict().items():
        original = name
        for mine, theirs in ((0, 0), (1, 3), (2, 2)):
            if f"{prefix}{mine}." in name:
                original = name.replace(f"{prefix}{mine}.", f"{prefix}{theirs}.")
        assert torch.equal(weight, expected[original]), name
        taken_over.add(original)
    assert {name for name in expected.keys() - taken_over if f"{prefix}1." not in name} == set()
    if hasattr(student.model.config, "layer_types"):
        types = model.config.layer_types
        assert student.model.config.layer_types == [types[0], types[3], types[2]]
    assert student.shape.windows == tuple(FAMILIES[family].windows(model.config)[block] for block in (0, 3, 2))


def test_a_norm_without_a_place_is_named(teacher: Teacher) -> None:
    _, source = teacher("modernbert", "masked_lm")
    made = start(source, layers=[2, 1])
    assert any("layers.0.attn_norm.weight" in notice for notice in made.notices), "block 1 of the student has no norm to take"
    assert any("layers.1.attn_norm starts from random weights" in notice for notice in made.notices)


def test_words_for_blocks() -> None:
    assert chosen_blocks("every 2", 6) == (2, 4, 6)
    assert chosen_blocks("every 4", 6) == (4,)
    assert chosen_blocks("first 3", 6) == (1, 2, 3)
    for layers in ("first 7", "every 7", (0,), (7,), (-1,)):
        with pytest.raises(ValueError, match="the source has blocks 1 to 6, found"):
            chosen_blocks(layers, 6)


def test_sharded_checkpoints_are_read_and_other_blocks_are_not(teacher: Teacher) -> None:
    model, source = teacher("bert", "masked_lm", max_shard_size="8KB")
    index = json.loads((source.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    student = start(source, layers=[2]).student.model.state_dict()
    assert torch.equal(student["bert.encoder.layer.0.output.dense.weight"], model.state_dict()["bert.encoder.layer.1.output.dense.weight"])
    for name in set(index.values()):  # NaN in blocks that nobody asked for reaches nothing
        tensors = load_file(source.folder / name)
        save_file({key: tensor * torch.nan if ".layer.3." in key else tensor for key, tensor in tensors.items()}, source.folder / name)
    again = start(source, layers=[2]).student.model.state_dict()
    assert all(torch.equal(student[name], again[name]) for name in student)


def test_an_index_cannot_lead_out_of_its_folder(teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm", max_shard_size="8KB")
    index = source.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        start(source, layers=[1])
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        start(source, layers=[1])


def test_a_new_head_starts_fresh_from_the_seed_and_is_said(teacher: Teacher) -> None:
    model, source = teacher("bert", "masked_lm")
    task = Task(kind="classification", classes=("no", "maybe", "yes"))
    first, second, other = (start(source, seed, task, layers=[1], head="classification") for seed in (0, 0, 1))
    assert first.student.shape.labels == 3
    assert first.student.model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert [notice.split()[0] for notice in first.notices] == ["bert.pooler.dense", "classifier"]
    weights = [made.student.model.state_dict() for made in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])
    assert torch.equal(
        weights[0]["bert.encoder.layer.0.output.dense.weight"], model.state_dict()["bert.encoder.layer.0.output.dense.weight"]
    )
    with pytest.raises(ValueError, match=r"give student\.labels"):
        start(source, layers=[1], head="classification")
    with pytest.raises(ValueError, match="has no head 'causal_lm'"):
        start(source, layers=[1], head="causal_lm")


def test_a_head_of_another_size_starts_fresh(teacher: Teacher) -> None:
    _, source = teacher("bert", "classification")
    made = start(source, layers=[1], labels=5)
    assert made.student.model.classifier.weight.shape == (5, 16)
    assert len(made.notices) == 1


def test_half_precision_weights_become_the_students_type(teacher: Teacher) -> None:
    model, source = teacher("bert", "base")
    model.half().save_pretrained(source.folder)
    assert start(source, layers=[1]).student.model.dtype == torch.float32
    assert start(source, layers=[1], dtype="bfloat16").student.model.dtype == torch.bfloat16


def test_random_students_may_be_smaller_and_follow_from_the_seed(teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm")
    changes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12}
    first, second, other = (start(source, seed, random=changes).student for seed in (0, 0, 1))
    assert (first.shape.layers, first.shape.width, first.shape.head) == (2, 8, "masked_lm")
    weights = [made.model.state_dict() for made in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


@pytest.mark.parametrize(
    ("family", "changes"), [("gpt2", {"num_hidden_layers": 2, "hidden_size": 8}), ("gemma3_text", {"num_hidden_layers": 2})]
)
def test_options_go_by_their_common_names_and_lists_follow_the_depth(family: str, changes: dict[str, Any], teacher: Teacher) -> None:
    _, source = teacher(family, "causal_lm")
    assert start(source, random=changes).student.shape.layers == 2
    assert start(source, random={"num_hidden_layers": 6}).student.shape.layers == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hiden_layers": 2}, "did you mean 'num_hidden_layers'"),
        ({"hidden_size": 15}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "student"),
        ({"model_type": "gpt2"}, "unknown option 'model_type'"),
    ],
)
def test_sizes_that_do_not_fit_are_one_message(changes: dict[str, Any], message: str, teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm")
    with pytest.raises(ValueError, match=message):
        start(source, random=changes)


def test_making_a_student_leaves_the_generator_as_it_was(teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm")
    before = torch.get_rng_state()
    start(source, random={})
    start(source, layers=[1], head="classification", labels=2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_is_taken_as_it_is(teacher: Teacher) -> None:
    model, source = teacher("bert", "classification")
    spec = StudentSpec.model_validate({"model": {"model": source.folder, "head": "classification"}})
    made = build(folder_blueprint(spec, NO_TASK), 0)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in made.student.model.state_dict().items())


def test_a_block_taken_twice_becomes_two(teacher: Teacher) -> None:
    _, source = teacher("bert", "base")
    blocks = start(source, layers=[2, 2]).student.model.encoder.layer
    for one, other in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_an_earlier_student_goes_on_with_another_head(teacher: Teacher, stores: ModuleType, tmp_path: Path) -> None:
    _, source = teacher("bert", "masked_lm")
    first = derived_blueprint(StudentSpec(layers=(1, 2)), source, load_config(source.folder), NO_TASK)
    made = build(first, 0).student
    folder = tmp_path / "first" / "student"
    made.model.save_pretrained(folder)
    stores.tokenizer().save_pretrained(folder)
    same = build(continued_blueprint(StudentSpec(phase="first"), first, folder, NO_TASK), 0)
    assert same.notices == ()
    assert same.student.fingerprint == made.fingerprint
    other = continued_blueprint(StudentSpec(phase="first", head="classification", labels=3), first, folder, NO_TASK)
    assert (other.shape.labels, other.tokenizer) == (3, first.tokenizer)
    weights = build(other, 0).student.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.model.state_dict().items() if ".layer." in name)


def test_what_a_folder_lacks_is_said_with_what_mends_it(teacher: Teacher) -> None:
    _, source = teacher("bert", "masked_lm")
    file = source.folder / "model.safetensors"
    weights = load_file(file)
    shipped = Source(source.folder, source.head, "tiny")

    save_file({name: tensor for name, tensor in weights.items() if ".layer.2." not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights of block 3; dump pass tiny with 'ship_layers: \[1, 3\]'"):
        start(shipped, layers=[1, 3])
    save_file({name: tensor for name, tensor in weights.items() if "word_embeddings" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights that the student needs.*word_embeddings"):
        start(source, layers=[1])
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        start(source, layers=[1])
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; dump pass tiny"):
        start(shipped, layers=[1])
