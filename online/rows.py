"""Rows from text: one after the other (iter_groups), and into a store (build_rows, add_rows).

Everything a teacher's answer depends on is fixed here. The same specification, corpus and tokenizer give the same rows bit for
bit, however the corpus is cut into files or batches. The corpus is read once for each masking copy and never held in memory.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from online.batch import BUCKET
from online.chat import conversations
from online.cloze_rows import clozes, verbalisers
from online.corpus import Record, read_records
from online.domains import with_domains
from online.drafts import Draft
from online.examples import examples
from online.fingerprints import tokenizer_fingerprint
from online.kept_words import mapped_by
from online.masking import Ids, mask_tokens
from online.packing import documents
from online.padded import filled
from online.pairs import paired, planned
from online.rows_spec import RowsSpec, building_fingerprint
from store.building import RowWriter
from store.manifest import Provenance, RowsInfo
from store.rows import Row


def iter_groups(
    spec: RowsSpec, tokenizer: PreTrainedTokenizerBase, *, digest: Callable[[bytes], object] | None = None, read_rows: int = 1024
) -> Iterator[list[Row]]:
    """The rows of the corpus, group by group: all rows of copy 0, then of copy 1, and so on.

    Args:
        digest: called with the bytes that the corpus fingerprint covers.
        read_rows: records read from disk at once; the rows do not depend on it.

    Raises:
        ValueError: bad data (names file and record), or a tokenizer that cannot do what ``spec`` asks.
    """
    tokenizer = copy.deepcopy(tokenizer)  # encoding changes its truncation settings
    tokenizer.truncation_side = "right"
    finish = _Finish(spec, tokenizer)
    number = itertools.count()
    for number_of_copy in range(spec.copies):
        records = read_records(spec.sources, spec.columns, digest=digest if number_of_copy == 0 else None, read_rows=read_rows)
        records = (_held_out(record, spec) for record in records)
        records = with_domains(records, spec.domain) if spec.domain else records
        build = conversations if spec.chat else clozes if spec.cloze else examples if spec.long == "truncate" else documents
        drafted = build(records, spec, tokenizer)
        for drafts in paired(drafted, spec.seed, number_of_copy) if spec.interchange else drafted:
            group = next(number)
            rows = [finish(draft, number_of_copy, group) for draft in drafts]
            first = drafts[0]
            yield planned(rows, (first.record.ordinal, first.part), spec.interchange, spec.seed) if spec.interchange else rows


def build_rows(spec: RowsSpec, tokenizer: PreTrainedTokenizerBase, path: Path, made: Provenance, *, read_rows: int = 1024) -> RowsInfo:
    """Build the rows of a new store at ``path``, with a progress bar.

    Raises:
        ValueError: as :func:`iter_groups`; no row at all; a group that does not fit in a slot.
        StoreError: ``path`` holds a finished store or something else.
    """
    with RowWriter(path, spec.slot_tokens) as writer:
        return _fill(writer, spec, tokenizer, made, read_rows)


def add_rows(spec: RowsSpec, tokenizer: PreTrainedTokenizerBase, path: Path, made: Provenance, *, read_rows: int = 1024) -> RowsInfo:
    """Build rows of other texts in the same way and add them to the store at ``path``, with a progress bar; all rows of it.

    Raises:
        ValueError: as :func:`iter_groups`; no row at all; a group that does not fit in a slot.
        FingerprintMismatch: its rows were built in another way.
        StoreError: there is no store, or another process writes to it.
    """
    with RowWriter.adding(path) as writer:
        return _fill(writer, spec, tokenizer, made, read_rows)


def _fill(writer: RowWriter, spec: RowsSpec, tokenizer: PreTrainedTokenizerBase, made: Provenance, read_rows: int) -> RowsInfo:
    corpus = hashlib.sha256()
    with tqdm(desc="rows", unit=" rows", unit_scale=True) as progress:
        for rows in iter_groups(spec, tokenizer, digest=corpus.update, read_rows=read_rows):
            writer.append_group(rows)
            progress.update(len(rows))
    return writer.finish(
        copies=spec.copies,
        bucket=BUCKET,
        objective=spec.objective,
        task=spec.task,
        pad_id=pad_id(tokenizer),
        tokenizer=tokenizer_fingerprint(tokenizer),
        corpus=corpus.hexdigest(),
        building=building_fingerprint(spec),
        options=spec.model_dump(mode="json") | ({"verbalisers": list(verbalisers(spec.cloze, tokenizer))} if spec.cloze else {}),
        made=made,
        domains=spec.domain.classes if spec.domain else (),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills batches: the pad token, else the end-of-text token, else 0 (padding is masked in any case)."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _held_out(record: Record, spec: RowsSpec) -> Record:
    """The record, moved to split dev if the hash of its number (or of its group) says so."""
    if not spec.hold_out or record.split != "train":
        return record
    name = f"group {record.values[spec.group]}" if spec.group else f"record {record.ordinal}"
    share = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / (1 << 64)
    return replace(record, split="dev") if share < spec.hold_out else record


class _Finish:
    """Draft -> row: masks, the count of labelled tokens, and words that stand for others."""

    def __init__(self, spec: RowsSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self.spec, self.pad_id = spec, pad_id(tokenizer)
        if spec.objective == "mlm":
            if tokenizer.mask_token_id is None:
                raise ValueError("objective mlm needs a mask token, and this tokenizer has none; expected plain or causal")
            self.mask_id = int(tokenizer.mask_token_id)
            vocabulary = np.array(list(tokenizer.get_vocab().values()), np.int32)
            self.choosable = np.zeros(vocabulary.max() + 1, bool)
            self.choosable[vocabulary] = True
            self.choosable[tokenizer.all_special_ids] = False
            self.words = np.flatnonzero(self.choosable).astype(np.int32)
        self.stand_ins: Ids | None = None
        if spec.vocabulary is not None:
            self.stand_ins = mapped_by(spec.vocabulary, tokenizer).stand_ins.numpy().astype(np.int32)

    def __call__(self, draft: Draft, number_of_copy: int, group: int) -> Row:
        ids, token_labels, labelled = draft.ids, draft.token_labels, 0
        if self.spec.objective == "mlm" and self.spec.cloze is None:
            ids, token_labels = self.masked(draft, number_of_copy)
        elif self.spec.objective == "causal":
            labelled = len(ids) - (1 if draft.documents is None else int(draft.documents[-1]) + 1)
        if token_labels is not None:
            labelled = int((token_labels >= 0).sum())
        if self.stand_ins is not None:
            ids = self.stand_ins[ids]
            if token_labels is not None and self.spec.objective != "plain":  # where they are words
                token_labels = np.where(token_labels < 0, token_labels, self.stand_ins[np.maximum(token_labels, 0)])
        row = Row(
            input_ids=ids,
            segments=draft.segments,
            documents=draft.documents,
            token_labels=token_labels,
            labelled=labelled,
            label=draft.label,
            group=group,
            copy=number_of_copy,
            split=draft.record.split,
            source=draft.record.file,
            record=draft.record.number,
            part=draft.part,
            spans=draft.spans,
            domain=draft.record.domain,
            phrases=draft.phrases,
        )
        return filled(row, self.spec.max_length, self.pad_id) if self.spec.padding else row

    def masked(self, draft: Draft, number_of_copy: int) -> tuple[Ids, Ids]:
        """Special and unknown words are never chosen, unless the row holds nothing else."""
        candidates = self.choosable[draft.ids] & ~draft.added
        return mask_tokens(
            draft.ids,
            candidates if candidates.any() else ~draft.added,
            probability=self.spec.mask_probability,
            mask_id=self.mask_id,
            words=self.words,
            seed=self.spec.seed,
            address=(draft.record.ordinal, draft.part, number_of_copy),
        )
