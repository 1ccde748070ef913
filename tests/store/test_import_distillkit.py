"""DistillKit's files become a store: bytes mean what its format says, and settings that contradict them are noticed."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign import (
    VOCAB,
    best,
    bring_in,
    check_next_words,
    distillkit_row,
    follows,
    next_words,
    packed_bits,
    sentences,
    write_distillkit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from store import Store, StoreError
from store.imports import DistillKit, natural, quantised
from store.imports.quantised import Bin, Quantisation

TABLE = follows()
LEGACY = ("packed_indices", "exact_values", "coeffs")
EXACT = Quantisation(d=VOCAB, k=6, exact_k=6, delta_encoding=False)


def test_captures_of_distillkit_are_stored_at_the_token_before(tmp_path: Path) -> None:
    texts = sentences(33)
    for number in range(3):
        write_distillkit(tmp_path / f"data_{9 + number}.parquet", [distillkit_row(ids, 6, TABLE) for ids in texts[11 * number :][:11]])
    files = sorted(tmp_path.glob("*.parquet"), key=natural)
    bring_in(DistillKit(files, None, VOCAB, "float32", EXACT), tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert [ids for ids, _ in next_words(store, 6)] == texts
    assert check_next_words(store, 6, TABLE) == sum(len(ids) - 1 for ids in texts)
    assert [array.name for array in store.manifest.rows.token_arrays] == ["input_ids"]
    assert store.rows.about(12)["source"].endswith("data_10.parquet")


def test_fewer_words_can_be_kept_and_reading_can_begin_anywhere(tmp_path: Path) -> None:
    texts = sentences(33)
    for number in range(3):
        write_distillkit(tmp_path / f"data_{number}.parquet", [distillkit_row(ids, 6, TABLE) for ids in texts[11 * number :][:11]])
    source = DistillKit(sorted(tmp_path.glob("*.parquet")), 3, VOCAB, "float32", EXACT)
    for start in (0, 1, 7, 11, 20, 32, 33):
        found = [sample.input_ids.tolist() for (sample,) in source.records(start, answers=False)]
        assert found == texts[start:]
    bring_in(source, tmp_path / "store")
    assert check_next_words(Store.open(tmp_path / "store"), 3, TABLE)


def test_packed_rows_keep_their_documents_apart(tmp_path: Path) -> None:
    """Each document was cut to its positions, so that the answer at its last token has no next word."""
    first, second = [1, 2, 3, 4, 5], [6, 7, 8]
    rows = [distillkit_row(ids, 6, TABLE) for ids in (first, second)]
    joined = {name: [*(rows[0][name][:4]), *(rows[1][name][:2])] for name in rows[0]}
    joined["attention_mask"] = [1, 1, 1, 1, 2, 2]
    bring_in(DistillKit([write_distillkit(tmp_path / "a.parquet", [joined])], None, VOCAB, "float32", EXACT), tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.tokens("documents", np.array([0])).tolist() == [0, 0, 0, 0, 1, 1]
    ((ids, places),) = next_words(store, 6)
    assert ids == [1, 2, 3, 4, 6, 7]
    assert sorted(places) == [0, 1, 2, 4]
    assert check_next_words(store, 6, TABLE) == 4


def test_plain_words_and_values_need_no_settings(tmp_path: Path) -> None:
    texts = sentences(5)
    words = [[best(TABLE, before, 4) for before in ids[:-1]] for ids in texts]
    table = pa.table(
        {
            "input_ids": texts,
            "token_ids": [[[word for word, _ in some] for some in row] for row in words],
            "top_values": pa.array([[[x for _, x in some] for some in row] for row in words], pa.list_(pa.list_(pa.float32()))),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    bring_in(DistillKit([tmp_path / "a.parquet"], 4, VOCAB, "float32", None), tmp_path / "store")
    assert check_next_words(Store.open(tmp_path / "store"), 4, TABLE)


def test_the_bytes_mean_what_the_format_says() -> None:
    """Two positions of 12 words: 2 exact ones, a curve of three terms through the rest, and two bins of what it is off by."""
    form = Quantisation(
        d=1000, k=12, exact_k=2, exact_dtype="float16", polynomial_terms=(0, 1, "sqrt"), term_dtype="float32",
        residual_bins=(
            Bin(scale_dtype="float32", element_bits=3, num_elements=5),
            Bin(scale_dtype="float16", element_bits=1, num_elements=2),
        ),
        delta_encoding=False,
    )  # fmt: skip
    positions = [
        ([-0.5, -1.25], [-3.0, -0.125, -0.25], (0.0625, [0, 7, 4, 3, 5]), (0.5, [1, 0])),
        ([-0.75, -2.0], [-4.0, -0.25, 0.0], (0.25, [4, 4, 4, 0, 1]), (0.25, [0, 0])),
    ]
    data, expected = [], []
    for exact, terms, (scale, some), (other_scale, few) in positions:
        data.append(
            struct.pack("<2e3f", *exact, *terms) + struct.pack("<f", scale) + bytes(packed_bits(some, 3))
            + struct.pack("<e", other_scale) + bytes(packed_bits(few, 1))
        )  # fmt: skip
        curve = [terms[0] + terms[1] * t + terms[2] * math.sqrt(t) for t in range(10)]
        off = [(number - 4) * scale for number in some] + [(2 * bit - 1) * other_scale for bit in few] + [0.0] * 3
        expected.append([*exact, *(c + o for c, o in zip(curve, off, strict=True))])
    assert form.value_bytes == len(data[0]) == 4 + 12 + 4 + 2 + 2 + 1
    bytes_nB = np.frombuffer(b"".join(data), np.uint8).reshape(2, -1)
    np.testing.assert_allclose(quantised.log_probs(bytes_nB, form), expected, rtol=1e-6)
    deltas = form.model_copy(update={"delta_encoding": True})
    np.testing.assert_allclose(quantised.log_probs(bytes_nB, deltas), np.cumsum(expected, axis=1), rtol=1e-6)
    even = form.model_copy(update={"normalize_t": True})
    first = positions[0][1]
    curve = [first[0] + first[1] * t / 9 + first[2] * math.sqrt(t / 9) for t in range(10)]
    np.testing.assert_allclose(quantised.log_probs(bytes_nB, even)[0, 9:], curve[7:], rtol=1e-6)
    ids = [0, 999, 512, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert (form.id_bits, form.id_bytes) == (10, 15)
    assert quantised.word_ids(np.array([packed_bits(ids, 10)], np.uint8), form).tolist() == [ids]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 1 << 20), st.lists(st.integers(0, (1 << 20) - 1), min_size=1, max_size=70))
def test_ids_come_out_of_any_number_of_bits(words: int, ids: list[int]) -> None:
    form = Quantisation(d=words, k=len(ids), exact_k=len(ids))
    ids = [number % words for number in ids]
    packed = packed_bits(ids, form.id_bits)
    assert len(packed) == form.id_bytes
    assert quantised.word_ids(np.array([packed, packed], np.uint8), form).tolist() == [ids, ids]


def test_settings_that_contradict_the_files_are_refused(tmp_path: Path) -> None:
    path = write_distillkit(tmp_path / "a.parquet", [distillkit_row(ids, 6, TABLE) for ids in sentences(3)])
    other = Quantisation(d=VOCAB, k=5, exact_k=5, delta_encoding=False)
    with pytest.raises(ValueError, match=r"a\.parquet, record 0: compressed_logprobs: expected \d+ lists of 20, found .*--codec"):
        bring_in(DistillKit([path], None, VOCAB, "float32", other), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="expected token ids 0 to 19"):
        bring_in(DistillKit([path], None, 20, "float32", EXACT), tmp_path / "store")
    with pytest.raises(ValueError, match="--codec FILE"):
        DistillKit([path], None, VOCAB, "float32", None)
    with pytest.raises(ValueError, match="the files hold 6 words"):
        DistillKit([path], 7, VOCAB, "float32", EXACT)
    halves = EXACT.model_copy(update={"k": 12, "exact_k": 12, "exact_dtype": "float16", "d": 8})
    with pytest.raises(ValueError, match=r"record 0"):
        bring_in(DistillKit([path], None, VOCAB, "float32", halves), tmp_path / "store")


def change(path: Path, name: str, values: object) -> Path:
    """The Parquet file with another column."""
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, values if isinstance(values, pa.Array) else pa.array(values)), path)
    return path


def test_parquet_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    rows = [distillkit_row(ids, 6, TABLE) for ids in ([1, 2, 3], [4, 5, 6])]
    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "length": (
            lambda path: change(path, "input_ids", [[1, 2, 3], [4, 5, 6, 7, 8]]),
            "record 1: expected 4 or 5 positions for 5 tokens, found 2",
        ),
        "null": (lambda path: change(path, "input_ids", [[1, 2, 3], None]), "record 1: expected a list in input_ids"),
        "inner null": (lambda path: change(path, "input_ids", [[1, 2, 3], [4, None, 5]]), "record 1: input_ids has 1 nulls"),
        "text": (lambda path: change(path, "input_ids", ["a", "b"]), "record 0"),
        "negative": (lambda path: change(path, "input_ids", [[1, 2, 3], [4, -5, 5]]), "record 1: expected token ids 0 to 39, found -5"),
        "legacy": (
            lambda path: pq.write_table(pa.table({"input_ids": [[1]], **{name: [[[1]]] for name in LEGACY}}), path),
            "legacy form keeps logits less their mean",
        ),
        "other": (lambda path: pq.write_table(pa.table({"text": ["a"]}), path), "expected input_ids and"),
    }  # fmt: skip
    for name, (damage, message) in cases.items():
        path = write_distillkit(tmp_path / f"{name}.parquet", rows)
        damage(path)
        with pytest.raises(ValueError, match=rf"{name}\.parquet") as caught:
            bring_in(DistillKit([path], None, VOCAB, "float32", EXACT), tmp_path / f"store-{name}")
        assert message in str(caught.value), name
    path = write_distillkit(tmp_path / "cut.parquet", rows)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"cannot read .*cut\.parquet"):
        DistillKit([path], None, VOCAB, "float32", EXACT)
