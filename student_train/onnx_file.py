"""A student as one ONNX file that takes the ids of its teacher's tokenizer: its map of words and its small table lie inside.

Shapes: B rows, T padded tokens, K words of the head, C outputs of a task head, W width.
"""

import importlib.util
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from online.batch import Batch, dense
from online.capture import ROW_HEADS, Capture
from online.models import LoadedModel, forward
from store.publish import sync_file, sync_folder
from student_train.export import check_tokenizer
from student_train.methods.task_loss import task_key

FILE = "model.onnx"
INT8 = "model.int8.onnx"
CLOSE = 1e-4
"""Logits may differ by this part of the largest one from PyTorch's."""
_LARGEST = 1 << 31
"""Bytes of weights that one file cannot hold any more (protobuf); beyond, they go into a second one beside it."""
_TRIED = ((3, 7), (1, 1), (2, 12), (5, 9))
"""Rows and tokens on which the file is compared: the first make the graph."""


class _Student(nn.Module):
    """The student with plain tensors in and out."""

    def __init__(self, student: LoadedModel) -> None:
        super().__init__()
        self.loaded, self.model = student, student.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """[B, T, K] word logits, [B, C] or [B, T, C] task logits, or [B, T, W] last hidden states."""
        rows_B = torch.zeros_like(input_ids[:, 0])
        batch = Batch(rows_B, input_ids, attention_mask.bool(), token_type_ids, None, None, None, None, rows_B)
        vars(batch)["padded_behind"] = True  # inputs are said to be so; to look at them here would fix one mask in the graph
        shape = self.loaded.shape
        if shape.head in ROW_HEADS:  # which token answers for a row is read from the mask
            key = task_key(shape)
            with Capture(self.loaded, [key]) as capture:
                forward(self.loaded, batch)
            return dense(capture.features(batch), key)
        output = forward(self.loaded, batch)
        answer = output.last_hidden_state if shape.head == "base" else output.logits
        assert isinstance(answer, Tensor)
        return answer


def write_onnx(student: LoadedModel, folder: Path, *, int8: bool = False) -> str:
    """Write ``folder/model.onnx`` and the tokenizer's files, and compare the file with PyTorch by running it; says what was found.

    With ``int8`` also ``folder/model.int8.onnx``, whose difference from PyTorch is told but not limited: it is what quantising costs.

    Inputs ``input_ids``, ``attention_mask`` and, in models with segments, ``token_type_ids``, all [B, T] int64 with any B and T; the
    output is ``logits``, or ``last_hidden_state`` without a head. Padding stands on the right.

    Raises:
        ValueError: packages are missing, this model cannot be written so, or the file answers otherwise than PyTorch.
    """
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"ONNX needs {' and '.join(lacking)}: install teachercache[export]")
    model = _Student(student).eval().float()
    segments = student.family.segments and getattr(student.model.config, "type_vocab_size", 2) > 1
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    _write(model, student, names, writing / FILE)
    worst, _ = _differences(model, student, names, writing / FILE)
    if not worst <= CLOSE:
        raise ValueError(
            f"the ONNX file answers otherwise than PyTorch, by {worst:.1e} of the largest answer; at most {CLOSE:g} was expected"
        )
    said = {FILE: f"onnxruntime's answers differ by at most {worst:.1e} of the largest from PyTorch's"}
    if int8:
        _quantise(model, writing)
        worst, mean = _differences(model, student, names, writing / INT8)
        said[INT8] = (
            f"its answers to rows of random words differ by at most {worst:.1%} of the largest from PyTorch's, by {mean:.1%} on average; "
            "measure it on texts of the task"
        )
    if student.tokenizer is not None:
        student.tokenizer.save_pretrained(str(writing))
        check_tokenizer(writing, student.tokenizer)
    sizes = {file: sum(path.stat().st_size for path in writing.glob(f"{file}*")) for file in said}
    for path in writing.iterdir():
        sync_file(path)
    sync_folder(writing)
    writing.rename(folder)
    sync_folder(folder.parent)
    parameters = f"{student.model.num_parameters():,} parameters"
    return "\n".join(f"{folder / file}: {sizes[file]:,} bytes, {parameters}; {differs}" for file, differs in said.items())


def _write(model: _Student, student: LoadedModel, names: list[str], file: Path) -> None:
    config = student.model.config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and student.family.positions_after_padding:
        longest -= config.pad_token_id + 1
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    talkative = logging.getLogger("torch.onnx._internal.exporter._registration")  # it misses torchvision
    level = talkative.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own future, and that two inputs share an axis
        talkative.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                _inputs(student, len(names), *_TRIED[0]),
                input_names=names,
                output_names=["last_hidden_state" if student.shape.head == "base" else "logits"],
                dynamic_shapes=tuple(axes for _ in names),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever it meets
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{student.shape.family} with the head {student.shape.head} cannot be written as ONNX: {first}") from error
        finally:
            talkative.setLevel(level)
    assert program is not None
    for node in program.model.graph.all_nodes():  # each says which lines of Python it comes from
        node.metadata_props.clear()
    program.save(str(file), external_data=_large(model))


def _large(model: _Student) -> bool:
    return sum(weight.numel() * 4 for weight in model.parameters()) > _LARGEST


def _quantise(model: _Student, folder: Path) -> None:
    """Weights of matrices and tables as int8, each output of a matrix with a scale of its own; activations as the program runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()  # it advises a preparation that is for convolutions
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            folder / FILE, folder / INT8, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=_large(model)
        )
    finally:
        root.setLevel(level)


def _differences(model: _Student, student: LoadedModel, names: list[str], file: Path) -> tuple[float, float]:
    """The largest difference between both programs' answers, and the mean of each try's, as parts of the try's largest answer."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst, means = 0.0, []
    for rows, tokens in _TRIED:
        inputs = _inputs(student, len(names), rows, tokens)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        with torch.no_grad():
            expected = model(*inputs).numpy()
        real = inputs[1].bool().numpy() if expected.ndim == 3 else np.ones(len(expected), np.bool_)
        parts = np.abs(found - expected)[real] / np.abs(expected[real]).max()
        worst = max(worst, float(parts.max()))
        means.append(float(parts.mean()))
    return worst, float(np.mean(means))


def _inputs(student: LoadedModel, count: int, rows: int, tokens: int) -> tuple[Tensor, ...]:
    """Random ids of all words in rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(rows * 1000 + tokens)
    embedding = student.model.get_input_embeddings()
    words = len(embedding.places) if hasattr(embedding, "places") else embedding.num_embeddings
    ids_BT = torch.randint(words, (rows, tokens), generator=generator)
    lengths_B = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask_BT = (torch.arange(tokens) < lengths_B[:, None]).long()
    return (ids_BT, mask_BT, torch.zeros_like(ids_BT))[:count]
