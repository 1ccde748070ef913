"""A few rows of a store as text, with what the teacher answered for each.

Shapes: n units of a row (tokens, labelled tokens or one), W width.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from store.features import FeatureKey
from store.manifest import Task
from store.reader import Store
from teacher_dump.answers import Answers
from teacher_dump.words import PLACES, WORDS, places, predictions

BARS = 32
"""Tokens whose norms are drawn."""
_BARS = "▁▂▃▄▅▆▇█"
_LINE = 100
"""Characters of text in a line."""


def show(path: Path, count: int, start: int, pass_name: str | None) -> str:
    """``count`` rows from ``start`` on, each as text with the answers of every pass (or of ``pass_name``).

    Raises:
        ValueError: no such row or pass.
        StoreError: there is no store, or a file is damaged.
    """
    store = Store.open(path)
    passes = list(store.manifest.passes)
    if pass_name is not None and pass_name not in passes:
        raise ValueError(f"{path} has no pass {pass_name!r}; it has {', '.join(passes) or 'none'}")
    if start >= len(store.rows):
        raise ValueError(f"{path} has rows 0 to {len(store.rows) - 1}, found --from {start}")
    answers = {name: Answers(store, name) for name in passes if pass_name in (None, name)}
    tokenizer = _tokenizer(store)
    rows = range(start, min(start + count, len(store.rows)))
    return "\n\n".join("\n".join(_row(store, tokenizer, answers, row)) for row in rows)


def _tokenizer(store: Store) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ships with any pass: all passes have the same."""
    for name in store.manifest.passes:
        folder = store.shipped(name, configured=False)
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return None


def _row(store: Store, tokenizer: PreTrainedTokenizerBase | None, answers: dict[str, Answers], row: int) -> Iterator[str]:
    table = store.rows
    about = table.about(row)
    ids = store.tokens("input_ids", np.array([row]))
    label = _label(float(table.label_at(np.array([row]))[0]), store.manifest.rows.task)
    copy = f", masking {about['copy']}" if store.manifest.rows.copies > 1 else ""
    if names := store.manifest.rows.domains:
        label += f" ── domain {names[int(table.domain_at(np.array([row]))[0])]}"
    yield f"── row {row} ── {about['split']}{copy} ── {Path(about['source']).name}, record {about['record']} ── {len(ids)} tokens{label}"
    yield from _wrapped(str(tokenizer.decode(ids)) if tokenizer else "ids " + " ".join(map(str, ids)))
    if any(array.name == "phrases" for array in store.manifest.rows.token_arrays):
        yield from _wrapped("phrases: " + _phrases(ids, store.tokens("phrases", np.array([row])), tokenizer))
    for name, of_pass in answers.items():
        if int(table.at(np.array([row])).slot[0]) not in store.committed(name):
            yield f"  {name}: not answered yet"
            continue
        for key, values in of_pass.of(row):
            yield from _answer(store, tokenizer, row, key.of(name), values)


def _label(label: float, task: Task) -> str:
    if math.isnan(label):
        return ""
    if task.kind == "regression":
        return f" ── score {label:g}"
    named = task.classes and 0 <= int(label) < len(task.classes)
    return f" ── label {task.classes[int(label)] if named else int(label)}"


def _phrases(ids: NDArray[np.int32], phrases: NDArray[np.uint16], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Each phrase in brackets."""
    found = (ids[phrases == number] for number in range(1, int(phrases.max()) + 1))
    texts = [str(tokenizer.decode(some)).strip() if tokenizer else " ".join(map(str, some)) for some in found]
    return " ".join(f"[{text}]" for text in texts) or "none"


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= _LINE:
            yield f"  │ {line}"
            line = ""
        line = f"{line} {word}".strip()
    yield f"  │ {line}"


def _answer(
    store: Store, tokenizer: PreTrainedTokenizerBase | None, row: int, key: FeatureKey, values: dict[str, NDArray[Any]]
) -> Iterator[str]:
    """One feature of one row."""

    def word(number: int) -> str:
        if tokenizer is None:
            return str(number)
        return str(tokenizer.decode([number])).strip() or repr(tokenizer.convert_ids_to_tokens(number))

    if key.site == "task_logits":
        yield from _task(str(key), values[""], store.manifest.rows.task)
    elif key.site == "lm_logits":
        yield f"  {key}"
        chosen = store.spec(key).ids if key.form == "select" else ()
        yield from predictions(places(store, row, key.positions), word, chosen, values)
    else:
        norms_n = np.linalg.norm(values[""].astype(np.float64), axis=1)
        spread = f"  {_bars(norms_n)}" if len(norms_n) > 1 else ""
        yield f"  {key!s:32} norm {_range(norms_n)}{spread}"


def _task(title: str, logits_nW: NDArray[np.float32], task: Task) -> Iterator[str]:
    """Task logits as probabilities; scores, and the logits of single choices, as they are."""
    if logits_nW.shape[1] == 1:
        yield f"  {title:32} " + ", ".join(f"{value:.3f}" for value in logits_nW[:PLACES, 0])
        return
    probabilities_nW = softmax(logits_nW.astype(np.float64), axis=1)
    names: Sequence[str] = task.classes
    if len(names) != logits_nW.shape[1]:
        names = [str(number) for number in range(logits_nW.shape[1])]
    for place, probabilities in enumerate(probabilities_nW[:PLACES]):
        ranked = np.argsort(-probabilities)[:WORDS]
        yield f"  {title if place == 0 else '':32} " + "  ".join(f"{names[i]} {probabilities[i]:.1%}" for i in ranked)


def _range(norms_n: NDArray[np.float64]) -> str:
    if len(norms_n) == 1:
        return f"{norms_n[0]:.4g}"
    return f"{norms_n.min():.4g} to {norms_n.max():.4g}, mean {norms_n.mean():.4g}" if len(norms_n) else "of no token"


def _bars(norms_n: NDArray[np.float64]) -> str:
    """One bar for each of the first tokens, as high as its norm among them."""
    norms_n = norms_n[:BARS]
    spread = max(float(np.ptp(norms_n)), 1e-12)
    return "".join(_BARS[int((norm - norms_n.min()) / spread * (len(_BARS) - 1))] for norm in norms_n)
