"""DistillKit's Parquet files: tokens, and for each position the likeliest words in few bytes (store.imports.quantised).

Columns: ``input_ids`` [n]; ``compressed_logprobs`` and ``bytepacked_indices``, one list of bytes for each position, or
plain ``token_ids`` and ``top_values``; with ``attention_mask`` 1, 1, 2, 2, ... where documents were packed into a row.

A capture has a position less than tokens: nothing predicts the first token, so position i is the answer *at* token i,
the distribution of token i + 1. Packing cuts the tokens down to the positions; the last of each document then has
no next word, and its distribution is left out.

Source: arcee-ai/DistillKit at a61c2e7, ``sample_logits_vllm.py``, ``sample_common.py``, ``pack_logits.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store.codecs import feature_spec
from store.errors import StoreError
from store.features import FeatureKey, FeatureSpec, StoreDtype
from store.imports import quantised
from store.imports.quantised import Quantisation
from store.imports.samples import Sample
from store.imports.words import top_words
from store.manifest import Json

MOST_MASS = 4.0
"""Sum of probabilities that DistillKit's curve still explains (1.7 was seen); more says that the settings are not those of the capture."""
_BYTES = ("compressed_logprobs", "bytepacked_indices")
_PLAIN = ("token_ids", "top_values")
_LEGACY = ("packed_indices", "exact_values", "coeffs")
_AT_ONCE = 16
"""Records in memory."""
_LONGEST = 1 << 24
"""Tokens of a record."""
_DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError, KeyError)
"""What pyarrow says of damaged files; KeyError where a column is not in all of them."""


class DistillKit:
    """Parquet files; ``form`` says how the bytes are meant (unused where words are plain)."""

    def __init__(self, files: Sequence[Path], top: int | None, vocab: int, dtype: StoreDtype, form: Quantisation | None) -> None:
        self.files = tuple(files)
        self.vocab, self.form = vocab, form
        names = _names(self.files[0])
        self._columns: tuple[str, ...] = next((columns for columns in (_BYTES, _PLAIN) if set(columns) <= names), ())
        if not self._columns or "input_ids" not in names:
            legacy = set(_LEGACY) <= names
            raise ValueError(f"{files[0]}: {quantised.LEGACY if legacy else f'expected input_ids and {_BYTES}, found {sorted(names)}'}")
        if self._columns == _BYTES and form is None:
            raise ValueError(f"{files[0]}: how its bytes are meant stands in compression_config.yaml beside it; give it with --codec FILE")
        kept = top if top is not None else form.k if form is not None else None
        if kept is None:
            raise ValueError("give the number of words to keep with --top")
        if form is not None and kept > form.k:
            raise ValueError(f"--top: the files hold {form.k} words for each position, found {kept}")
        self._packed = "attention_mask" in names
        self.features: tuple[FeatureSpec, ...] = (feature_spec(FeatureKey("lm_logits", None, "labels", f"top{kept}"), dtype, vocab),)
        self.options: Json = {"top": kept, "vocab": vocab, "dtype": dtype, "codec": None if form is None else form.model_dump(mode="json")}

    def records(self, start: int, answers: bool) -> Iterator[list[Sample]]:
        """One record for each Parquet row."""
        for path in self.files:
            try:
                with pq.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True) as file:
                    rows = file.metadata.num_rows
                    yield from self._of_file(path, file, min(start, rows), answers)
            except _DAMAGE as error:
                raise StoreError(f"cannot read {path}: {str(error)[:200]}; copy it again, or leave it out") from None
            start = max(0, start - rows)

    def _of_file(self, path: Path, file: pq.ParquetFile, start: int, answers: bool) -> Iterator[list[Sample]]:
        group, number = 0, 0
        while group < file.num_row_groups and number + file.metadata.row_group(group).num_rows <= start:
            number += file.metadata.row_group(group).num_rows
            group += 1
        packed = ["attention_mask"] if self._packed else []
        columns = ["input_ids", *packed, *self._columns]
        for batch in file.iter_batches(_AT_ONCE, range(group, file.num_row_groups), columns):
            for row in range(batch.num_rows):
                if number >= start:
                    yield [self._sample(path, number, batch.slice(row, 1), answers)]
                number += 1

    def _sample(self, path: Path, number: int, row: pa.RecordBatch, answers: bool) -> Sample:
        where = f"{path}, record {number}"
        ids, documents = _flat(row["input_ids"], where, "input_ids"), None
        positions = _count(row[self._columns[0]], where, self._columns[0])
        if not len(ids) - 1 <= positions <= len(ids):
            raise ValueError(f"{where}: expected {len(ids) - 1} or {len(ids)} positions for {len(ids)} tokens, found {positions}")
        if self._packed:
            documents = _documents(_flat(row["attention_mask"], where, "attention_mask"), len(ids), where)
            ids = ids[: len(documents)]
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.vocab:
            found = f"{ids.min()} to {ids.max()}" if len(ids) else "none"
            raise ValueError(f"{where}: expected token ids 0 to {self.vocab - 1}, found {found}")
        sample = Sample(str(path), number, ids.astype(np.int32), documents)
        return replace(sample, answers=self._answers(row, sample, positions, where)) if answers else sample

    def _answers(self, row: pa.RecordBatch, sample: Sample, positions: int, where: str) -> dict[FeatureKey, dict[str, NDArray[Any]]]:
        (spec,) = self.features
        next_is_own = np.arange(len(sample.input_ids)) < len(sample.input_ids) - 1
        if sample.documents is not None:
            next_is_own[:-1] &= sample.documents[1:] == sample.documents[:-1]
        scored = np.flatnonzero(next_is_own)
        if self._columns == _PLAIN:
            ids_nM, values_nM = (_matrix(row[name], positions, None, where, name) for name in _PLAIN)
            if ids_nM.shape != values_nM.shape:
                raise ValueError(f"{where}: expected as many top_values as token_ids, found {values_nM.shape[1]} and {ids_nM.shape[1]}")
            words, log_probs = ids_nM[scored].astype(np.int64), values_nM[scored].astype(np.float64)
        else:
            assert self.form is not None
            values, ids = (
                _matrix(row[name], positions, width, where, name)[scored].astype(np.uint8)
                for name, width in zip(_BYTES, (self.form.value_bytes, self.form.id_bytes), strict=True)
            )
            words, log_probs = quantised.word_ids(ids, self.form), quantised.log_probs(values, self.form)
        arrays = top_words(words, log_probs, spec, self.vocab, MOST_MASS, lambda n: f"{where}, token {scored[n]}")
        return {spec.feature: arrays}


