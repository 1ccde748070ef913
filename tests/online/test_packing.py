"""Cutting and packing lose no token and keep documents apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.corpus import Record
from online.drafts import Draft
from online.packing import Packer, Wrapping, split

BERT = Wrapping(np.array([1], np.int32), np.array([2], np.int32))
BARE = Wrapping(np.array([], np.int32), np.array([], np.int32))


def contents(lengths: list[int]) -> list[tuple[Record, np.ndarray]]:
    ends = np.cumsum(lengths)
    return [
        (Record(0, "a", n, n, "train", {}), np.arange(end - length, end, dtype=np.int32) + 10)
        for n, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def pack(lengths: list[int], wrapping: Wrapping, max_length: int) -> list[Draft]:
    packer = Packer(wrapping, max_length)
    return [draft for record, content in contents(lengths) for draft in packer.add(record, content)] + list(packer.flush())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(3, 20), st.sampled_from([BERT, BARE]))
def test_packed_rows_are_full_and_hold_every_token_once_in_order(lengths: list[int], max_length: int, wrapping: Wrapping) -> None:
    drafts = pack(lengths, wrapping, max_length)
    text = np.concatenate([draft.ids[~draft.added] for draft in drafts])
    np.testing.assert_array_equal(text, np.arange(sum(lengths)) + 10)
    assert all(max_length - wrapping.length <= len(draft.ids) <= max_length for draft in drafts[:-1])
    assert len({(draft.record.ordinal, draft.part) for draft in drafts}) == len(drafts)
    starts = np.cumsum([0, *lengths[:-1]]) + 10
    for draft in drafts:
        assert draft.documents is not None
        assert draft.documents.dtype == np.uint16
        pieces = np.split(draft.ids, np.flatnonzero(np.diff(draft.documents)) + 1)
        assert sorted(set(draft.documents.tolist())) == list(range(len(pieces)))
        for number, piece in enumerate(pieces):
            content = piece[len(wrapping.prefix) : len(piece) - len(wrapping.suffix)]
            np.testing.assert_array_equal(piece, np.concatenate([wrapping.prefix, content, wrapping.suffix]))
            assert number == 0 or content[0] in starts  # only a row's first piece may go on with a document
            assert not set(content[1:].tolist()) & set(starts.tolist())


@given(st.integers(1, 200), st.integers(3, 30))
def test_the_parts_of_a_split_document_follow_one_another(length: int, max_length: int) -> None:
    [(record, content)] = contents([length])
    parts = list(split(record, content, BERT, max_length))
    np.testing.assert_array_equal(np.concatenate([part.ids[1:-1] for part in parts]), content)
    assert [part.part for part in parts] == list(range(len(parts)))
    assert all(len(part.ids) == max_length for part in parts[:-1])
    assert all(part.ids[0] == 1 and part.ids[-1] == 2 and part.added.sum() == 2 for part in parts)


def test_a_packed_row_names_the_first_of_its_documents() -> None:
    drafts = pack([4, 4, 20], BARE, 8)
    assert [(draft.record.number, draft.part) for draft in drafts] == [(0, 0), (2, 0), (2, 1), (2, 2)]
    assert drafts[0].documents is not None
    assert drafts[0].documents.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("lengths", "rows"), [([6], [8]), ([5, 9], [7, 8, 5]), ([3, 1], [8]), ([4, 1], [6, 3])])
def test_a_row_ends_early_only_where_special_tokens_and_one_word_do_not_fit(lengths: list[int], rows: list[int]) -> None:
    assert [len(draft.ids) for draft in pack(lengths, BERT, 8)] == rows
