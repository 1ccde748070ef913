"""What of a teacher ships in its store: configuration and tokenizer always, chosen weights to start students from."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from online.models import HEADS, LoadedModel
from online.quantised import is_quantised
from online.quiet import quiet
from online.sharding import Whole
from store import layout
from store.errors import StoreError
from store.publish import sync_file, sync_folder, writing
from teacher_dump.recipe import DumpRecipe
from teacher_dump.records import ERRORS, RECIPE, WORD_ERRORS, WordError, written


def shipped_blocks(layers: Literal["all"] | tuple[int, ...], available: int) -> tuple[int, ...]:
    """Blocks counted from 1 that ``layers`` of a recipe names; raises ValueError for one beyond the ``available`` ones."""
    if layers == "all":
        return tuple(range(1, available + 1))
    for layer in layers:
        if not 1 <= layer <= available:
            raise ValueError(f"ship_layers: the teacher has blocks 1 to {available}, found {layer}")
    return tuple(sorted(set(layers)))


def shipped_weights(loaded: LoadedModel, blocks: Sequence[int], keep: bool = True) -> dict[str, Tensor]:
    """The teacher's weights in main memory without the blocks that are not among ``blocks`` (from 1), under the teacher's own names.

    All ranks of a sharded teacher gather them, one after the other; those that do not ``keep`` them return none.
    """
    if not blocks:
        return {}
    if is_quantised(loaded.model):
        raise ValueError(
            "ship_layers: the teacher's weights are quantised; leave it out, and start students from a folder (student.source)"
        )
    before, after = loaded.family.block.split("{i}")
    number = re.compile(rf"(?:^|(?<=\.)){re.escape(before)}(\d+){re.escape(after)}\.")
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, lying in loaded.model.state_dict(keep_vars=True).items():
        match = number.search(name)
        if match is None or int(match[1]) + 1 in blocks:
            if id(lying) not in copies:  # tied weights are written once
                whole = loaded.weights.whole(lying).detach()
                copies[id(lying)] = whole.cpu() if keep else whole.new_empty(0)
            weights[name] = copies[id(lying)]
    return weights if keep else {}


def ship(
    loaded: LoadedModel, recipe: DumpRecipe, weights: Mapping[str, Tensor], errors: Mapping[str, float], words: Mapping[str, WordError]
) -> None:
    """Publish ``model/<pass>/``, whole or not at all, in place of what a killed run may have left there.

    It is a folder that Hugging Face reads: config.json, the tokenizer's files and, with ``ship_layers``, safetensors.
    """
    folder = layout.model(recipe.store, recipe.pass_name)
    temporary = layout.temporary(folder)
    with writing(folder):
        for leftover in (temporary, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        write_folder(temporary, loaded, recipe, errors, words)
        if weights:
            model = loaded.model
            if not isinstance(loaded.weights, Whole):  # a sharded model would gather them once more
                with torch.device("meta"):
                    plain = type(model.config).from_dict(model.config.to_dict())
                    model = HEADS[loaded.shape.head].from_config(plain)  # type: ignore[attr-defined]
            try:
                with quiet():
                    model.save_pretrained(temporary, state_dict=dict(weights))
            except SafetensorError as error:
                raise StoreError(f"cannot write the teacher's weights below {folder}: {error}; make room and start again") from None
        for path in sorted(temporary.rglob("*")):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)


def write_folder(
    folder: Path, loaded: LoadedModel, recipe: DumpRecipe, errors: Mapping[str, float], words: Mapping[str, WordError]
) -> None:
    """Everything that ships but weights."""
    folder.mkdir(parents=True)
    config = loaded.model.config
    if hasattr(config, "quantization_config"):  # students made of it have floats
        config = type(config).from_dict({name: value for name, value in config.to_dict().items() if name != "quantization_config"})
    config.save_pretrained(folder)
    assert loaded.tokenizer is not None
    try:
        loaded.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no type of its own
            raise
        raise StoreError(f"cannot write the tokenizer below {folder}: {error}; make room and start again") from None
    tree = recipe.model_dump(mode="json")
    (folder / RECIPE).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / ERRORS).write_text(json.dumps(dict(errors), indent=1), encoding="utf-8")
    if words:
        (folder / WORD_ERRORS).write_text(written(words), encoding="utf-8")
