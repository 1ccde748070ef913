"""A stack mixed from two models is, in every family, the stack that those blocks make up."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import CONFIGS, LENGTHS
from torch import Tensor, nn
from transformers import PreTrainedModel

from online.batch import Batch, dense
from online.capture import Capture
from online.families import FAMILIES, submodule
from online.intervene import Intervene
from online.models import LoadedModel, forward
from online.replacement import Replaced
from store.features import FeatureKey
from store.shape import Head

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LAYERS = 3
ATTENTIONS = [(name, attention) for name in CONFIGS for attention in ("eager", "sdpa") if (name, attention) != ("gemma2", "sdpa")]
MIXED = {1: (1, 1), 3: (2, 3)}
"""Student blocks 1 and 3 of three; block 2 stays."""


def pair(tiny_model: Build, name: str, attention: str = "eager", head: Head | None = None) -> tuple[LoadedModel, LoadedModel]:
    """A student, and a frozen teacher of the same shape with other weights."""
    head = head or ("causal_lm" if FAMILIES[name.partition(",")[0]].causal else "masked_lm")
    student = tiny_model(name, head, attention)
    teacher = copy.deepcopy(student).requires_grad_(False)
    torch.manual_seed(1)
    for weight in teacher.parameters():
        weight.add_(torch.randn_like(weight) * 0.15)
    return LoadedModel.of(student, head), LoadedModel.of(teacher, head)


def stacked(student: LoadedModel, blocks: list[tuple[LoadedModel, int]]) -> LoadedModel:
    """A model of its own with the student's embeddings and head around these blocks, each of the kind that it has where it comes from."""
    model = copy.deepcopy(student.model)
    path = student.family.block.format(i=0).rpartition(".")[0]
    parent = submodule(model.base_model, path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], nn.ModuleList([copy.deepcopy(owner.block(number)) for owner, number in blocks]))
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [owner.model.config.layer_types[number - 1] for owner, number in blocks]
    model.config.num_hidden_layers = len(blocks)
    return LoadedModel.of(model, student.shape.head)


