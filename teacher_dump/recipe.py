"""The recipe of a dump: which teacher answers what, over which rows, into which store."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from online.models import ModelSpec
from online.rows import RowsSpec
from store.features import FeatureKey
from store.strict import Strict

StoreDtype = Literal["float32", "float16", "bfloat16"]


class FeatureRequest(Strict):
    """One feature to keep; in a recipe a bare key such as ``hidden.6@all`` stands for ``{key: hidden.6@all}``."""

    key: str
    """site.layer@positions:form; a layer may be ``*`` (all) or negative (-1 is the last)."""
    dtype: StoreDtype | None = None
    """Stored type of its numbers; the recipe's dtype by default."""
    ids: tuple[int, ...] = ()
    """Vocabulary ids kept by the form ``select``."""
    words: tuple[str, ...] = ()
    """The same as words; each must be one token."""


class DumpRecipe(Strict):
    """A whole dump."""

    store: Path
    """Folder to write; made if absent, continued if it holds the same rows."""
    pass_name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9_-]*")
    """Name of this teacher's answers in the store."""
    teacher: ModelSpec
    rows: RowsSpec
    features: tuple[FeatureRequest, ...] = Field(min_length=1)
    dtype: StoreDtype = "float32"
    """Stored type of all features; float32 is exact, 16 bits are a printed rounding error."""
    batch_tokens: int = Field(default=4096, ge=16)
    """Padded tokens of one teacher batch."""
    ship_layers: Literal["all"] | tuple[int, ...] = ()
    """Teacher blocks (from 1) whose weights the store carries, with embeddings and head, to initialise students from."""

    @field_validator("features", mode="before")
    @classmethod
    def _bare_keys(cls, value: object) -> object:
        return [{"key": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
