"""The recipe of a dump: which teacher answers what, over which rows, into which store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from online.figures import read_bytes
from online.models import ModelSpec
from online.rows_spec import RowsSpec
from online.sharding import Sharding
from store import layout
from store.features import Compression, StoreDtype
from store.intervention import Intervention
from store.remote import url_of
from store.strict import Strict, load_yaml


class FeatureRequest(Strict):
    """One feature to keep; in a recipe a bare key such as ``hidden.6@all`` stands for ``{key: hidden.6@all}``."""

    key: str
    """site.layer@positions:form; a layer may be ``*`` (all) or negative (-1 is the last)."""
    dtype: StoreDtype | None = None
    """Stored type of its numbers; the recipe's dtype by default. Likeliest and selected words have float types only."""
    keep_bits: int | None = Field(default=None, ge=1, le=23)
    """Mantissa bits that its numbers are rounded to; the recipe's by default, where its type is a float one."""
    compression: Compression | None = None
    """Of its arrays; the recipe's by default, and zstd for word predictions that leave places unused (``topKpP``, ``drawN``)."""
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
    intervention: Intervention | None = None
    """Answer with hidden states of each row's partner written in (DIITO): the teacher then runs twice over rows built with
    ``interchange``. ``{layers: [[3], [4]]}`` writes block 3 or block 4, as the draw of a pair says."""
    features: tuple[FeatureRequest, ...] = ()
    """What students will ask for; `student-train needs` prints it. The smallest set that covers it is stored."""
    dtype: StoreDtype = "float32"
    """Stored type of all features; float32 is exact, the others are a printed rounding error. int8 and float8 (e4m3) have a
    float32 scale for each token."""
    keep_bits: int | None = Field(default=None, ge=1, le=23)
    """Mantissa bits that numbers are rounded to before they are compressed, to nearest even: float32 has 23, float16 10 and bfloat16
    7. All by default."""
    compression: Compression = "none"
    """zstd (behind a bit shuffle) takes less disk and more time to read: worth it on slow disks, and with few keep_bits."""
    batch_tokens: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Padded tokens of one teacher batch; auto finds the largest that pays at the first start and keeps it for the pass."""
    memory: Annotated[float, Field(gt=0, le=1)] | str = 0.8
    """What a batch that auto finds may take on each rank beside the weights: a share of the memory that is free once the teacher is
    loaded, or bytes such as 20GB."""
    sharding: Sharding = Sharding(kind="auto")
    """How the teacher lies over the ranks of a job."""
    device: str | None = None
    """Where the teacher runs, such as cpu or cuda:1; by default the first GPU if there is one."""
    ship_layers: Literal["all"] | tuple[int, ...] = ()
    """Teacher blocks (from 1) whose weights the store carries, with embeddings and head, to initialise students from."""
    logs: Path | None = None
    """Folder where each rank of a run keeps a log and its events as JSON lines; by default STORE.logs/PASS_NAME beside the store."""
    prometheus: Path | None = None
    """Folder that the textfile collector of Prometheus's node exporter reads, for a file of each rank's figures; none by default."""

    @model_validator(mode="after")
    def _between_partners(self) -> Self:
        if self.intervention is not None and self.rows.interchange is None:
            raise ValueError("intervention: rows need partners to take hidden states of: build them with rows.interchange")
        return self

    @field_validator("features", mode="before")
    @classmethod
    def _bare_keys(cls, value: object) -> object:
        return [{"key": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    @field_validator("store")
    @classmethod
    def _on_this_machine(cls, value: Path) -> Path:
        if url_of(value):
            raise ValueError("expected a folder: dump there, and meanwhile `teacher-dump upload --follow` brings it to object storage")
        return value

    @field_validator("pass_name")
    @classmethod
    def _allowed(cls, value: str) -> str:
        return layout.pass_name(value)

    @field_validator("memory")
    @classmethod
    def _readable(cls, value: float | str) -> float | str:
        if isinstance(value, str) and read_bytes(value) is None:
            raise ValueError("expected a share of the free memory such as 0.8, or bytes such as 20GB")
        return value

    @field_validator("device")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else known_device(value)


def known_device(value: str) -> str:
    """``value``, if it names a device that this machine has; raises ValueError."""
    try:
        kind = torch.device(value).type
    except RuntimeError:
        raise ValueError("expected a device such as cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use; expected cpu")
    return value


def load(path: Path, overrides: Sequence[str] = ()) -> DumpRecipe:
    """Read a recipe; raises ValueError for a missing file, an unknown key or a wrong value."""
    return load_yaml(DumpRecipe, path, overrides)
