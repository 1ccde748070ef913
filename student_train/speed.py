"""What a model takes where it is deployed: parameters, bytes of its folder's weights, and the time of a batch."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from online.models import LoadedModel, forward
from store.rows import Row
from student_train.held_out_texts import Texts

WARM_UP = 2
"""Batches that are run before the clock starts."""


@dataclass(frozen=True)
class Deployment:
    """A model at work; times are of a forward pass with all its outputs, without tokenising."""

    parameters: int
    bytes: int
    """Of the files of weights in its folder, in the dtype that they are saved in."""
    threads: int
    device: str
    dtype: str
    rows: int
    """Rows of the batch."""
    tokens: int
    """Padded tokens of each."""
    milliseconds: float | None
    """Median of the repeats, None where none was asked for."""
    repeats: int


def deployment(loaded: LoadedModel, folder: Path, texts: Texts, rows: int, repeats: int) -> Deployment:
    """Run the first ``rows`` rows of ``texts`` as one batch, ``repeats`` times."""
    first: list[Row] = [row for group in texts.groups for row in group][:rows]
    device = next(loaded.model.parameters()).device
    batch = texts.batch(first).to(device)
    times = []
    with torch.no_grad():
        for number in range(WARM_UP + repeats if repeats else 0):
            started = time.perf_counter()
            forward(loaded, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= WARM_UP:
                times.append(1000 * (time.perf_counter() - started))
    return Deployment(
        parameters=loaded.model.num_parameters(),
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        threads=torch.get_num_threads(),
        device=device.type,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        rows=len(first),
        tokens=batch.input_ids.shape[1],
        milliseconds=statistics.median(times) if times else None,
        repeats=repeats,
    )
