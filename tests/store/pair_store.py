"""Small stores whose rows stand in pairs, with what was put into them."""

from pathlib import Path

import numpy as np
from small_store import MADE, Made, answers, pass_info, spec

from store import PassInfo, Row, RowWriter, StoreWriter, Task
from store.intervention import Intervention

SPECS = (spec("hidden.1@all", "bfloat16"), spec("final@first"))
PAIRS = [(30, 21), (7, 9), (60, 50), (1, 1), (50, 70), (100, 28), (20, 31)]
"""Tokens of the two rows of each pair."""


def plans(lengths: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Some tokens of both rows, in any order, that take the place of one another."""
    rng, count = np.random.default_rng([seed, *lengths]), min(lengths) // 2
    chosen = [rng.permutation(length)[:count] for length in lengths]
    found = [np.full(length, -1, np.int32) for length in lengths]
    found[0][chosen[0]], found[1][chosen[1]] = chosen[1], chosen[0]
    return found


def make_rows(
    path: Path, pairs: list[tuple[int, int]] = PAIRS, corpus: str = "c", seed: int = 0, adding: bool = False, redrawn: int = -1
) -> Made:
    """Rows of the given lengths; the pair ``redrawn`` has another draw than it would have."""
    rng, rows = np.random.default_rng(seed), []
    with RowWriter.adding(path) if adding else RowWriter(path, 128) as writer:
        for number, lengths in enumerate(pairs):
            draw = int(rng.integers(0, 1 << 31)) ^ (number == redrawn)
            made = [
                Row(
                    input_ids=rng.integers(0, 50, length, np.int32), segments=None, documents=None, token_labels=None, labelled=0,
                    label=None, group=number, copy=0, split=("train", "dev")[number % 3 == 2], source="t.jsonl", record=2 * number + part,
                    part=0, spans=[], interchange=plan, draw=draw,
                )
                for part, (length, plan) in enumerate(zip(lengths, plans(lengths, seed + number), strict=True))
            ]  # fmt: skip
            writer.append_group(made)
            rows += made
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="none"), pad_id=0, tokenizer="t", corpus=corpus, building="b",
            options={}, made=MADE,
        )  # fmt: skip
    return Made(path, rows)


def pass_of(intervention: Intervention | None) -> PassInfo:
    return pass_info(SPECS).model_copy(update={"intervention": intervention})


def make_store(path: Path, pairs: list[tuple[int, int]] = PAIRS, corpus: str = "c", seed: int = 0) -> Made:
    """The same with one complete pass, ``bert``, into which block 1 was written."""
    made = make_rows(path, pairs, corpus, seed)
    answer(made)
    return made


def answer(made: Made) -> None:
    """Commit all shards of the pass ``bert`` that are pending."""
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_of(Intervention(layers=((1,),))), {})
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
