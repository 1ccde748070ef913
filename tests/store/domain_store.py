"""Small stores whose rows have a domain and phrases, with what was put into them."""

from pathlib import Path

import numpy as np
from small_store import MADE, Made, answers, pass_info, spec

from store import Row, RowWriter, StoreWriter, Task

NAMES = ("news", "books", "web")
SPECS = (spec("hidden.1@all", "bfloat16"), spec("final@first"))
GROUPS = [[(30, 1)], [(7, 0), (9, 0)], [(60, 2)], [(1, 1)], [(50, 1)], [(128, 0)], [(20, 2)]]
"""(Tokens, domain) of the rows of each group."""


def phrases(length: int, seed: int) -> np.ndarray:
    """Numbers of phrases of one to four tokens, some tokens between them being of none."""
    rng, numbers, number = np.random.default_rng([seed, length]), [], 0
    while len(numbers) < length:
        if rng.random() < 0.3:
            numbers.append(0)
        else:
            number += 1
            numbers += [number] * int(rng.integers(1, 5))
    return np.array(numbers[:length], np.uint16)


def make_rows(
    path: Path,
    groups: list[list[tuple[int, int | None]]],
    names: tuple[str, ...] = NAMES,
    corpus: str = "c",
    seed: int = 0,
    phrased: bool = True,
    adding: bool = False,
    splits: tuple[str, str] = ("train", "dev"),
) -> Made:
    """Rows of the given (length, domain), by group; the rows of no domain have None."""
    rng, rows = np.random.default_rng(seed), []
    with RowWriter.adding(path) if adding else RowWriter(path, 128) as writer:
        for number, group in enumerate(groups):
            made = [
                Row(
                    input_ids=rng.integers(0, 50, length, np.int32), segments=None, documents=None, token_labels=None, labelled=0,
                    label=None, group=number, copy=0, split=splits[number % 3 == 2], source="text.jsonl", record=number, part=part,
                    spans=[], domain=domain, phrases=phrases(length, len(rows) + part) if phrased else None,
                )
                for part, (length, domain) in enumerate(group)
            ]  # fmt: skip
            writer.append_group(made)
            rows += made
        writer.finish(
            copies=1, bucket=16, objective="plain", task=Task(kind="none"), pad_id=0, tokenizer="t", corpus=corpus, building="b",
            options={}, made=MADE, domains=names,
        )  # fmt: skip
    return Made(path, rows)


def make_store(path: Path, groups: list[list[tuple[int, int | None]]] = GROUPS, corpus: str = "c", seed: int = 0) -> Made:
    """The same with one complete pass, ``bert``."""
    made = make_rows(path, groups, corpus=corpus, seed=seed)
    answer(made)
    return made


def answer(made: Made) -> None:
    """Commit all shards of the pass ``bert`` that are pending."""
    with StoreWriter.open(made.path) as writer:
        writer.add_pass("bert", pass_info(SPECS), {})
        for shard in writer.pending("bert"):
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot))