def _names(path: Path) -> set[str]:
    try:
        return set(pq.read_schema(path).names)
    except _DAMAGE as error:
        raise StoreError(f"cannot read {path} as Parquet: {str(error)[:200]}") from None


def _documents(mask: NDArray[np.int64], tokens: int, where: str) -> NDArray[np.uint16]:
    """Numbers from 0 of the documents that a mask 1, 1, 2, ... tells apart, without the zeros of padding at its end."""
    own = mask[mask > 0]
    if len(mask) != tokens or not np.array_equal(own, mask[: len(own)]) or (np.diff(own) < 0).any():
        raise ValueError(f"{where}: expected an attention_mask of {tokens} numbers that rise, with zeros at its end alone")
    return np.cumsum(np.diff(own, prepend=own[:1]) > 0).astype(np.uint16)


def _count(column: pa.Array, where: str, name: str) -> int:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{where}: expected a list in {name}, found {column.type}")
    lists = column[0]
    if not lists.is_valid or len(lists) > _LONGEST:
        raise ValueError(f"{where}: expected a list in {name}, found {f'one of {len(lists)}' if lists.is_valid else 'none'}")
    return len(lists)


def _flat(column: pa.Array, where: str, name: str) -> NDArray[np.int64]:
    """The numbers of a list."""
    _count(column, where, name)
    try:
        values = column.flatten()
        if values.null_count:
            raise ValueError(f"{where}: {name} has {values.null_count} nulls")
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowException, AttributeError) as error:
        raise ValueError(f"{where}: {name} holds no list of whole numbers ({str(error)[:100]})") from None


def _matrix(column: pa.Array, positions: int, width: int | None, where: str, name: str) -> NDArray[Any]:
    """[positions, width] the numbers of a list of lists, all of one length."""
    try:
        inner = column.flatten()
        lengths = inner.value_lengths().to_numpy(zero_copy_only=False) if len(inner) else np.array([width or 0])
        values = inner.flatten()
    except (pa.ArrowException, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: {name} holds no list of lists ({str(error)[:100]})") from None
    width = int(lengths[0]) if width is None else width
    if len(inner) != positions or values.null_count or inner.null_count or (lengths != width).any():
        raise ValueError(
            f"{where}: {name}: expected {positions} lists of {width}, found {len(inner)} of {sorted(set(lengths.tolist()))[:5]}; "
            "are the settings (--codec) those of the capture?"
        )
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found.reshape(positions, width)
