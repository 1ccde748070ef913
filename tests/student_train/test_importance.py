"""What a store's pass says matters: scores against loops in float64, and dead parts of teachers that leave without a trace."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig, ModernBertConfig, PreTrainedConfig, PreTrainedModel

from online.models import HEADS, LoadedModel, load_config, model_shape
from store.manifest import Task
from store.reader import Store
from store.shape import Head
from student_train import importance
from student_train.blocks import Source
from student_train.blueprint import derived_blueprint
from student_train.importance import Look, block_influence, channel_scores, chosen_by_influence, head_scores, unit_scores
from student_train.init import build
from student_train.narrow import roles
from student_train.recipe import StudentSpec
from teacher_dump.dump import dump
from teacher_dump.recipe import DumpRecipe

_SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "pad_token_id": 0, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
_LLAMA = {**_SMALL, "num_key_value_heads": 1, "head_dim": 6, "rms_norm_eps": 1e-12, "bos_token_id": 1, "eos_token_id": 1}
_TYPES = ["sliding_attention", "full_attention"]

Index = Mapping[str, Tensor]
"""Letter -> what it numbers in the wide model: D channels, Q and K elements of query and key heads, U units."""

_LINEAR: dict[str, dict[str, str]] = {
    "bert": {
        r"_embeddings\.weight": "*D", r"self\.(query|key|value)\.weight": "QD", r"self\.(query|key|value)\.bias": "Q",
        r"attention\.output\.dense\.weight": "DQ", r"intermediate\.dense\.weight": "UD", r"intermediate\.dense\.bias": "U",
        r"\d\.output\.dense\.weight": "DU", r"pooler\.dense\.weight": "DD", r"classifier\.weight": "*D", r"classifier\.bias": "*",
    },
    "modernbert": {
        r"tok_embeddings\.weight": "*D", r"Wqkv\.weight": "(QQQ)D", r"attn\.Wo\.weight": "DQ", r"Wi\.weight": "(UU)D",
        r"mlp\.Wo\.weight": "DU",
    },
    "gpt2": {
        r"(wte|wpe|lm_head)\.weight": "*D", r"c_attn\.weight": "D(QQQ)", r"c_attn\.bias": "(QQQ)", r"attn\.c_proj\.weight": "QD",
        r"c_fc\.weight": "DU", r"c_fc\.bias": "U", r"mlp\.c_proj\.weight": "UD",
    },
    "llama": {
        r"(embed_tokens|lm_head)\.weight": "*D", r"q_proj\.weight": "QD", r"(k|v)_proj\.weight": "KD", r"o_proj\.weight": "DQ",
        r"(gate|up)_proj\.weight": "UD", r"down_proj\.weight": "DU",
    },
}  # fmt: skip
"""What the axes of weights run over, from the papers' figures; those that are not named run over channels."""

_WRITES = r"embeddings\.weight|wte|wpe|lm_head|embed_tokens|output\.dense|Wo\.|c_proj"
"""Weights that add to the hidden state."""
WIDE: dict[str, tuple[PreTrainedConfig, dict[str, int], Head]] = {
    "bert": (BertConfig(**_SMALL), {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36}, "classification"),
    "modernbert": (
        ModernBertConfig(**_SMALL, local_attention=6, layer_types=_TYPES, norm_eps=1e-12),
        {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36},
        "base",
    ),
    "gpt2": (
        GPT2Config(vocab_size=40, n_embd=12, n_layer=2, n_head=2, n_inner=20, layer_norm_epsilon=1e-12, bos_token_id=1, eos_token_id=1),
        {"n_embd": 24, "n_head": 4, "n_inner": 36},
        "causal_lm",
    ),
    "llama": (
        LlamaConfig(**_LLAMA),
        {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36},
        "causal_lm",
    ),
}
NO_TASK = Task(kind="none")


def axes(family: str, name: str) -> list[str]:
    """The letters of each axis of a weight."""
    found = next((letters for pattern, letters in _LINEAR[family].items() if re.search(pattern, name)), "D")
    return [part.strip("()") for part in re.findall(r"\(\w+\)|.", found)]


