"""Students in other forms: a plain folder with all words, and an ONNX file with the map inside, run by onnxruntime alone."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from online.kept_words import KeptWords, map_words
from online.models import HEADS, LoadedModel, ModelSpec, load_model
from store.shape import Head
from student_train.cli import program
from student_train.expand import UNLIKELY, expand
from student_train.export import check_tokenizer
from student_train.onnx_file import write_onnx
from student_train.vocabulary import take_rows

LLAMA = {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
MOBILE = {"embedding_size": 6, "intra_bottleneck_size": 8}
MODELS: dict[str, tuple[Head, str, dict[str, Any]]] = {
    "bert": ("masked_lm", "bert", {}),
    "mobilebert": ("masked_lm", "mobilebert", MOBILE),
    "electra": ("masked_lm", "electra", {"embedding_size": 6}),
    "llama": ("causal_lm", "llama", LLAMA),
    "classifier": ("classification", "gpt2", {}),
}


def smaller(folder: Path, tiny_words: ModuleType, name: str) -> tuple[LoadedModel, KeptWords, Path]:
    """A student that keeps 128 of 410 words, the folder it lies in, and the words."""
    head, family, changes = MODELS[name]
    loaded = load_model(
        ModelSpec.model_validate({"model": str(tiny_words.write_model(folder / "whole", head, family, **changes)), "head": head})
    )
    generator = torch.Generator().manual_seed(6)
    kept = torch.cat([torch.arange(5), 5 + torch.randperm(405, generator=generator)[:123]])
    places = torch.randint(128, (410,), generator=generator)
    places[kept] = torch.arange(128)
    words = KeptWords(kept, places)
    take_rows(loaded.model, head, kept)
    student = LoadedModel.of(loaded.model, head, loaded.tokenizer)
    map_words(student.model, words)
    student.model.save_pretrained(folder / "student")
    words.write(folder / "student")
    assert student.tokenizer is not None
    student.tokenizer.save_pretrained(str(folder / "student"))
    return student, words, folder / "student"


def ids_and_mask(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + 31 * tokens)
    ids = torch.randint(400, (rows, tokens), generator=generator)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    return ids, mask.long()


@pytest.mark.parametrize("name", ["bert", "mobilebert", "electra", "llama"])
def test_an_expanded_folder_gives_the_same_for_the_same_ids_without_this_program(name: str, tiny_words: ModuleType, tmp_path: Path) -> None:
    student, words, folder = smaller(tmp_path, tiny_words, name)
    ids, mask = ids_and_mask(4, 9)
    with torch.no_grad():
        expected = student.model(input_ids=ids, attention_mask=mask).logits
    expand(load_model(ModelSpec.model_validate({"model": str(folder), "head": student.shape.head})), tmp_path / "expanded")
    plain, report = HEADS[student.shape.head].from_pretrained(tmp_path / "expanded", output_loading_info=True)
    assert not any(report.values())
    assert plain.config.vocab_size == 410
    with torch.no_grad():
        logits = plain.eval()(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(logits[..., words.kept], expected, atol=1e-5)
    dropped = [word for word in range(410) if word not in set(words.kept.tolist())]
    if name == "llama":  # its head has no bias
        assert plain.generation_config.suppress_tokens == dropped
        assert torch.allclose(logits[..., dropped], expected[..., words.places[dropped]], atol=1e-5)
        written = plain.generate(
            input_ids=ids[:2, :4], attention_mask=torch.ones(2, 4).long(), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert set(written[:, 4:].flatten().tolist()) <= set(words.kept.tolist())
    else:
        assert (logits[..., dropped] < UNLIKELY / 2).all()
        assert torch.equal(logits.argmax(-1), words.kept[expected.argmax(-1)])
        assert torch.allclose(logits.softmax(-1)[..., words.kept], expected.softmax(-1), atol=1e-6)
    assert "# Expanded" in (tmp_path / "expanded" / "README.md").read_text()
    again, before = AutoTokenizer.from_pretrained(tmp_path / "expanded").get_vocab(), tiny_words.tokenizer().get_vocab()
    assert again == before
    assert len(set(again.values())) == 400, "every dropped token still has an id of its own"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "mobilebert", "electra", "classifier"])
def test_an_onnx_file_takes_ids_of_the_whole_vocabulary_at_any_size(name: str, tiny_words: ModuleType, tmp_path: Path) -> None:
    student, _, folder = smaller(tmp_path, tiny_words, name)
    said = CliRunner().invoke(program, ["export", str(folder), str(tmp_path / "onnx"), "--to", "onnx"])
    assert said.exit_code == 0, said.output
    file = tmp_path / "onnx" / "model.onnx"
    size = file.stat().st_size
    assert f"{size:,} bytes" in said.output
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for rows, tokens in ((1, 1), (5, 16), (2, 32), (7, 3)):
        ids, mask = ids_and_mask(rows, tokens)
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros((rows, tokens), np.int64)}
        (found,) = session.run(None, {name: given[name] for name in names})
        last = mask.sum(1) - 1
        with torch.no_grad():
            if name == "classifier":  # without padding, row by row: the last token answers
                rows_ids = [ids[row, : last[row] + 1][None] for row in range(rows)]
                expected = torch.cat([student.model(input_ids=one).logits for one in rows_ids])
            else:
                padded = [student.model(input_ids=ids[row : row + 1, : last[row] + 1]).logits[0] for row in range(rows)]
        if name == "classifier":
            assert np.allclose(found, expected.numpy(), atol=1e-4)
            continue
        assert found.shape == (rows, tokens, 128)
        for row, one in enumerate(padded):
            assert np.allclose(found[row, : len(one)], one.numpy(), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").get_vocab() == tiny_words.tokenizer().get_vocab()


@pytest.mark.slow
def test_a_student_with_all_words_becomes_an_onnx_file_too_and_is_nothing_to_expand(tiny_words: ModuleType, tmp_path: Path) -> None:
    folder = tiny_words.write_model(tmp_path / "phase" / "student", "classification", num_hidden_layers=1)
    loaded = load_model(ModelSpec.model_validate({"model": str(folder), "head": "classification"}))
    assert "onnxruntime's answers differ by at most" in write_onnx(loaded, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, mask = ids_and_mask(3, 8)
    segments = torch.zeros_like(ids)
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": segments.numpy()})
    with torch.no_grad():
        assert np.allclose(found, loaded.model(input_ids=ids, attention_mask=mask).logits.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="the student has all words: its folder is a plain Hugging Face folder as it is"):
        expand(loaded, tmp_path / "expanded")
    assert not (tmp_path / "expanded").exists()


def test_the_command_finds_students_and_refuses_what_is_none(tiny_words: ModuleType, tmp_path: Path) -> None:
    _, _, folder = smaller(tmp_path / "phase", tiny_words, "bert")
    said = CliRunner().invoke(program, ["export", str(folder.parent), str(tmp_path / "all"), "--to", "expanded"])
    assert said.exit_code == 0, said.output
    assert "expanded to 410 words" in said.output
    again = CliRunner().invoke(program, ["export", str(folder), str(tmp_path / "all"), "--to", "expanded"])
    assert "is there already: give the name of a new folder" in str(again.exception)
    none = CliRunner().invoke(program, ["export", str(tmp_path / "nothing"), str(tmp_path / "other"), "--to", "onnx"])
    assert "expected the folder of a student, found none" in str(none.exception)


def test_a_tokenizer_in_which_two_tokens_share_an_id_is_noticed(tiny_words: ModuleType, tmp_path: Path) -> None:
    tokenizer = tiny_words.tokenizer()
    tokenizer.save_pretrained(str(tmp_path))
    check_tokenizer(tmp_path, tokenizer)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"w397": 397', '"w397": 396'), encoding="utf-8")
    with pytest.raises(ValueError, match="gives other ids than before to"):
        check_tokenizer(tmp_path, tokenizer)
