"""A row on its way into a store, and what a store keeps of it beside its tokens."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.features import ArraySpec

NUMBERS = ("offset", "length", "labelled", "labelled_offset", "group", "copy", "split")
"""Columns of the array ``rows/numbers``: first token and tokens of the row; its labelled tokens and those of earlier rows in
the slot; its group, counted in the slot; masking copy; place of its split in RowsInfo.splits."""

ROW_ARRAYS: dict[str, ArraySpec] = {
    "numbers": ArraySpec(name="numbers", dtype="int32", width=len(NUMBERS)),
    "label": ArraySpec(name="label", dtype="float64", width=1),
    "domain": ArraySpec(name="domain", dtype="int32", width=1),
    "draw": ArraySpec(name="draw", dtype="int32", width=1),
}
"""What readers need of each row, kept in slots like the features of positions ``row``; domain (its place in RowsInfo.domains) only where
rows have one, draw where they stand in pairs (store.pairs)."""

TOKEN_ARRAYS: dict[str, ArraySpec] = {
    "input_ids": ArraySpec(name="input_ids", dtype="int32", width=1),
    "segments": ArraySpec(name="segments", dtype="uint8", width=1),
    "documents": ArraySpec(name="documents", dtype="uint16", width=1),
    "token_labels": ArraySpec(name="token_labels", dtype="int32", width=1),
    "phrases": ArraySpec(name="phrases", dtype="uint16", width=1),
    "interchange": ArraySpec(name="interchange", dtype="int32", width=1),
}
"""What is kept for each token of a row; all but input_ids only where rows have it."""

SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
COLUMNS = pa.schema(
    [
        ("split", pa.string()),
        ("copy", pa.int32()),
        ("length", pa.int32()),
        ("label", pa.float64()),
        ("source", pa.string()),
        ("record", pa.int64()),
        ("part", pa.int32()),
        ("spans", pa.list_(SPAN)),
    ]
)
"""The Parquet files beside them, for people: one Parquet row for each row, in the order of their numbers."""

IDENTITY = ("source", "record", "part", "copy")
"""Columns that tell the rows of one build apart."""


@dataclass
class Row:
    """One model input of n tokens, as row building hands it to the store."""

    input_ids: NDArray[np.int32]
    """[n] as the model sees them: masking, if any, is done."""
    segments: NDArray[np.uint8] | None
    """[n] token types."""
    documents: NDArray[np.uint16] | None
    """[n] number of the packed document that a token belongs to, 65535 for padding that the row keeps."""
    token_labels: NDArray[np.int32] | None
    """[n] label of each token or -100; only where labels do not follow from the tokens (masked words, token classes)."""
    labelled: int
    """Number of tokens that are scored against a label; for causal rows n minus the number of documents."""
    label: float | None
    """Class number or score of the row."""
    group: int
    """Rows of one group carry the same number."""
    copy: int
    """Which masking of the text this is."""
    split: str
    source: str
    """File the text came from."""
    record: int
    """Number of the text in its source."""
    part: int
    """Number of the row among those made from the record."""
    spans: list[tuple[int, int]]
    """Marked token ranges, half open."""
    domain: int | None = None
    """Number of the row's domain; in all rows of a store or in none."""
    phrases: NDArray[np.uint16] | None = None
    """[n] number of the phrase that a token belongs to, from 1 on in the order of the tokens; 0 for those of none, such as special
    tokens."""
    interchange: NDArray[np.int32] | None = None
    """[n] which token of the other row of its pair takes a token's place (store.pairs), -1 for none; in all rows of a store or in none."""
    draw: int | None = None
    """Random number that both rows of a pair carry, by which they choose among alternatives; where rows have ``interchange``."""