def narrow_model(family: str) -> PreTrainedModel:
    """A random model whose hidden states have mean zero in front of every layer norm."""
    config, _, head = WIDE[family]
    model = HEADS[head].from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
            letters = axes(family, name)
            if family != "llama" and re.search(_WRITES, name) and "D" in letters:
                weight.sub_(weight.mean(letters.index("D"), keepdim=True))
            if "LayerNorm" in name or "embeddings.norm" in name:  # writes to the hidden state itself
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def widened(narrow: PreTrainedModel, family: str, indices: list[Index]) -> PreTrainedModel:
    """A wide model that holds ``narrow``'s weights at ``indices`` of each block, and zeros elsewhere."""
    config, changes, head = WIDE[family]
    wide = HEADS[head].from_config(type(config).from_dict({**config.to_dict(), **changes})).eval()
    weights = {}
    for name, weight in wide.state_dict().items():
        block = re.search(r"(?:layer|layers|h)\.(\d)\.", name)
        index, small = indices[int(block[1]) if block else 0], narrow.state_dict()[name]
        places = []
        for axis, letters in enumerate(axes(family, name)):
            length = weight.shape[axis] // len(letters)
            numbers = [torch.arange(length) if letter == "*" else index[letter] for letter in letters]
            places.append(torch.cat([part * length + number for part, number in enumerate(numbers)]))
        grid = torch.meshgrid(*places, indexing="ij")
        weights[name] = torch.zeros_like(weight).index_put(grid, small)
    wide.load_state_dict(weights)
    return wide


