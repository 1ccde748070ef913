"""Weights of chosen teacher blocks, read from safetensors under the names that a shallower student gives them."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from online.families import FAMILIES
from store.shape import Head


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that a student starts from."""

    folder: Path
    head: Head
    shipped: str | None = None
    """The pass whose store carries the folder; None for any other folder."""


def block_pattern(family: str) -> re.Pattern[str]:
    """Finds a block's number (counted from 0) in the name of a weight, with or without the base model's prefix."""
    before, after = FAMILIES[family].block.split("{i}")
    return re.compile(rf"(?:^|(?<=\.)){re.escape(before)}(\d+){re.escape(after)}\.")


def check_blocks(source: Source, family: str, blocks: Sequence[int]) -> None:
    """Refuse a folder that lacks weights of ``blocks`` (counted from 1), by their names alone.

    Raises:
        ValueError: no weights, no such block, or files that cannot be read; the message names the option that mends it.
    """
    numbers = block_pattern(family)
    found = {int(match[1]) + 1 for _, names in _files(source, blocks) for name in names if (match := numbers.search(name))}
    if absent := sorted(set(blocks) - found):
        raise ValueError(f"{source.folder} holds no weights of block {', '.join(map(str, absent))}; {_remedy(source, blocks)}")


def read_weights(source: Source, family: str, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Everything outside blocks, and ``blocks`` (counted from 1) renumbered in their order; other blocks are never read.

    Raises:
        ValueError: as :func:`check_blocks`.
    """
    check_blocks(source, family, blocks)
    numbers = block_pattern(family)
    places: dict[int, list[int]] = {}
    for place, block in enumerate(blocks):
        places.setdefault(block - 1, []).append(place)
    weights: dict[str, Tensor] = {}
    for file, names in _files(source, blocks):
        for name in names:
            match = numbers.search(name)
            if match is None:
                weights[name] = file.get_tensor(name).clone()  # what safetensors gives is a view of the file
            else:
                for place in places.get(int(match[1]), ()):
                    weights[name[: match.start(1)] + str(place) + name[match.end(1) :]] = file.get_tensor(name).clone()
    return weights


def _files(source: Source, blocks: Sequence[int]) -> Iterator[tuple[Any, list[str]]]:
    """Each safetensors file of the folder, open, with the names of its tensors."""
    folder = source.folder
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / name for name in _indexed(index)]
    else:
        raise ValueError(f"{folder} holds no model.safetensors; {_remedy(source, blocks)}")
    for path in files:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            yield file, list(file.keys())


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is no index of safetensors files") from None
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside its folder: {name}")
    return names


def _remedy(source: Source, blocks: Sequence[int]) -> str:
    if source.shipped is None:
        return "expected the safetensors files of a whole model"
    wanted = ", ".join(str(block) for block in sorted(set(blocks))) or "1"  # whichever block it is, embeddings and head come along
    return f"dump pass {source.shipped} with 'ship_layers: [{wanted}]', or give the teacher's folder as student.source"
