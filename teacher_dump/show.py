"""A few rows of a store as text, with what the teacher answered for each.

Shapes: n units of a row (tokens, labelled tokens or one), W width, K kept words.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from store import layout
from store.codecs import decode
from store.features import FeatureSpec
from store.manifest import Task
from store.reader import Store

WORDS = 5
"""Likeliest words that are shown of each prediction."""
PLACES = 6
"""Predictions that are shown of each row."""
BARS = 32
"""Tokens whose norms are drawn."""
_BARS = "▁▂▃▄▅▆▇█"
_NONE = -100
"""Label of a token without one."""
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
    shown = [name for name in passes if pass_name in (None, name)]
    tokenizer = _tokenizer(store)
    rows = range(start, min(start + count, len(store.rows)))
    return "\n\n".join("\n".join(_row(store, tokenizer, shown, row)) for row in rows)


def _tokenizer(store: Store) -> PreTrainedTokenizerBase | None:
    """The tokenizer that ships with any pass: all passes have the same."""
    for name in store.manifest.passes:
        folder = layout.model(store.path, name)
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return None


def _row(store: Store, tokenizer: PreTrainedTokenizerBase | None, passes: Sequence[str], row: int) -> Iterator[str]:
    table = store.rows
    about = table.table.slice(row, 1).to_pylist()[0]
    ids = store.tokens("input_ids", np.array([row]))
    tokens = [str(number) for number in ids] if tokenizer is None else tokenizer.convert_ids_to_tokens(ids.tolist())
    label = _label(float(table.label[row]), store.manifest.rows.task)
    copy = f", masking {about['copy']}" if store.manifest.rows.copies > 1 else ""
    yield f"── row {row} ── {about['split']}{copy} ── {Path(about['source']).name}, record {about['record']} ── {len(ids)} tokens{label}"
    yield from _wrapped(tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else "ids " + " ".join(tokens))
    for name in passes:
        if int(table.slot[row]) not in store.committed(name):
            yield f"  {name}: not answered yet"
            continue
        for spec in store.manifest.passes[name].features:
            values = decode(spec, store.read(spec.feature.of(name), np.array([row])))
            yield from _answer(store, tokenizer, row, str(spec.feature.of(name)), spec, values)


def _label(label: float, task: Task) -> str:
    if math.isnan(label):
        return ""
    if task.kind == "regression":
        return f" ── score {label:g}"
    named = task.classes and 0 <= int(label) < len(task.classes)
    return f" ── label {task.classes[int(label)] if named else int(label)}"


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= _LINE:
            yield f"  │ {line}"
            line = ""
        line = f"{line} {word}".strip()
    yield f"  │ {line}"


def _answer(
    store: Store, tokenizer: PreTrainedTokenizerBase | None, row: int, title: str, spec: FeatureSpec, values: dict[str, NDArray[Any]]
) -> Iterator[str]:
    """One feature of one row."""
    key = spec.feature
    if key.site == "task_logits":
        yield from _task(title, values[""], store.manifest.rows.task)
    elif spec.codec == "topk" or spec.codec == "select" or key.site == "lm_logits":
        yield f"  {title}"
        yield from _predictions(_places(store, row, key.positions), tokenizer, spec, values)
    else:
        norms_n = np.linalg.norm(values[""].astype(np.float64), axis=1)
        spread = f"  {_bars(norms_n)}" if len(norms_n) > 1 else ""
        yield f"  {title:32} norm {_range(norms_n)}{spread}"


def _task(title: str, logits_nW: NDArray[np.float32], task: Task) -> Iterator[str]:
    """Task logits as probabilities; scores and choices as they are."""
    if logits_nW.shape[1] == 1:
        yield f"  {title:32} " + ", ".join(f"{value:.3f}" for value in logits_nW[:PLACES, 0])
        return
    probabilities_nW = softmax(logits_nW.astype(np.float64), axis=1)
    names = task.classes if len(task.classes) == logits_nW.shape[1] else [str(number) for number in range(logits_nW.shape[1])]
    for place, probabilities in enumerate(probabilities_nW[:PLACES]):
        ranked = np.argsort(-probabilities)[:WORDS]
        yield f"  {title if place == 0 else '':32} " + "  ".join(f"{names[i]} {probabilities[i]:.1%}" for i in ranked)


@dataclass(frozen=True)
class _Place:
    """Where a word was predicted: number of the token (None for a row as a whole), its id and the true word's."""

    number: int | None
    token: int | None
    true: int | None


