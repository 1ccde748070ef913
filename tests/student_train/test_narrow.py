"""A narrower student holds the first of its source's channels, heads and units; what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    DistilBertConfig,
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
from student_train.blueprint import derived_blueprint
from student_train.init import Start, build, check_start
from student_train.narrow import check_sizes, roles
from student_train.recipe import StudentSpec

_BERT = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36, "pad_token_id": 0}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 6, "bos_token_id": 1, "eos_token_id": 1}
_TYPES = ["sliding_attention", "full_attention"]
_NARROW = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
_GROUPED = {**_NARROW, "num_key_value_heads": 1}

FIRST: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, int]]] = {
    "bert": (lambda: BertConfig(**_BERT), _NARROW),
    "roberta": (lambda: RobertaConfig(**_BERT), _NARROW),
    "xlm-roberta": (lambda: AutoConfig.for_model("xlm-roberta", **_BERT), _NARROW),
    "distilbert": (
        lambda: DistilBertConfig(vocab_size=40, dim=24, n_layers=2, n_heads=4, hidden_dim=36),
        {"hidden_size": 12, "n_heads": 2, "hidden_dim": 20},
    ),
    "modernbert": (lambda: ModernBertConfig(**_BERT, local_attention=6, layer_types=_TYPES), _NARROW),
    "gpt2": (
        lambda: GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
        {"hidden_size": 12, "num_attention_heads": 2},
    ),
    "llama": (lambda: LlamaConfig(**_LLAMA), _GROUPED),
    "mistral": (lambda: MistralConfig(**_LLAMA, sliding_window=4), _GROUPED),
    "qwen2": (lambda: Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1), _GROUPED),
    "qwen3": (lambda: Qwen3Config(**_LLAMA, tie_word_embeddings=True), _GROUPED),
    "gemma": (lambda: GemmaConfig(**_LLAMA), _GROUPED),
    "gemma2": (lambda: Gemma2Config(**_LLAMA, sliding_window=4, layer_types=_TYPES), _GROUPED),
    "gemma3_text": (lambda: Gemma3TextConfig(**_LLAMA, sliding_window=4, layer_types=_TYPES), _GROUPED),
}
"""Family -> its configuration and a width; every head keeps its 6 elements."""

_PARTS = {"attn.Wqkv.": 3, "attn.c_attn.": 3, "mlp.Wi.": 2}
"""Layers that hold so many matrices one after the other."""
Teacher = Callable[..., tuple[PreTrainedModel, Source]]
NO_TASK = Task(kind="none")


@pytest.fixture
def teacher(tmp_path: Path, stores: ModuleType) -> Teacher:
    """``teacher(config, head)``: a model with noise on every weight, and its folder."""

    def make(config: PreTrainedConfig, head: Head) -> tuple[PreTrainedModel, Source]:
        model = HEADS[head].from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(tmp_path / "teacher")
        stores.tokenizer().save_pretrained(tmp_path / "teacher")
        return model, Source(tmp_path / "teacher", head)

    return make


def start(source: Source, task: Task = NO_TASK, **spec: object) -> Start:
    blueprint = derived_blueprint(StudentSpec.model_validate(spec), source, load_config(source.folder), task)
    check_start(blueprint)
    return build(blueprint, 0)


def first(name: str, wide: Tensor, shape: torch.Size) -> Tensor:
    """The leading rows and columns of each matrix that ``wide`` holds; heads follow one another, so the first ones lead."""
    number = next((number for part, number in _PARTS.items() if part in name), 1)
    axis = 1 if "c_attn.weight" in name else 0
    pieces = [piece[tuple(slice(0, size // (number if at == axis else 1)) for at, size in enumerate(shape))]
              for piece in wide.chunk(number, axis)]  # fmt: skip
    return torch.cat(pieces, axis)


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", FIRST)
def test_the_first_channels_heads_and_units_are_taken(family: str, head: str, teacher: Teacher) -> None:
    kind = ("causal_lm" if FAMILIES[family].causal else "masked_lm") if head == "lm" else head
    make, width = FIRST[family]
    model, source = teacher(make(), kind)
    made = start(source, width=width)
    shape = made.student.shape
    assert (shape.layers, shape.width, shape.heads, shape.head_width) == (2, 12, 2, 6)
    assert shape.kv_heads == width.get("num_key_value_heads", 2)
    wide = model.state_dict()
    for name, weight in made.student.model.state_dict().items():
        assert torch.equal(weight, first(name, wide[name], weight.shape)), name
    cut = [name for name, weight in made.student.model.state_dict().items() if weight.shape != wide[name].shape]
    assert len(cut) > 15
    assert any("truncated width" in notice for notice in made.notices)
    words = torch.randint(5, 40, (2, 7))
    assert all(torch.isfinite(made.student.model(input_ids=words)[0]).flatten())


def test_a_width_goes_with_chosen_blocks(teacher: Teacher) -> None:
    model, source = teacher(BertConfig(**{**_BERT, "num_hidden_layers": 4}), "base")
    made = start(source, layers=[4, 2], width=_NARROW).student
    assert made.shape.layers == 2
    name = "encoder.layer.{}.intermediate.dense.weight"
    for mine, theirs in ((0, 3), (1, 1)):
        assert torch.equal(made.model.state_dict()[name.format(mine)], model.state_dict()[name.format(theirs)][:20, :12])


def test_heads_of_learned_positions_may_shrink_to_their_first_elements(teacher: Teacher) -> None:
    model, source = teacher(BertConfig(**_BERT), "base")
    made = start(source, width={"hidden_size": 16}).student
    assert (made.shape.heads, made.shape.head_width) == (4, 4)
    rows = [head * 6 + element for head in range(4) for element in range(4)]
    for part in ("query", "key", "value"):
        name = f"encoder.layer.1.attention.self.{part}"
        assert torch.equal(made.model.state_dict()[f"{name}.weight"], model.state_dict()[f"{name}.weight"][rows][:, :16])
        assert torch.equal(made.model.state_dict()[f"{name}.bias"], model.state_dict()[f"{name}.bias"][rows])
    name = "encoder.layer.1.attention.output.dense.weight"
    assert torch.equal(made.model.state_dict()[name], model.state_dict()[name][:16][:, rows])


def test_every_group_may_keep_the_first_of_its_query_heads(teacher: Teacher) -> None:
    model, source = teacher(LlamaConfig(**{**_LLAMA, "num_attention_heads": 8}), "causal_lm")
    made = start(source, width={"num_attention_heads": 4}).student
    assert (made.shape.heads, made.shape.kv_heads) == (4, 2)
    rows = [head * 6 + element for head in (0, 1, 4, 5) for element in range(6)]
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert torch.equal(made.model.state_dict()[name.format("q")], model.state_dict()[name.format("q")][rows])
    assert torch.equal(made.model.state_dict()[name.format("o")], model.state_dict()[name.format("o")][:, rows])
    for part in "kv":
        assert torch.equal(made.model.state_dict()[name.format(part)], model.state_dict()[name.format(part)])


def test_without_units_given_gpt2_has_four_for_each_channel(teacher: Teacher) -> None:
    _, source = teacher(FIRST["gpt2"][0](), "causal_lm")
    assert start(source, width=FIRST["gpt2"][1]).student.model.transformer.h[0].mlp.c_fc.weight.shape == (12, 48)
    model, source = teacher(GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=4, n_inner=30, bos_token_id=1), "causal_lm")
    made = start(source, width={"n_inner": 10}).student.model
    assert torch.equal(made.transformer.h[0].mlp.c_proj.weight, model.transformer.h[0].mlp.c_proj.weight[:10])


def test_a_new_head_of_a_narrow_student_starts_fresh(teacher: Teacher) -> None:
    _, source = teacher(BertConfig(**_BERT), "masked_lm")
    made = start(source, Task(kind="classification", classes=("a", "b", "c")), width=_NARROW, head="classification")
    assert made.student.model.classifier.weight.shape == (3, 12)
    assert [notice.split()[0] for notice in made.notices] == ["bert.pooler.dense", "classifier", "weights"]


@pytest.mark.parametrize(
    ("family", "width", "message"),
    [
        ("bert", {"hidden_sise": 12}, "student.width: unknown option 'hidden_sise' of bert; did you mean 'hidden_size'"),
        ("bert", {"vocab_size": 12}, "expected some of hidden_size, num_attention_heads, intermediate_size, found vocab_size"),
        ("bert", {"hidden_size": 48}, "hidden_size can only shrink, found 24 -> 48"),
        ("bert", {"intermediate_size": 37}, "intermediate_size can only shrink, found 36 -> 37"),
        ("bert", {"num_attention_heads": 2}, r"the width of a head can only shrink, found 6 -> 12 \(give fewer num_attention_heads\)"),
        ("bert", {"hidden_size": 10}, "hidden_size 10 is no multiple of num_attention_heads 4"),
        ("modernbert", {"hidden_size": 16}, "rotary embeddings turn fixed pairs.*so that hidden_size / num_attention_heads stays 6"),
        ("llama", {"head_dim": 4}, "rotary embeddings turn fixed pairs"),
        ("llama", {"num_key_value_heads": 1}, "serve 2 query heads each, so 4 num_attention_heads cannot share 1"),
        ("llama", {"num_attention_heads": 3}, "so 3 num_attention_heads cannot share 2 num_key_value_heads: give both"),
    ],
)
def test_widths_that_cannot_be_cut_are_refused(family: str, width: dict[str, int], message: str, teacher: Teacher) -> None:
    _, source = teacher(FIRST[family][0](), "base")
    with pytest.raises(ValueError, match=message):
        derived_blueprint(StudentSpec(width=width), source, load_config(source.folder), NO_TASK)


def test_importance_must_tell_units_from_channels_and_heads_from_each_other(teacher: Teacher) -> None:
    wide = BertConfig(**{**_BERT, "intermediate_size": 24})
    with pytest.raises(ValueError, match="the same numbers"):
        check_sizes(wide, BertConfig(**{**_BERT, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 12}), important=True)
    with pytest.raises(ValueError, match="importance keeps or drops whole heads"):
        check_sizes(BertConfig(**_BERT), BertConfig(**{**_BERT, "hidden_size": 12}), important=True)


def test_bottlenecks_are_refused(teacher: Teacher) -> None:
    _, source = teacher(MobileBertConfig(**_BERT, embedding_size=6, intra_bottleneck_size=8), "base")
    with pytest.raises(ValueError, match="mobilebert has bottlenecks"):
        derived_blueprint(StudentSpec(width={"intermediate_size": 20}), source, load_config(source.folder), NO_TASK)


def test_an_axis_that_nothing_explains_is_refused_by_name() -> None:
    with torch.device("meta"):
        wide, narrow = (HEADS["base"].from_config(BertConfig(**_BERT, max_position_embeddings=size)) for size in (32, 16))
    with pytest.raises(ValueError, match=r"embeddings\.position_embeddings\.weight would have 16 instead of 32"):
        roles(wide, narrow)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"width": {"hidden_size": 0}}, "greater than or equal to 1"),
        ({"width": {}}, "at least 1 item"),
        ({"width": {"hidden_size": 8}, "phase": "a"}, "given: phase, width"),
        ({"layers": "first 1", "width_by": "importance"}, "give width"),
        ({"layers": {"keep": 1}}, "by"),
        ({"layers": {"keep": 1, "by": "magic"}}, "importance"),
    ],
)
def test_contradictions_in_a_recipe_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentSpec.model_validate(spec)
