"""The map of a smaller vocabulary: on disk, inside a model, and for labels."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, Gemma3TextConfig, PreTrainedConfig

from online.batch import IGNORED
from online.fingerprints import weights_fingerprint
from online.kept_words import FILE, KeptWords, kept_words, map_words, read_kept_words, refuse_own_words, unmap_words, without_padding_beyond
from online.models import HEADS
from online.sharding import Whole
from online.words import Product, Words, as_words
from store.features import FeatureKey

WORDS = KeptWords(torch.tensor([4, 0, 2]), torch.tensor([1, 2, 2, 0, 0, 1]))
SIZES = {"vocab_size": 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES, pad_token_id=0),
    "gemma3_text": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}


def test_labels_become_the_places_of_the_words_that_stand_for_them() -> None:
    labels = torch.tensor([[0, 1, IGNORED], [3, 5, 4]])
    assert WORDS.labels(labels).tolist() == [[1, 2, IGNORED], [0, 1, 0]]
    assert WORDS.representatives == 3, "1 is read as 2, 3 as 4, 5 as 0"


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_kept_words(tmp_path) is None
    WORDS.write(tmp_path)
    again = read_kept_words(tmp_path)
    assert again is not None
    assert torch.equal(again.kept, WORDS.kept)
    assert torch.equal(again.places, WORDS.places)
    assert again.fingerprint == WORDS.fingerprint
    other = KeptWords(WORDS.kept, torch.tensor([1, 2, 2, 0, 0, 2]))
    assert other.fingerprint != WORDS.fingerprint


@pytest.mark.parametrize(
    ("kept", "places"),
    [
        ([4, 0, 2], [1, 2, 2, 0, 1, 1]),
        ([4, 0, 2], [1, 2, 2, 3, 0, 1]),
        ([4, 0, 9], [1, 2, 2, 0, 0, 1]),
        ([4, 4, 2], [1, 2, 2, 0, 0, 1]),
        ([], [0]),
    ],
)
def test_a_map_that_does_not_lead_home_is_refused(kept: list[int], places: list[int], tmp_path: Path) -> None:
    save_file({"kept": torch.tensor(kept, dtype=torch.int64), "places": torch.tensor(places)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is damaged: its places do not lead"):
        read_kept_words(tmp_path)


def test_what_is_no_map_is_refused(tmp_path: Path) -> None:
    save_file({"kept": torch.tensor([1.0])}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is no vocabulary: expected the int64 lists kept and places, found kept"):
        read_kept_words(tmp_path)
    (tmp_path / FILE).write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        read_kept_words(tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_mapped_model_answers_ids_as_it_answered_their_places(family: str) -> None:
    torch.manual_seed(0)
    model = HEADS["masked_lm" if family == "bert" else "causal_lm"].from_config(CONFIGS[family]).eval()
    ids = torch.tensor([[3, 1, 5, 4], [0, 2, 4, 1]])
    places = torch.tensor([[0, 2, 1, 0], [1, 2, 0, 2]])
    with torch.no_grad():
        expected = model(input_ids=places).logits
        before = weights_fingerprint(model, Whole(model))
        map_words(model, WORDS)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert weights_fingerprint(model, Whole(model)) != before, "it computes something else"
        assert not [name for name in model.state_dict() if "places" in name or "kept" in name]
        found = unmap_words(model)
        assert found is not None
        assert torch.equal(found.kept, WORDS.kept)
        assert kept_words(model) is None
        assert torch.equal(model(input_ids=places).logits, expected)
    assert unmap_words(model) is None


def test_padding_gets_no_gradient_where_it_stands_now() -> None:
    model = HEADS["base"].from_config(CONFIGS["bert"])
    map_words(model, WORDS)
    model(input_ids=torch.tensor([[0, 5, 4, 1]])).last_hidden_state.square().sum().backward()
    slope_KW = model.get_input_embeddings().weight.grad
    assert slope_KW[1].abs().sum() == 0, "0, and 5 that is read as it"
    assert slope_KW[0].abs().sum() > 0
    assert slope_KW[2].abs().sum() > 0


def test_a_map_of_another_size_and_words_of_a_mapped_teacher_are_refused() -> None:
    model = HEADS["base"].from_config(CONFIGS["bert"])
    with pytest.raises(ValueError, match="the model has 3 words, its vocabulary file keeps 2"):
        map_words(model, KeptWords(torch.tensor([1, 0]), torch.tensor([1, 0])))
    key = FeatureKey("lm_logits")
    refuse_own_words(model, [key])
    map_words(model, WORDS)
    refuse_own_words(model, [FeatureKey("hidden", 1)])
    with pytest.raises(ValueError, match=r"lm_logits@all: this teacher has 3 of 6 words, in an order of its own; give its expanded folder"):
        refuse_own_words(model, [key])


def test_a_model_can_be_made_whose_padding_lies_beyond_its_words() -> None:
    config = BertConfig(**SIZES, pad_token_id=5)
    with without_padding_beyond(config):
        model = HEADS["base"].from_config(config)
    assert config.pad_token_id == 5
    model.config.pad_token_id = 5
    map_words(model, WORDS)
    assert model.get_input_embeddings().padding_idx == 1, "5 is read as 0, in place 1"


def test_the_logits_of_some_words_are_a_product_with_their_rows_of_the_head_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, input_ = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (9,), (5, 4)))
    kept = torch.tensor([7, 0, 3])
    logits_MV = (input_.double() @ weight.double().T + bias.double()).tolist()
    expected = [[2.0 * math.tanh(row[word] / 2.0) for word in kept.tolist()] for row in logits_MV]
    words = Words(input_, Product(weight, bias, 2.0), 9).among(kept)
    assert isinstance(words.head, Product)
    assert words.head.weight.shape == (3, 4)
    assert words.vocab == 3
    assert torch.allclose(words.logits, torch.tensor(expected), atol=1e-6)
    assert torch.allclose(Words(input_, lambda x: x @ weight.T, 9).among(kept).logits, (input_ @ weight.T)[:, kept], atol=1e-6)
    assert torch.equal(as_words(weight.T).among(kept).logits, weight.T[:, kept])
