"""How often the words of a training corpus come, and how much of it the words that students keep cover."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online.kept_words import read_kept_words
from online.models import load_config
from store.errors import StoreError
from student_train.recipe import DataSpec
from student_train.report.runs import Phase, Runs
from student_train.vocabulary import count

ROWS = 200_000
"""Rows of a store that are counted, the first ones."""


@dataclass(frozen=True)
class WordCounts:
    """Of the rows that a phase learns from. V words of the tokenizer, K kept ones."""

    rows: str
    """What they are, as people say it."""
    counts: NDArray[np.int64]
    """[V] how often each word comes."""
    kept: NDArray[np.int64] | None
    """[K] ids that the student keeps; None: all of them."""

    @property
    def covered(self) -> float:
        """Share of the tokens that are among the kept words, from 0 to 1."""
        return 1.0 if self.kept is None else float(self.counts[self.kept].sum() / self.counts.sum())


def word_counts(runs: Runs) -> tuple[list[WordCounts], list[str]]:
    """Once for each corpus and set of kept words, in the order of the runs; and why some could not be counted."""
    counted: dict[tuple[DataSpec, ...], NDArray[np.int64]] = {}
    found: dict[tuple[tuple[DataSpec, ...], bytes], WordCounts] = {}
    failed: dict[str, None] = {}
    for phase in (phase for run in runs.all for phase in run.phases if (phase.student / "config.json").is_file()):
        try:
            data, words = _data(phase), read_kept_words(phase.student)
            total = load_config(phase.student).get_text_config().vocab_size if words is None else words.words
            if data not in counted:
                counted[data] = count(data, total, ROWS)
        except (StoreError, ValueError) as error:
            failed[f"The rows of phase {phase.name} could not be counted: {error}"] = None
            continue
        kept_K = None if words is None else words.kept.numpy()
        key = data, b"" if kept_K is None else kept_K.tobytes()
        found.setdefault(key, WordCounts(" + ".join(f"{one.store} ({one.split})" for one in data), counted[data], kept_K))
    return list(found.values()), list(failed)


def _data(phase: Phase) -> tuple[DataSpec, ...]:
    """Which rows it learns from, whoever taught on them: what differs in more than that is the same corpus."""
    data = (DataSpec.model_validate(tree) for tree in phase.spec["data"])
    return tuple(DataSpec(store=one.store, split=one.split, where=one.where, pass_name=one.compared_pass) for one in data)
