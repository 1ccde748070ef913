"""Loading models from disk, their shapes, and fingerprints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from online.families import FAMILIES
from online.fingerprints import tokenizer_fingerprint, weights_fingerprint
from online.models import CustomModules, LoadedModel, ModelSpec, check_length, load_model, load_tokenizer, model_shape
from store.shape import Head

SIZES = {"vocab_size": 31, "pad_token_id": 0, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = BertConfig(**SIZES, max_position_embeddings=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny masked-LM folder with a tokenizer."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(BERT).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def tokenizer(words: tuple[str, ...] = ("good", "bad", "film")) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def test_a_loaded_model_is_in_eval_mode_and_knows_its_shape(folder: Path) -> None:
    loaded = load_model(ModelSpec(model=folder, head="masked_lm"))
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.pad_token_id == 0
    shape = loaded.shape
    assert (shape.family, shape.head, shape.layers, shape.width, shape.vocab, shape.labels) == ("bert", "masked_lm", 2, 16, 31, 0)
    assert (shape.heads, shape.kv_heads, shape.head_width, shape.causal, shape.pre_norm) == (2, 2, 8, False, False)
    assert loaded.wiring.attention_scale == pytest.approx((8**-0.5,) * 2)
    assert load_model(ModelSpec(model=folder, head="masked_lm", dtype="bfloat16")).model.dtype == torch.bfloat16


def test_shapes_follow_the_configuration() -> None:
    llama = {**SIZES, "num_key_value_heads": 1, "head_dim": 6}
    shape = model_shape(LlamaConfig(**llama), "causal_lm")
    assert (shape.heads, shape.kv_heads, shape.head_width, shape.causal, shape.pre_norm) == (2, 1, 6, True, True)
    assert shape.windows == (None, None)
    assert model_shape(Gemma2Config(**llama, sliding_window=5), "base").windows == (5, None)
    assert model_shape(ModernBertConfig(**{**SIZES, "num_hidden_layers": 4}, local_attention=10), "base").windows == (None, 5, 5, None)
    assert model_shape(BertConfig(**SIZES, num_labels=5), "token_classification").labels == 5
    assert model_shape(BERT, "multiple_choice").labels == 1


def test_a_base_model_has_no_random_pooler(folder: Path) -> None:
    assert load_model(ModelSpec(model=folder, head="base")).model.pooler is None


def test_a_missing_head_is_an_error_unless_a_new_one_is_asked_for(folder: Path) -> None:
    spec = ModelSpec(model=folder, head="classification", labels=3, new_head=True)
    torch.manual_seed(1)
    loaded = load_model(spec)
    assert loaded.shape.labels == 3
    assert loaded.model.classifier.out_features == 3
    with pytest.raises(ValueError, match=r"no multiple_choice head that fits.*new_head: true"):
        load_model(ModelSpec(model=folder, head="multiple_choice"))
    with pytest.raises(ValueError, match=r"no classification head that fits.*new_head: true"):
        load_model(ModelSpec(model=folder, head="classification"))


def test_another_number_of_labels_is_an_error_unless_a_new_head_is_asked_for(folder: Path) -> None:
    AutoModelForSequenceClassification.from_config(BertConfig(**SIZES, num_labels=4)).save_pretrained(folder)
    assert load_model(ModelSpec(model=folder, head="classification")).shape.labels == 4
    with pytest.raises(ValueError, match="has 4 labels, expected 3"):
        load_model(ModelSpec(model=folder, head="classification", labels=3))
    assert load_model(ModelSpec(model=folder, head="classification", labels=3, new_head=True)).model.classifier.out_features == 3
    with pytest.raises(ValueError, match="no number of labels"):
        load_model(ModelSpec(model=folder, head="base", labels=3))


def test_weights_missing_from_the_body_are_an_error_even_with_a_new_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the model itself, such as bert.encoder.layer.1"):
        load_model(ModelSpec(model=folder, head="classification", new_head=True))
    with pytest.raises(ValueError, match=r"lacks weights of the model itself, such as encoder.layer.1"):
        load_model(ModelSpec(model=folder, head="base"))


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _other_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def _encoder_decoder(folder: Path) -> None:
    T5Config(num_layers=1, d_model=16).save_pretrained(folder)


def _unknown_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "albert"}))


def _unheard_of(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')


def _decoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_gone, "expected a Hugging Face model folder, found nothing"),
        (_file, "expected a Hugging Face model folder, found a file"),
        (_no_config, "has no config.json"),
        (_broken_config, "config.json cannot be read"),
        (_no_weights, "cannot be loaded with the head masked_lm: .*safetensors"),
        (_truncated_weights, "cannot be loaded with the head masked_lm"),
        (_other_weights, "cannot be loaded with the head masked_lm"),
        (_encoder_decoder, r"encoder-decoder \(t5\)"),
        (_unknown_family, "unknown model family 'albert'.*modules"),
        (_unheard_of, "config.json cannot be read"),
        (_decoder, "bert with is_decoder is not supported"),
    ],
)
def test_a_folder_that_cannot_serve_gives_one_clear_message(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(ModelSpec(model=folder, head="masked_lm"))
    assert "\n" not in str(error.value)


def test_a_head_that_the_family_lacks_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="bert has no head 'causal_lm'; expected one of base, masked_lm"):
        load_model(ModelSpec(model=folder, head="causal_lm"))


def test_a_folder_without_a_tokenizer_loads_and_says_so_when_asked(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    spec = ModelSpec(model=folder, head="base")
    assert load_model(spec).tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(spec)
    with pytest.raises(ValueError, match="expected a folder with a tokenizer, found nothing"):
        load_model(ModelSpec(model=folder, head="base", tokenizer=folder / "none"))


def test_a_decoder_without_a_padding_token_classifies_batches(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert config.pad_token_id is None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(model=tmp_path, head="classification"))
    assert loaded.model(torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 2)


def test_soft_capped_attention_loads_in_eager(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8)).save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(model=tmp_path, head="causal_lm"))
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.wiring.score_cap == 50.0


def test_rotary_frequencies_that_depend_on_length_are_told(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=rope)).save_pretrained(tmp_path)
    assert load_model(ModelSpec(model=tmp_path, head="causal_lm")).wiring.rotary_by_length


def test_bidirectional_variants_of_decoders_are_refused() -> None:
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="bidirectional attention is not supported"):
        model_shape(config, "base")


@pytest.mark.parametrize(("config", "limit"), [(BERT, 32), (RobertaConfig(**{**SIZES, "pad_token_id": 1}, max_position_embeddings=34), 32)])
def test_rows_longer_than_the_positions_are_refused(config: BertConfig, limit: int) -> None:
    loaded = LoadedModel.of(AutoModelForMaskedLM.from_config(config), "masked_lm")
    check_length(loaded, limit)
    with pytest.raises(ValueError, match=f"up to {limit} tokens, found {limit + 1}"):
        check_length(loaded, limit + 1)


def test_custom_modules_need_a_block_path_with_a_number() -> None:
    with pytest.raises(ValueError, match="block"):
        CustomModules(block="transformer.blocks", layers=2, width=8)


def test_the_table_has_an_entry_for_every_promised_family() -> None:
    promised = {"bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"}
    assert promised <= FAMILIES.keys()


def test_weight_fingerprints_survive_saving_and_see_every_change(folder: Path, tmp_path: Path) -> None:
    heads: tuple[Head, ...] = ("masked_lm", "base")
    first, base = (load_model(ModelSpec(model=folder, head=head)) for head in heads)
    first.model.save_pretrained(tmp_path / "again")
    again = load_model(ModelSpec(model=tmp_path / "again", head="masked_lm"))
    assert again.fingerprint == first.fingerprint == load_model(ModelSpec(model=folder, head="masked_lm"), attention="eager").fingerprint
    assert base.fingerprint != first.fingerprint
    assert load_model(ModelSpec(model=folder, head="masked_lm", dtype="bfloat16")).fingerprint != first.fingerprint
    with torch.no_grad():
        again.model.bert.embeddings.LayerNorm.bias[3] += 1e-7
    assert weights_fingerprint(again.model, again.weights) != first.fingerprint
    first.model.config.layer_norm_eps = 1e-6
    assert weights_fingerprint(first.model, first.weights) != base.fingerprint
    assert weights_fingerprint(first.model, first.weights) != first.fingerprint


def test_tokenizer_fingerprints_survive_saving_and_use_and_see_every_change(tmp_path: Path) -> None:
    first = tokenizer()
    fingerprint = tokenizer_fingerprint(first)
    first(["good film", "bad"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(first) == fingerprint
    first.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint
    assert tokenizer_fingerprint(tokenizer(("good", "film", "bad"))) != fingerprint
    first.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(first) != fingerprint