def scattered(family: str) -> list[Index]:
    """Channels, heads (of llama whole groups) and units here and there, other ones in each block."""
    channels = torch.tensor([1, 2, 5, 8, 9, 11, 14, 16, 17, 20, 22, 23])
    found = []
    for block in range(2):
        heads = ([2, 3], [0, 1])[block] if family == "llama" else ([1, 3], [0, 2])[block]
        query = torch.tensor([head * 6 + element for head in heads for element in range(6)])
        key = torch.arange(6) + 6 * (heads[0] // 2) if family == "llama" else query
        found.append({"D": channels, "Q": query, "K": key, "U": torch.randperm(36)[:20].sort().values})
    return found


def leading() -> list[Index]:
    one = {"D": torch.arange(12), "Q": torch.arange(12), "K": torch.arange(6), "U": torch.arange(20)}
    return [one, one]


def assert_same_answers(student: PreTrainedModel, teacher: PreTrainedModel, channels: Tensor | None = None) -> None:
    """Logits, or what the last norm leaves in ``channels``, are the same."""
    words = torch.tensor([[2, 9, 17, 25, 3], [2, 30, 11, 8, 39]])
    with torch.no_grad():
        found, expected = student.double()(input_ids=words)[0], teacher.double()(input_ids=words)[0]
    if found.shape != expected.shape:
        assert channels is not None
        expected = expected[..., channels]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def with_norms_of_width(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """``model`` with the output of norms over channels times ``factor``: over fewer channels the same numbers have a larger mean square."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(r"norm.*weight|LayerNorm.weight|ln_\w+\.weight", name):
                weight.mul_(factor)
    return model


def saved(model: PreTrainedModel, folder: Path, stores: ModuleType) -> Path:
    model.save_pretrained(folder)
    stores.tokenizer().save_pretrained(folder)
    return folder


def answered(folder: Path, teacher: Path, head: Head, features: list[str], stores: ModuleType, **rows: object) -> Path:
    """A store with the pass ``tiny`` of ``teacher``."""
    text, _ = stores.write_text(folder)
    recipe = {
        "store": folder / "store", "pass_name": "tiny", "teacher": {"model": teacher, "head": head}, "features": features, "device": "cpu",
        "rows": {"sources": [{"files": [str(text)]}], "max_length": 16, "slot_tokens": 256, **rows}, "ship_layers": "all",
    }  # fmt: skip
    dump(DumpRecipe.model_validate(recipe), ("tests",))
    return folder / "store"


@pytest.mark.parametrize("family", WIDE)
def test_a_truncation_answers_as_its_teacher_where_that_has_zeros_beyond(family: str, tmp_path: Path, stores: ModuleType) -> None:
    narrow = narrow_model(family)
    teacher = widened(narrow, family, leading())
    config, changes, head = WIDE[family]
    folder = saved(teacher, tmp_path / "teacher", stores)
    width = {name: getattr(config, name) for name in changes}
    made = build(derived_blueprint(StudentSpec(width=width), Source(folder, head), load_config(folder), NO_TASK), 0).student.model
    assert all(torch.equal(weight, narrow.state_dict()[name]) for name, weight in made.state_dict().items())
    assert_same_answers(with_norms_of_width(made, 2**0.5), teacher, torch.arange(12))


@pytest.mark.parametrize("family", WIDE)
def test_dead_channels_heads_and_units_leave_without_a_trace(family: str, tmp_path: Path, stores: ModuleType) -> None:
    indices = scattered(family)
    teacher = widened(narrow_model(family), family, indices)
    config, changes, head = WIDE[family]
    folder = saved(teacher, tmp_path / "teacher", stores)
    spec = StudentSpec(width={name: getattr(config, name) for name in changes}, width_by="importance")
    source, wide = Source(folder, head), load_config(folder)
    look = Look(tmp_path / "store", "tiny", "train", None, model_shape(wide, head))
    blueprint = derived_blueprint(spec, source, wide, NO_TASK, look)
    assert {str(key) for key in blueprint.reads} == {"final@all", "input.1@all", "input.2@all", "value.1@all", "value.2@all"}
    labels = {"label": {"column": "label", "classes": ["negative", "positive"]}} if head == "classification" else {}
    answered(tmp_path, folder, head, sorted(map(str, blueprint.reads)), stores, **labels)
    start = build(blueprint, 0)
    assert "the most important stay" in start.notices[-1]
    assert_same_answers(with_norms_of_width(start.student.model, 2**0.5), teacher, indices[0]["D"])


def test_of_each_group_the_heads_that_write_most_stay(tmp_path: Path, stores: ModuleType) -> None:
    config = LlamaConfig(**{**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2})
    teacher = HEADS["causal_lm"].from_config(config).eval()
    alive = ([1, 2], [0, 3])
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        for block, heads in zip(teacher.model.layers, alive, strict=True):
            for head in set(range(4)) - set(heads):
                block.self_attn.o_proj.weight[:, head * 6 : head * 6 + 6] = 0  # its value vectors are those of a living head
    folder = saved(teacher, tmp_path / "teacher", stores)
    answered(tmp_path, folder, "causal_lm", ["value.1@all", "value.2@all"], stores)
    look = Look(tmp_path / "store", "tiny", "train", None, model_shape(config, "causal_lm"))
    spec = StudentSpec(width={"num_attention_heads": 2}, width_by="importance")
    made = build(derived_blueprint(spec, Source(folder, "causal_lm"), load_config(folder), NO_TASK, look), 0).student.model
    assert_same_answers(made, teacher)


# Scores


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, stores: ModuleType) -> tuple[Look, PreTrainedModel]:
    """Where a random llama of three blocks answered, and the model itself."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**{**_LLAMA, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2})
    torch.manual_seed(7)
    teacher = HEADS["causal_lm"].from_config(config).eval()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        for scale, block in zip((1.0, 0.01, 0.5), teacher.model.layers, strict=True):  # the second hardly changes anything
            block.self_attn.o_proj.weight.mul_(scale)
            block.mlp.down_proj.weight.mul_(scale)
    saved(teacher, folder / "teacher", stores)
    features = [f"hidden.{layer}@all" for layer in range(4)] + [f"value.{layer}@all" for layer in (1, 2, 3)] + ["input.2@all", "final@all"]
    store = answered(folder, folder / "teacher", "causal_lm", features, stores)
    return Look(store, "tiny", "train", None, model_shape(config, "causal_lm")), teacher


def seen(look: Look, teacher: PreTrainedModel, rows: int | None = None) -> list[dict[str, Tensor]]:
    """For each row of the store what goes into and comes out of the teacher's modules, [tokens, width] float64."""
    store, body = Store.open(look.store), teacher.double().model
    watched = {"norm": body.norm}
    for number, block in enumerate(body.layers, 1):
        watched |= {f"block.{number}": block, f"value.{number}": block.self_attn.v_proj}
    found: list[dict[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, given, out: found[-1].update({f"into {name}": given[0][0], f"out of {name}": out[0]})

    hooks = [module.register_forward_hook(note(name)) for name, module in watched.items()]
    for row in store.rows.select("train")[:rows]:
        found.append({})
        with torch.no_grad():
            teacher(input_ids=torch.from_numpy(store.tokens("input_ids", row[None]).astype("int64"))[None])
    for hook in hooks:
        hook.remove()
    teacher.float()
    return found


def test_block_influence_is_one_minus_the_mean_cosine(llama: tuple[Look, PreTrainedModel]) -> None:
    look, teacher = llama
    rows = seen(look, teacher)
    for block, found in enumerate(block_influence(look).tolist(), 1):
        tokens = [pair for row in rows for pair in zip(row[f"into block.{block}"], row[f"out of block.{block}"], strict=True)]
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in tokens]
        assert found == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-4)
    assert chosen_by_influence(look, 2) == (1, 3)
    assert chosen_by_influence(look, 3) == (1, 2, 3)


def test_channels_count_by_their_mean_magnitude(llama: tuple[Look, PreTrainedModel]) -> None:
    look, teacher = llama
    rows = seen(look, teacher)
    expected = sum(torch.cat([row[site] for row in rows]).abs().mean(0) for site in ("into value.2", "out of norm"))
    torch.testing.assert_close(channel_scores(look, [2]), expected, atol=0, rtol=1e-5)


def test_heads_count_by_what_their_values_write(llama: tuple[Look, PreTrainedModel]) -> None:
    look, teacher = llama
    rows = seen(look, teacher)
    student = LoadedModel.of(teacher, "causal_lm")
    found = head_scores(look, student, [1, 2, 3])
    for block in (1, 2, 3):
        output = teacher.model.layers[block - 1].self_attn.o_proj.weight.detach().double()
        for head in range(4):
            group = head // 2
            values = torch.cat([row[f"out of value.{block}"] for row in rows])[:, group * 6 : group * 6 + 6]
            lengths = (values @ output[:, head * 6 : head * 6 + 6].T).norm(dim=1)
            assert float(found[block - 1, head]) == pytest.approx(float(lengths.mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_units_count_by_the_lengths_of_their_weights(family: str) -> None:
    config, _, head = WIDE[family]
    model = HEADS[head].from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    with torch.device("meta"):
        smaller = HEADS[head].from_config(type(config).from_dict({**config.to_dict(), "intermediate_size": 8}))
    found = unit_scores(model, roles(model, smaller))
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    for unit in (0, 13):
        if family == "bert":
            into, out = "bert.encoder.layer.1.intermediate.dense", weights["bert.encoder.layer.1.output.dense.weight"]
            parts = [torch.cat([weights[f"{into}.weight"][unit], weights[f"{into}.bias"][unit : unit + 1]]), out[:, unit]]
        elif family == "modernbert":
            both = weights["layers.1.mlp.Wi.weight"]
            parts = [both[unit], both[20 + unit], weights["layers.1.mlp.Wo.weight"][:, unit]]
        else:
            gate, up = (weights[f"model.layers.1.mlp.{part}_proj.weight"][unit] for part in ("gate", "up"))
            parts = [gate, up, weights["model.layers.1.mlp.down_proj.weight"][:, unit]]
        expected = 1.0
        for part in parts:
            expected *= float(part.square().sum()) ** 0.5
        assert float(found[1, unit]) == pytest.approx(expected, rel=1e-9)


def test_only_so_many_tokens_are_looked_at(llama: tuple[Look, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    look, teacher = llama
    rows = seen(look, teacher, 2)
    monkeypatch.setattr(importance, "TOKENS", len(rows[0]["out of norm"]) + 1)
    expected = sum(torch.cat([row[site] for row in rows]).abs().mean(0) for site in ("into value.2", "out of norm"))
    torch.testing.assert_close(channel_scores(look, [2]), expected, atol=0, rtol=1e-5)


def test_activations_of_another_shape_are_refused(llama: tuple[Look, PreTrainedModel]) -> None:
    look, _ = llama
    with pytest.raises(ValueError, match="has width 12, but the student's source has 24: expected models of one shape"):
        channel_scores(replace(look, teacher=look.teacher.model_copy(update={"width": 24})), [2])