def outputs(loaded: LoadedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = forward(loaded, batch).logits[batch.mask]
    return found


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_a_mixed_stack_equals_a_model_that_is_made_of_its_blocks(
    name: str, attention: str, kind: str, tiny_model: Build, lay_out: LayOut
) -> None:
    (student, teacher), batch = pair(tiny_model, name, attention), lay_out(kind)[0]
    if kind == "packed" and getattr(student.model.config, "trigram_input", False):
        return
    for swaps, blocks in (
        (MIXED, [(teacher, 1), (student, 2), (teacher, 2), (teacher, 3)]),
        ({1: (2, 2), 2: (1, 3)}, [(teacher, 2), (teacher, 1), (teacher, 2), (teacher, 3), (student, 3)]),  # of other kinds of attention
    ):
        expected = outputs(stacked(student, blocks), batch)
        with Replaced(student, teacher, swaps, batch):
            torch.testing.assert_close(outputs(student, batch), expected, **TOLERANCE)
        assert not torch.allclose(outputs(student, batch), expected, atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_block_replaced_is_the_student_and_all_are_the_teachers_body(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    (student, teacher), batch = pair(tiny_model, name, "eager" if name == "gemma2" else "sdpa"), lay_out("right")[0]
    plain = outputs(student, batch)
    with Replaced(student, teacher, {}, batch):
        assert torch.equal(outputs(student, batch), plain)
    seen: list[Tensor] = []
    last = FeatureKey("hidden", LAYERS)
    with torch.no_grad(), Capture(student, [last]) as capture:
        look = Intervene(student, {FeatureKey("hidden", 0): lambda x: seen.append(x) or x})  # type: ignore[func-returns-value]
        with look, Replaced(student, teacher, {number: (number, number) for number in range(1, LAYERS + 1)}, batch):
            forward(student, batch)
    with torch.no_grad(), Intervene(teacher, {FeatureKey("hidden", 0): lambda x: seen[0]}), Capture(teacher, [last]) as expected:
        forward(teacher, batch)
    assert torch.equal(dense(capture.features(batch), last), dense(expected.features(batch), last))
    assert torch.equal(outputs(student, batch), plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks_keep_their_own_window_and_rotary_frequencies(attention: str, tiny_model: Build, lay_out: LayOut) -> None:
    student, _ = pair(tiny_model, "mistral", attention)
    config = copy.deepcopy(student.model.config)
    config.sliding_window, config.rope_parameters = 2, {"rope_type": "default", "rope_theta": 50.0}
    torch.manual_seed(2)
    teacher = LoadedModel.of(type(student.model)(config).eval(), "causal_lm")
    assert student.shape.windows == (4,) * LAYERS
    assert teacher.shape.windows == (2,) * LAYERS
    for kind in ("right", "packed"):
        batch, places = lay_out(kind)
        with torch.no_grad(), Replaced(student, teacher, {2: (1, 2)}, batch), Capture(student, [FeatureKey("hidden", 2)]) as capture:
            forward(student, batch)
        found = dense(capture.features(batch), FeatureKey("hidden", 2))
        for text, row, place in places:
            with torch.no_grad():
                hidden = student.model(text[None], output_hidden_states=True).hidden_states[1]
                positions = torch.arange(len(text))[None]
                back = positions[0][:, None] - positions[0]
                allowed = ((back >= 0) & (back < 2))[None, None]
                mask = allowed if attention == "sdpa" else torch.zeros(1, 1, *back.shape).masked_fill(~allowed, -1e30)
                angles = positions[..., None] * 50.0 ** (-torch.arange(0, 12, 2) / 12)
                rotary = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
                for number in (1, 2):
                    hidden = teacher.block(number)(hidden, attention_mask=mask, position_embeddings=rotary)
            torch.testing.assert_close(found[row, place], hidden[0], **TOLERANCE)
    assert max(LENGTHS) > 4


@pytest.mark.parametrize("name", ["bert", "gpt2", "mobilebert"])
def test_gradients_through_frozen_blocks_equal_finite_differences(name: str, tiny_model: Build) -> None:
    student, teacher = pair(tiny_model, name, head="base")
    for loaded in (student, teacher):
        loaded.model.double()
    student.model.requires_grad_(False)
    ids = torch.tensor([[5, 9, 13], [7, 4, 1]])
    order = torch.arange(2)
    batch = Batch(order, ids, ids != 1, None, None, None, None, None, order)
    torch.manual_seed(0)
    weights = torch.randn(5, student.shape.width, dtype=torch.float64)
    added = (torch.randn(2, 3, 4, dtype=torch.float64) * 0.1).requires_grad_()

    def run(added: Tensor) -> Tensor:
        writes = {FeatureKey("hidden", 1): lambda x: torch.cat([x[..., :4] + added, x[..., 4:]], dim=-1)}
        with Replaced(student, teacher, {2: (2, 3), 3: (1, 1)}, batch), Intervene(student, writes):
            found: Tensor = forward(student, batch).last_hidden_state[batch.mask]
        return (found * weights).sum()

    assert float(torch.autograd.grad(run(added), added)[0].abs().max()) > 1e-3
    assert torch.autograd.gradcheck(run, (added,), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_gradients_reach_the_students_blocks_below_and_neither_the_replaced_ones_nor_the_teacher(
    tiny_model: Build, lay_out: LayOut
) -> None:
    (student, teacher), batch = pair(tiny_model, "bert", head="base"), lay_out("right")[0]
    final = FeatureKey("final")
    with Replaced(student, teacher, {2: (2, 3)}, batch), Capture(student, [final], grad=True) as capture:
        forward(student, batch)
    dense(capture.features(batch), final).square().sum().backward()
    assert all(weight.grad is not None for number in (1, 3) for weight in student.block(number).parameters())
    assert all(weight.grad is None for weight in student.block(2).parameters())
    assert all(weight.grad is None for weight in teacher.model.parameters())


def test_capture_asks_for_gradients_only_where_something_below_trains(tiny_model: Build, lay_out: LayOut) -> None:
    (student, teacher), batch = pair(tiny_model, "bert", head="base"), lay_out("right")[0]
    student.model.get_input_embeddings().requires_grad_(False)
    student.model.embeddings.requires_grad_(False)
    first, last = FeatureKey("hidden", 1), FeatureKey("hidden", 3)
    with Capture(student, [first, last], grad=True) as capture, Replaced(student, teacher, {1: (1, 1)}, batch):
        forward(student, batch)
    features = capture.features(batch)
    assert not dense(features, first).requires_grad
    assert dense(features, last).requires_grad


def test_sites_inside_a_replaced_block_are_neither_read_nor_written_but_those_of_its_stand_ins_are_written(
    tiny_model: Build, lay_out: LayOut
) -> None:
    (student, teacher), batch = pair(tiny_model, "bert", head="base"), lay_out("right")[0]
    hidden, query = FeatureKey("hidden", 2), FeatureKey("query", 2)
    with torch.no_grad(), Replaced(student, teacher, {2: (2, 3)}, batch):
        with Capture(student, [hidden, query]) as capture:
            forward(student, batch)
        with pytest.raises(
            ValueError, match=r"query\.2 was not seen: .* of a block that another model's stand in for there is hidden alone"
        ):
            capture.features(batch)
        with pytest.raises(ValueError, match=r"query\.2@all: not written"), Intervene(student, {query: torch.clone}):
            forward(student, batch)
        with Capture(student, [hidden]) as plain:
            forward(student, batch)
        with Intervene(teacher, {FeatureKey("hidden", 3): lambda x: x * 2}), Capture(student, [hidden]) as doubled:
            forward(student, batch)
    assert torch.equal(dense(doubled.features(batch), hidden), dense(plain.features(batch), hidden) * 2)


def test_each_pass_may_replace_other_blocks_and_nothing_of_the_teacher_stays(tiny_model: Build, lay_out: LayOut) -> None:
    (student, teacher), batch = pair(tiny_model, "llama"), lay_out("right")[0]
    names, plain = list(student.model.state_dict()), outputs(student, batch)
    with Replaced(student, teacher, {2: (1, 1)}, batch):
        second = outputs(student, batch)
        assert list(student.model.state_dict()) == names
        with Replaced(student, teacher, {1: (1, 1), 2: (3, 3)}, batch):
            inner = outputs(student, batch)
        assert torch.equal(outputs(student, batch), second)
    with Replaced(student, teacher, {1: (1, 1), 2: (3, 3)}, batch):
        assert torch.equal(outputs(student, batch), inner)
    assert len({float(found.sum()) for found in (plain, second, inner)}) == 3
    with pytest.raises(IndexError), Replaced(student, teacher, {1: (1, 1)}, batch):
        raise IndexError
    assert torch.equal(outputs(student, batch), plain)
    assert not any("forward" in vars(module) for module in student.model.modules())


def test_dropout_of_the_teachers_blocks_follows_the_teachers_mode(tiny_model: Build, lay_out: LayOut) -> None:
    (student, teacher), batch = pair(tiny_model, "bert"), lay_out("right")[0]
    with Replaced(student, teacher, {1: (1, 2)}, batch):
        assert torch.equal(outputs(student, batch), outputs(student, batch))
        teacher.model.train()
        assert not torch.equal(outputs(student, batch), outputs(student, batch))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_pairs_and_ways_to_run_that_do_not_fit_are_refused(tiny_model: Build, lay_out: LayOut) -> None:
    (student, teacher), batch = pair(tiny_model, "bert"), lay_out("right")[0]
    with pytest.raises(ValueError, match="block 4 cannot be replaced: the model has blocks 1 to 3"):
        Replaced(student, teacher, {4: (1, 1)}, batch)
    for chosen in ((0, 1), (2, 4), (3, 2)):
        with pytest.raises(ValueError, match=f"by blocks {chosen[0]} to {chosen[1]} of a model with blocks 1 to 3"):
            Replaced(student, teacher, {1: chosen}, batch)
    roberta = LoadedModel.of(tiny_model("roberta", "masked_lm"), "masked_lm")
    with pytest.raises(ValueError, match="of one family, found family bert and roberta"):
        Replaced(student, roberta, {}, batch)
    fast = LoadedModel.of(tiny_model("bert", "masked_lm", "sdpa"), "masked_lm")
    with pytest.raises(ValueError, match="with the same attention, found attention eager and sdpa"):
        Replaced(student, fast, {}, batch)
    half = LoadedModel.of(tiny_model("bert", "masked_lm").bfloat16(), "masked_lm")
    with pytest.raises(ValueError, match=r"in one dtype, found dtype torch\.float32 and torch\.bfloat16"):
        Replaced(student, half, {}, batch)
    wide = CONFIGS["bert"]()
    wide.hidden_size = 48
    with pytest.raises(ValueError, match="of one width, found width 32 and 48"):
        Replaced(student, LoadedModel.of(type(student.model)(wide), "masked_lm"), {}, batch)
    one, other = (LoadedModel.of(tiny_model(name, "base"), "base") for name in ("gemma3_text", "gemma3_text, bidirectional"))
    with pytest.raises(ValueError, match="that look in the same direction, found causal True and False"):
        Replaced(one, other, {}, batch)
    gpt2, frozen = pair(tiny_model, "gpt2")
    with pytest.raises(ValueError, match="run it with use_cache: false"), torch.no_grad(), Replaced(gpt2, frozen, {1: (1, 1)}, batch):
        gpt2.model(batch.input_ids, use_cache=True)
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    student.model.train()
    with pytest.raises(ValueError, match="gradient checkpointing computes blocks anew"), Replaced(student, teacher, {1: (1, 1)}, batch):
        pass
    with Replaced(student, teacher, {}, batch):
        forward(student, batch)
