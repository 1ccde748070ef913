"""The recipe of augmented texts, and the corpus file that is made of it, one step before rows are built."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from online.augment import AUGMENTING, AugmentSpec, Copy, augmented
from online.cloze import Cloze
from online.corpus import SourceSpec, read_records
from online.fingerprints import tokenizer_fingerprint
from online.models import LoadedModel, ModelSpec, load_model
from online.word_vectors import WordVectors, WordVectorsSpec
from store.remote import url_of
from store.strict import Strict, load_yaml
from teacher_dump.augmented_file import Survey, made_before, survey, write
from teacher_dump.recipe import known_device


class AugmentRecipe(Strict):
    """A corpus with copies of its texts in which words are replaced (TinyBERT's data augmentation)."""

    output: Path
    """Parquet file to write: all columns of the sources, `original` (number of a record, from 0) and `copy` (0 for the record itself,
    its copies from 1, behind it)."""
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    """Training texts, whose files all have the same columns."""
    augment: AugmentSpec
    language_model: ModelSpec
    """Masked language model that fills in words; its head is masked_lm."""
    word_vectors: WordVectorsSpec | None = None
    """Neighbours of words that are several tokens; without, those stay as they are."""
    device: str | None = None
    """Where the language model runs, such as cpu or cuda:1; by default the first GPU if there is one."""

    @field_validator("output")
    @classmethod
    def _parquet(cls, value: Path) -> Path:
        if url_of(value) or value.suffix != ".parquet":
            raise ValueError("expected a file on this machine that ends in .parquet")
        return value

    @field_validator("device")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else known_device(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.language_model.head != "masked_lm":
            raise ValueError(f"language_model.head: expected masked_lm, found {self.language_model.head}")
        if other := [source.split for source in self.sources if source.split != "train"]:
            raise ValueError(
                f"sources: expected texts to train with, found split {other[0]}; give texts to evaluate with to the rows as they are"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> AugmentRecipe:
    """Read a recipe; raises ValueError for a missing file, an unknown key or a wrong value."""
    return load_yaml(AugmentRecipe, path, overrides)


def augment(recipe: AugmentRecipe) -> str:
    """Make the corpus file of ``recipe`` unless it is there; what was done.

    Raises:
        ValueError: the recipe asks for something that cannot be had, a text cannot be read, or the output is another kind of file.
        StoreError: the output was made of something else, or another process writes it.
    """
    found = survey(recipe.sources, recipe.augment.columns, recipe.output)
    vectors = None if recipe.word_vectors is None else WordVectors.read(recipe.word_vectors)
    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(recipe.language_model, device=device)
    cloze = Cloze(loaded, device, recipe.augment.max_length)
    made = _made_of(recipe, found, loaded, vectors)
    if (there := made_before(recipe.output, made)) is not None:
        return f"{recipe.output}: {there:,} records, nothing was left to do"
    with tqdm(desc="augment", total=found.records, unit=" records", unit_scale=True) as progress:
        records = read_records(recipe.sources, found.schema.names)
        copies = _watched(augmented(records, recipe.augment, cloze, vectors), progress)
        written = write(recipe.output, copies, found.schema, made, recipe.augment.columns)
    left_out = found.records * (1 + recipe.augment.copies) - written
    dropped = f"; {left_out:,} copies that repeat another were dropped" if left_out else ""
    return (
        f"{recipe.output}: {written:,} records, {found.records:,} of them originals{dropped}\n"
        "Name it in rows.sources of a dump: `teacher-dump rows` and `teacher-dump run` read it as any other file."
    )


def _made_of(recipe: AugmentRecipe, found: Survey, loaded: LoadedModel, vectors: WordVectors | None) -> dict[str, Any]:
    """Everything that the records of the file depend on, by content; names of files and the device do not count."""
    assert loaded.tokenizer is not None
    return {
        "version": AUGMENTING,
        "corpus": found.fingerprint,
        **{f"augment.{name}": value for name, value in recipe.augment.model_dump(mode="json").items()},
        "language model": loaded.fingerprint,
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "word vectors": None if vectors is None else vectors.fingerprint,
    }


def _watched(copies: Iterator[Copy], progress: "tqdm[Any]") -> Iterator[Copy]:
    """The copies, while ``progress`` counts the records that they are of."""
    for copy in copies:
        yield copy
        progress.update(copy.copy == 0)
