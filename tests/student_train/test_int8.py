"""Students as int8 ONNX files: smaller, run by onnxruntime alone, and near PyTorch on a model whose weights int8 holds well."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from online.models import ModelSpec, load_model
from student_train.cli import program


@pytest.mark.slow
def test_an_int8_file_is_smaller_and_answers_nearly_as_pytorch(tiny_words: ModuleType, tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    folder = tiny_words.write_model(tmp_path / "student", "classification", **sizes)
    said = CliRunner().invoke(program, ["export", str(folder), str(tmp_path / "onnx"), "--to", "onnx", "--int8"])
    assert said.exit_code == 0, said.output
    whole, small = tmp_path / "onnx" / "model.onnx", tmp_path / "onnx" / "model.int8.onnx"
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    lines = said.output.splitlines()
    assert [f"{file}: {file.stat().st_size:,} bytes" in line for file, line in zip((whole, small), lines, strict=True)] == [True, True]
    found = re.search(r"at most ([0-9.]+)% of the largest from PyTorch's, by ([0-9.]+)% on average", lines[1])
    assert found is not None
    worst, mean = float(found[1]), float(found[2])
    assert 0 < mean <= worst
    loaded = load_model(ModelSpec.model_validate({"model": str(folder), "head": "classification"}))
    session = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
    ids = torch.randint(5, 400, (6, 9), generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids.numpy(), "attention_mask": np.ones((6, 9), np.int64), "token_type_ids": np.zeros((6, 9), np.int64)}
    (answers,) = session.run(None, {entry.name: given[entry.name] for entry in session.get_inputs()})
    with torch.no_grad():
        expected = loaded.model(input_ids=ids).logits.numpy()
    assert 0 < np.abs(answers - expected).max() < 0.2 * np.abs(expected).max()


def test_int8_is_refused_for_a_plain_folder(tmp_path: Path) -> None:
    said = CliRunner().invoke(program, ["export", str(tmp_path), str(tmp_path / "out"), "--to", "expanded", "--int8"])
    assert "--int8 goes with --to onnx" in str(said.exception)
