"""Rows that keep their padding, so that answers on it can be stored and compared: GLMD without its pad mask (Tan et al. 2023, table 4).

Padding is the document ``PADDING`` of its row. It sees the text and not itself, and no token of the text sees it, as in a batch that
transformers pads. Beyond the window of a block with sliding attention it sees nothing, and its answers are those of the attention's
implementation.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from online.batch import IGNORED, PADDING
from store.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from online.rows_spec import RowsSpec


def filled(row: Row, tokens: int, pad_id: int) -> Row:
    """``row`` with padding behind its n tokens up to ``tokens``; nothing of it is masked or labelled."""
    length = len(row.input_ids)
    room = (0, tokens - length)
    labels, segments, phrases = row.token_labels, row.segments, row.phrases
    return replace(
        row,
        input_ids=np.pad(row.input_ids, room, constant_values=pad_id),
        segments=None if segments is None else np.pad(segments, room),
        documents=np.pad(np.zeros(length, np.uint16), room, constant_values=PADDING),
        token_labels=None if labels is None else np.pad(labels, room, constant_values=IGNORED),
        phrases=None if phrases is None else np.pad(phrases, room),
    )


def padding_problems(spec: "RowsSpec") -> "Iterator[tuple[bool, str]]":
    """What ``padding`` does not go with: whether it is given, and what is wrong then."""
    yield spec.objective != "mlm", "padding: expected objective mlm; it is for word predictions of masked language models"
    yield spec.long != "truncate", f"padding: expected rows of one text (long: truncate), found long: {spec.long}"
    yield spec.interchange is not None, "padding: rows in pairs (interchange) take states of tokens alone; leave one of the two out"
