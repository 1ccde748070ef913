"""Small stores to test with: random rows and random answers, remembered so that tests can compare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import FeatureKey, FeatureSpec, ModelShape, PassInfo, Provenance, Row, RowWriter, StoreWriter, Task, Wiring, feature_spec
from store.features import Compression, StoreDtype
from store.shards import numpy_dtype

MADE = Provenance(command=("test",), versions={"numpy": np.__version__}, created="2026-01-01T00:00:00Z")
SHAPE = ModelShape(
    family="bert",
    head="masked_lm",
    layers=1,
    width=8,
    heads=2,
    kv_heads=2,
    head_width=4,
    vocab=2**15,
    causal=False,
    pre_norm=False,
    windows=(None,),
)


@dataclass
class Made:
    """A store and what was put into it, row by row."""

    path: Path
    rows: list[Row]
    values: dict[tuple[str, str], list[NDArray[Any]]] = field(default_factory=dict)
    """(key without pass, array) -> the stored values of each row."""


def spec(
    key: str, dtype: StoreDtype = "float32", width: int = 8, ids: tuple[int, ...] = (), compression: Compression = "none"
) -> FeatureSpec:
    return feature_spec(FeatureKey.parse(key), dtype, width, ids, compression=compression)


SPECS = (
    spec("hidden.1@all", "bfloat16"),
    spec("final@first"),
    spec("lm_logits@masked:top3", "float16", 50),
    spec("lm_logits@labels:select", "float32", 50, (1, 7)),
)


def pass_info(specs: tuple[FeatureSpec, ...] = SPECS) -> PassInfo:
    return PassInfo(
        teacher="abc",
        model="somewhere",
        dtype="float32",
        shape=SHAPE,
        wiring=Wiring(),
        requested=("hidden.1",),
        features=specs,
        statics=(),
        shipped=False,
        made=MADE,
    )


def make_rows(
    path: Path,
    groups: list[list[tuple[int, int]]],
    slot_tokens: int = 128,
    seed: int = 0,
    corpus: str = "c",
    splits: tuple[str, str] = ("train", "dev"),
    adding: bool = False,
) -> Made:
    """Rows of the given (length, labelled tokens), by group."""
    rng, rows = np.random.default_rng(seed), []
    with RowWriter.adding(path) if adding else RowWriter(path, slot_tokens) as writer:
        for number, group in enumerate(groups):
            made = [
                Row(
                    input_ids=rng.integers(0, 50, length, np.int32),
                    segments=rng.integers(0, 2, length, np.uint8),
                    documents=None,
                    token_labels=rng.integers(-100, 50, length, np.int32),
                    labelled=labelled,
                    label=None if number % 3 else float(number),
                    group=number,
                    copy=0,
                    split=splits[number % 4 == 3],
                    source="text.jsonl",
                    record=number,
                    part=part,
                    spans=[(0, 1)] * (number % 2),
                )
                for part, (length, labelled) in enumerate(group)
            ]
            writer.append_group(made)
            rows += made
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="none"), pad_id=0, tokenizer="t", corpus=corpus, building="b",
            options={"max_tokens": 16, "fields": ["text"]}, made=MADE,
        )  # fmt: skip
    return Made(path, rows)


def units(row: Row, positions: str) -> int:
    return {"all": len(row.input_ids), "masked": row.labelled, "labels": row.labelled}.get(positions, 1)


def answers(
    made: Made, shard: int, specs: tuple[FeatureSpec, ...], slots: NDArray[np.int64], seed: int = 0
) -> dict[FeatureKey, dict[str, NDArray[Any]]]:
    """Random bits for one shard, remembered in ``made`` row by row."""
    arrays: dict[FeatureKey, dict[str, NDArray[Any]]] = {}
    for number, feature in enumerate(specs):
        key = feature.feature
        for array in feature.arrays:
            rng = np.random.default_rng([seed, shard, number])
            dtype = numpy_dtype(array)
            top = min(2**15, np.iinfo(dtype).max) if dtype.kind in "iu" else 0
            parts = []
            for row in np.flatnonzero(slots == shard):
                shape = units(made.rows[row], key.positions), array.width
                parts.append(rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, top, shape, dtype))
                made.values.setdefault((feature.key, array.name), [])
            made.values[feature.key, array.name] += parts
            arrays.setdefault(key, {})[array.name] = np.concatenate(parts)
    return arrays


def make_store(
    path: Path,
    groups: list[list[tuple[int, int]]],
    specs: tuple[FeatureSpec, ...] = SPECS,
    slot_tokens: int = 128,
    seed: int = 0,
    corpus: str = "c",
) -> Made:
    """A store with one complete pass, ``bert``."""
    made = make_rows(path, groups, slot_tokens, seed, corpus)
    statics = {"1.query.weight": np.arange(64, dtype=np.float32).reshape(8, 8), "1.query.bias": np.arange(8, dtype=np.uint16)}
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", pass_info(specs), statics)
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(made, shard, specs, writer.rows.columns.slot, seed))
    return made


GROUPS = [[(30, 3)], [(7, 0), (9, 9)], [(60, 5)], [(1, 1)], [(50, 0)], [(128, 17)], [(20, 2)], [(15, 0)]]
"""Five slots of 128 tokens, one of them full; row lengths that do not line up with anything."""


def content(path: Path) -> list[Path]:
    """Files that readers look at."""
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "zarr.json" and file.suffix != ".lock"]
