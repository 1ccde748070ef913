"""What of a teacher ships in its store: configuration and tokenizer always, chosen weights to start students from."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from online.models import LoadedModel
from store import layout
from store.errors import StoreError
from store.publish import sync_file, sync_folder
from teacher_dump.recipe import DumpRecipe
from teacher_dump.records import ERRORS, RECIPE


def shipped_blocks(layers: Literal["all"] | tuple[int, ...], available: int) -> tuple[int, ...]:
    """Blocks counted from 1 that ``layers`` of a recipe names; raises ValueError for one beyond the ``available`` ones."""
    if layers == "all":
        return tuple(range(1, available + 1))
    for layer in layers:
        if not 1 <= layer <= available:
            raise ValueError(f"ship_layers: the teacher has blocks 1 to {available}, found {layer}")
    return tuple(sorted(set(layers)))


def shipped_weights(loaded: LoadedModel, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The teacher's weights without the blocks that are not among ``blocks`` (from 1), under the teacher's own names."""
    if not blocks:
        return {}
    before, after = loaded.family.block.split("{i}")
    number = re.compile(rf"(?:^|(?<=\.)){re.escape(before)}(\d+){re.escape(after)}\.")
    weights = {}
    for name, weight in loaded.model.state_dict().items():
        match = number.search(name)
        if match is None or int(match[1]) + 1 in blocks:
            weights[name] = weight
    return weights


def ship(loaded: LoadedModel, recipe: DumpRecipe, errors: Mapping[str, float]) -> None:
    """Publish ``model/<pass>/``, whole or not at all, in place of what a killed run may have left there.

    It is a folder that Hugging Face reads: config.json, the tokenizer's files and, with ``ship_layers``, safetensors.
    """
    folder = layout.model(recipe.store, recipe.pass_name)
    temporary = layout.temporary(folder)
    for leftover in (temporary, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    write_folder(temporary, loaded, recipe, errors)
    weights = shipped_weights(loaded, shipped_blocks(recipe.ship_layers, loaded.shape.layers))
    if weights:
        logging.disable_progress_bar()
        try:
            loaded.model.save_pretrained(temporary, state_dict=weights)
        except SafetensorError as error:
            raise StoreError(f"cannot write the teacher's weights below {folder}: {error}; make room and start again") from None
        finally:
            logging.enable_progress_bar()
    for path in sorted(temporary.rglob("*")):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(temporary)
    temporary.rename(folder)
    sync_folder(folder.parent)


def write_folder(folder: Path, loaded: LoadedModel, recipe: DumpRecipe, errors: Mapping[str, float]) -> None:
    """Everything that ships but weights."""
    folder.mkdir(parents=True)
    loaded.model.config.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    tree = recipe.model_dump(mode="json")
    (folder / RECIPE).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / ERRORS).write_text(json.dumps(dict(errors), indent=1), encoding="utf-8")
