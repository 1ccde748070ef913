"""Rows to plan with: those of the store, or the ones that it would get, built beside it and removed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from store import layout
from store.errors import StoreError
from store.manifest import Provenance
from teacher_dump.dump import ensure_rows
from teacher_dump.recipe import DumpRecipe


@contextmanager
def scratch_rows(recipe: DumpRecipe, tokenizer: PreTrainedTokenizerBase, made: Provenance) -> Iterator[tuple[Path, Path]]:
    """A store with the rows of ``recipe``, its own or one that is built beside it and removed, and a folder to try the disk.

    Raises:
        StoreError: the store's folder holds something else, or other rows.
        ValueError: the texts cannot be read.
    """
    folder = next(parent for parent in recipe.store.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".teacher-dump-plan-", dir=folder) as scratch:
        path = recipe.store
        if not layout.manifest(path).exists():
            if path.is_file() or (path.is_dir() and any(path.iterdir()) and not layout.building(path).exists()):
                raise StoreError(f"expected an empty or new folder for the store, but {path} holds something else; give another folder")
            path = Path(scratch) / "store"
        ensure_rows(recipe, tokenizer, path, made)
        yield path, Path(scratch)
