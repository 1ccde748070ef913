"""What is MobileBERT's own: bottlenecks in every form, trigrams beside padding, a word head in two matrices."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MobileBertConfig, PreTrainedModel

from online.batch import Batch, dense
from online.capture import Capture
from online.derive import derive
from online.models import LoadedModel, forward, model_shape
from online.planner import plan
from online.statics import live_statics
from online.teacher import float_statics
from store.features import FeatureKey

Build = Callable[..., PreTrainedModel]
LayOut = Callable[[str], tuple[Batch, list[tuple[Tensor, int, slice]]]]
STUDENT, TEACHER = "mobilebert", "mobilebert, inverted"
LAYERS, WIDTH, VOCAB, PAD = 3, 32, 61, 1


def keys(*names: str) -> list[FeatureKey]:
    return [FeatureKey.parse(name) for name in names]


def loaded_of(tiny_model: Build, name: str) -> LoadedModel:
    return LoadedModel.of(tiny_model(name, "masked_lm", "sdpa"), "masked_lm")


def planned(loaded: LoadedModel, *names: str) -> set[str]:
    return {str(key) for key in plan(dict.fromkeys(keys(*names), "float32"), loaded.shape, loaded.wiring).stored}


# Bottlenecks


@pytest.mark.parametrize("name", [STUDENT, TEACHER, "mobilebert, attention in the bottleneck"])
def test_hidden_states_alone_are_stored_for_attention_values_and_words_of_all_blocks(name: str, tiny_model: Build) -> None:
    sites = ("hidden", "input", "query", "key", "value", "attention_scores", "attention_probs")
    wanted = [f"{site}.{i}" for site in sites for i in range(1, LAYERS + 1)]
    found = planned(loaded_of(tiny_model, name), "hidden.0", *wanted, "final", "lm_logits", "head_input@labels")
    assert len(found) == LAYERS + 1
    assert {f"hidden.{i}@all" for i in range(LAYERS)} < found
    assert found <= {*(f"hidden.{i}@all" for i in range(LAYERS + 1)), "final@all"}


def test_the_narrower_of_input_and_hidden_state_is_stored_for_attention_alone(tiny_model: Build) -> None:
    student, teacher = loaded_of(tiny_model, STUDENT), loaded_of(tiny_model, TEACHER)
    assert [student.shape.width_of("input"), teacher.shape.width_of("input")] == [16, 64]
    assert planned(student, "attention_probs.2") == {"input.2@all"}
    assert planned(teacher, "attention_probs.2") == {"hidden.1@all"}
    assert planned(student, "value.2") == {"value.2@all"}
    assert planned(teacher, "value.2") == {"hidden.1@all"}
    assert planned(student, "attention_probs.2", "value.2") == {"hidden.1@all"}  # 32 numbers; input and value 16 each and an array more
    inside = loaded_of(tiny_model, "mobilebert, attention in the bottleneck")
    assert planned(inside, "attention_probs.2", "value.2") == {"input.2@all"}


def test_values_past_the_bottleneck_do_not_follow_from_what_comes_out_of_it(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = loaded_of(tiny_model, STUDENT), lay_out("right")
    with torch.no_grad(), Capture(loaded, keys("input.2", "query.2")) as capture:
        forward(loaded, batch)
        have = capture.features(batch)
        statics = float_statics(live_statics(loaded, ["2.query.weight", "2.query.bias", "2.value.weight", "2.value.bias"]))
        query = keys("query.2")[0]
        only = {key: value for key, value in have.items() if key != query}
        derived = derive([query], only, statics, batch, loaded.shape, loaded.wiring)
    torch.testing.assert_close(dense(derived, query)[batch.mask], dense(have, query)[batch.mask], atol=1e-5, rtol=1e-5)
    for name in ("value.2", "hidden.1"):
        with pytest.raises(ValueError, match=f"{name}@all does not follow from input.2@all"):
            derive(keys(name), only, statics, batch, loaded.shape, loaded.wiring)


SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # the published IB-BERT_LARGE in small: projections from hidden states past the bottleneck
        (
            {"intra_bottleneck_size": 64, "key_query_shared_bottleneck": False},
            "hidden states of 32 with weights for an intra_bottleneck_size of 64; expected key_query_shared_bottleneck: true or",
        ),
        ({"intra_bottleneck_size": 30}, "intra_bottleneck_size 30 is no multiple of num_attention_heads 4"),
        ({"use_bottleneck": False, "hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
    ],
)
def test_sizes_that_transformers_builds_and_cannot_run_are_refused(options: dict[str, int | bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_shape(MobileBertConfig(**{**SIZES, **options}), "base")


def test_projections_may_read_hidden_states_of_the_width_of_the_bottleneck(lay_out: LayOut) -> None:
    config = MobileBertConfig(**SIZES, intra_bottleneck_size=WIDTH, key_query_shared_bottleneck=False, embedding_size=12)
    shape = model_shape(config, "base")
    assert (shape.bottleneck, shape.head_width) == (0, 8)


# Trigrams


@pytest.mark.parametrize("name", [STUDENT, TEACHER])
def test_no_token_depends_on_the_embedding_of_padding(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = loaded_of(tiny_model, name), lay_out("right")
    embedding = loaded.model.get_input_embeddings().weight
    states = []
    for change in (0.0, 5.0):
        with torch.no_grad(), Capture(loaded, keys("hidden.0", "final")) as capture:
            embedding[PAD] += change
            forward(loaded, batch)
            features = capture.features(batch)
            states.append([dense(features, key) for key in keys("hidden.0", "final")])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    assert not loaded.model.get_input_embeddings()._forward_hooks


def test_the_hook_on_embeddings_goes_after_an_error(tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = loaded_of(tiny_model, STUDENT), lay_out("right")
    with pytest.raises(IndexError):
        forward(loaded, replace(batch, input_ids=batch.input_ids + VOCAB))
    assert not loaded.model.get_input_embeddings()._forward_hooks


# The word head


@pytest.mark.parametrize("name", [STUDENT, TEACHER])
def test_word_logits_come_from_both_matrices_and_train_both(name: str, tiny_model: Build, lay_out: LayOut) -> None:
    loaded, (batch, _) = loaded_of(tiny_model, name), lay_out("right")
    with Capture(loaded, keys("head_input@labels", "lm_logits@labels"), grad=True) as capture:
        output = forward(loaded, batch)
        input_NW, logits_NV = (dense(capture.features(batch), key) for key in keys("head_input@labels", "lm_logits@labels"))
    assert output.logits.shape == (3, 0, VOCAB), "the model itself is spared the words of all tokens"
    head = loaded.model.cls.predictions
    narrow_VE, rest_RV = head.decoder.weight.double(), head.dense.weight.double()
    assert (narrow_VE.shape, rest_RV.shape) == ((VOCAB, 12), (WIDTH - 12, VOCAB))
    input_NW = input_NW.double()
    expected = input_NW[:, :12] @ narrow_VE.T + input_NW[:, 12:] @ rest_RV + head.bias.double()
    torch.testing.assert_close(logits_NV.double(), expected, atol=1e-5, rtol=1e-5)

    chosen = torch.arange(len(logits_NV)) % VOCAB
    F.cross_entropy(logits_NV, chosen).backward()
    residual_NV = (expected.softmax(-1) - F.one_hot(chosen, VOCAB)) / len(chosen)
    torch.testing.assert_close(head.dense.weight.grad.double(), input_NW[:, 12:].T.detach() @ residual_NV.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias.grad.double(), residual_NV.detach().sum(0), atol=1e-5, rtol=1e-4)
    assert head.decoder.weight is loaded.model.get_input_embeddings().weight
    unseen = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, batch.input_ids[batch.mask], False)
    from_head_VE = residual_NV.T.detach() @ input_NW[:, :12].detach()
    torch.testing.assert_close(head.decoder.weight.grad.double()[unseen], from_head_VE[unseen], atol=1e-5, rtol=1e-4)
    assert unseen.any()


def test_statics_of_the_head_are_one_matrix_that_shares_its_gradients(tiny_model: Build) -> None:
    loaded = loaded_of(tiny_model, STUDENT)
    statics = live_statics(loaded, ["head.weight", "head.bias"])
    assert statics["head.weight"].shape == (VOCAB, WIDTH)
    statics["head.weight"].sum().backward()
    head = loaded.model.cls.predictions
    assert torch.equal(head.dense.weight.grad, torch.ones_like(head.dense.weight))
    assert torch.equal(head.decoder.weight.grad, torch.ones_like(head.decoder.weight))
    assert torch.equal(statics["head.bias"], head.bias)