def _places(store: Store, row: int, positions: str) -> list[_Place]:
    """The places of the units of one row."""
    rows = np.array([row])
    arrays = {array.name for array in store.manifest.rows.token_arrays}
    ids = store.tokens("input_ids", rows).astype(np.int64)
    true = np.full(len(ids), _NONE)
    if "token_labels" in arrays:
        true = store.tokens("token_labels", rows).astype(np.int64)
    elif store.manifest.rows.objective == "causal":
        documents = store.tokens("documents", rows) if "documents" in arrays else np.zeros(len(ids), np.uint16)
        true[:-1] = np.where(documents[:-1] == documents[1:], ids[1:], _NONE)
    if positions == "mean":
        return [_Place(None, None, None)]
    chosen = {"all": range(len(ids)), "first": [0], "last": [len(ids) - 1]}.get(positions, np.flatnonzero(true != _NONE))
    return [_Place(int(i), int(ids[i]), None if true[i] == _NONE else int(true[i])) for i in chosen]


def _predictions(
    places: Sequence[_Place], tokenizer: PreTrainedTokenizerBase | None, spec: FeatureSpec, values: dict[str, NDArray[Any]]
) -> Iterator[str]:
    """The likeliest words at each place, or the chosen ones and the true one, with their probabilities."""

    def word(number: int | None) -> str:
        if number is None:
            return ""
        if tokenizer is None:
            return str(number)
        return str(tokenizer.decode([number])).strip() or repr(tokenizer.convert_ids_to_tokens(number))

    for unit, place in enumerate(places[:PLACES]):
        if spec.codec == "select":
            named = {word(number): logit for number, logit in zip(spec.ids, values["logits"][unit] if spec.ids else (), strict=True)}
            if place.true is not None:
                named[f"true {word(place.true)}"] = values["true_logit"][unit, 0]
            found = [(name, math.exp(logit - values["log_sum_exp"][unit, 0])) for name, logit in named.items()]
        elif spec.codec == "topk":
            found = [(word(int(i)), math.exp(log)) for i, log in zip(values["ids"][unit, :WORDS], values["log_probs"][unit], strict=False)]
            found.append(("others", 1 - sum(probability for _, probability in found)))
        else:
            log_probs = log_softmax(values[""][unit].astype(np.float64))
            found = [(word(int(i)), math.exp(log_probs[i])) for i in np.argsort(-log_probs)[:WORDS]]
        at = "" if place.number is None else f"{place.number:>5} {word(place.token)}"
        true = f" ({word(place.true)})" if place.true is not None else ""
        yield f"  {at + true:32} " + "  ".join(f"{name} {probability:.1%}" for name, probability in found)
    if len(places) > PLACES:
        yield f"  {'':5} and {len(places) - PLACES} more places"


def _range(norms_n: NDArray[np.float64]) -> str:
    if len(norms_n) == 1:
        return f"{norms_n[0]:.4g}"
    return f"{norms_n.min():.4g} to {norms_n.max():.4g}, mean {norms_n.mean():.4g}" if len(norms_n) else "of no token"


def _bars(norms_n: NDArray[np.float64]) -> str:
    """One bar for each of the first tokens, as high as its norm among them."""
    norms_n = norms_n[:BARS]
    spread = max(float(np.ptp(norms_n)), 1e-12)
    return "".join(_BARS[int((norm - norms_n.min()) / spread * (len(_BARS) - 1))] for norm in norms_n)
