"""Few words in narrow embeddings: MobileBERT's, whose tokens are mixed with their neighbours, and special tokens beyond the kept words."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from online.kept_words import KeptWords, kept_words
from online.models import ModelSpec, load_config, load_model
from store.manifest import Task
from store.strict import parse
from student_train.blocks import Source
from student_train.blueprint import derived_blueprint
from student_train.init import build
from student_train.outline import outline
from student_train.output import student_folder
from student_train.recipe import DataSpec, StudentSpec, TrainRecipe
from student_train.run import run
from student_train.vocabulary import compressed


def recipe(output: Path, folder: Path, student: dict[str, Any]) -> TrainRecipe:
    """GLMD's L_sp and masked words for two steps."""
    data = {"store": str(folder / "store"), "pass_name": "tiny"}
    phase = {
        "name": "words", "student": student, "data": [data], "evaluate": [{**data, "split": "dev"}], "steps": 2, "batch_rows": 8,
        "methods": [{"name": "lm_kd", "options": {"positions": "all", "temperature": 15.0}}, {"name": "lm_loss"}],
        "trainer": {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "learning_rate": 1e-3},
    }  # fmt: skip
    return parse(TrainRecipe, {"output": str(output), "phases": [phase]}, "recipe")


def built(folder: Path, start: str, store: Path, output: Path) -> tuple[TrainRecipe, PreTrainedModel, KeptWords]:
    """A recipe, its student before training, random or as ``folder`` has it, and the words that this keeps."""
    given: dict[str, Any] = (
        {"random": {}, "source": str(folder)} if start == "random" else {"model": {"model": str(folder), "head": "masked_lm"}}
    )
    made = recipe(output, store, {**given, "vocabulary": {"rate": 0.3}})
    before = build(outline(made, made.phases[0]).blueprint, 0).student.model
    words = kept_words(before)
    assert words is not None
    return made, before, words


def check_training(made: TrainRecipe) -> None:
    """The loss falls, and what is left on disk is the student."""
    run(made, ["tests"])
    found = json.loads((made.output / "words" / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    again = load_model(ModelSpec.model_validate({"model": str(student_folder(made, "words")), "head": "masked_lm"}))
    assert again.fingerprint == found["student"]


@pytest.mark.parametrize("start", ["random", "model"])
def test_mobilebert_s_narrow_words_and_trigrams_go_with_fewer_words(
    start: str, many_words: Path, tiny_words: ModuleType, tmp_path: Path
) -> None:
    folder = tiny_words.write_model(tmp_path / "mobile", "masked_lm", "mobilebert", embedding_size=6, intra_bottleneck_size=8)
    made, before, words = built(folder, start, many_words, tmp_path / "out")
    predictions = before.cls.predictions
    assert before.get_input_embeddings().weight.shape == predictions.decoder.weight.shape == (128, 6)
    assert predictions.decoder.weight is before.get_input_embeddings().weight
    assert predictions.dense.weight.shape == (10, 128)
    assert predictions.decoder.bias.shape == (128,)
    if start == "model":
        whole = load_file(folder / "model.safetensors")
        assert torch.equal(before.cls.predictions.dense.weight, whole["cls.predictions.dense.weight"][:, words.kept])
    check_training(made)


@pytest.mark.parametrize("start", ["random", "model"])
def test_electra_s_factorised_words_go_with_fewer_words(start: str, many_words: Path, tiny_words: ModuleType, tmp_path: Path) -> None:
    folder = tiny_words.write_model(tmp_path / "electra", "masked_lm", "electra", embedding_size=6)
    made, before, words = built(folder, start, many_words, tmp_path / "out")
    assert before.get_input_embeddings().weight.shape == (128, 6)
    assert before.generator_lm_head.weight is before.get_input_embeddings().weight
    assert before.generator_lm_head.bias.shape == (128,)
    if start == "model":
        whole = load_file(folder / "model.safetensors")
        assert torch.equal(before.generator_lm_head.bias, whole["generator_lm_head.bias"][words.kept])
    check_training(made)


def test_padding_whose_id_lies_beyond_the_kept_words_starts_as_zeros_and_reaches_the_folder(
    many_words: Path, tiny_words: ModuleType, tmp_path: Path
) -> None:
    changes = {"num_key_value_heads": 1, "head_dim": 8}
    folder = tiny_words.write_model(tmp_path / "llama", "causal_lm", "llama", **changes)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pad_token_id": 300}))
    spec = StudentSpec.model_validate({"random": {}, "vocabulary": {"rate": 0.3, "keep": ["w300"]}})
    plain = derived_blueprint(spec, Source(folder, "causal_lm"), load_config(folder), Task(kind="none"))
    blueprint = compressed(plain, (DataSpec(store=many_words / "store"),))
    student = build(blueprint, 0).student
    embedding, words = student.model.get_input_embeddings(), kept_words(student.model)
    assert words is not None
    place = int(words.places[300])
    assert (student.model.config.pad_token_id, embedding.padding_idx) == (300, place)
    assert embedding.weight[place].abs().sum() == 0
    assert embedding.weight[0].abs().sum() > 0
    student.model.save_pretrained(tmp_path / "student")
    words.write(tmp_path / "student")
    again = load_model(ModelSpec.model_validate({"model": str(tmp_path / "student"), "head": "causal_lm"}))
    assert again.model.config.pad_token_id == 300
    assert again.fingerprint == student.fingerprint
    ids = torch.tensor([[300, 7, 399], [5, 300, 42]])
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, student.model(input_ids=ids).logits)
