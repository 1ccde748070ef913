"""Conditions on rows: their length, label, domain and source, and how sure a stored teacher was of them.

Shapes: r rows of a slot, n rows that are looked at, u units of them (tokens, labelled tokens or rows), K kept words.
"""

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator, model_validator

from store.codecs import decode
from store.errors import MissingFeature
from store.features import FeatureKey, FeatureSpec
from store.manifest import Task
from store.reader import Store
from store.strict import Strict, did_you_mean
from store.table import Ints, RowTable
from store.together import PassName, names, stored

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

UNITS = 4096
"""Answers that are looked at in one go."""


class Range(Strict):
    """Numbers from ``min`` to ``max``, both included; one of them may be left out."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> "Range":
        if not self._empty() and (self.min is None or self.max is None or self.min <= self.max):
            return self
        raise ValueError(f"expected {self._wanted()}, with min not above max")

    def _empty(self) -> bool:
        return self.min is None and self.max is None

    def _wanted(self) -> str:
        return "min, max or both"

    def holds(self, values: NDArray[Any]) -> Mask:
        """Which ``values`` are in the range; NaN never is."""
        low, high = -np.inf if self.min is None else self.min, np.inf if self.max is None else self.max
        inside: Mask = (values >= low) & (values <= high)
        return inside


class Labels(Range):
    """Labels of rows: one of ``values`` (class names or numbers), or a range of numbers."""

    values: tuple[float | str, ...] = ()

    def _empty(self) -> bool:
        return super()._empty() == (not self.values)

    def _wanted(self) -> str:
        return "either values, or min, max or both"


class Sureness(Range):
    """How sure the teacher was of a row, from what is stored of its pass."""

    of: str | None = None
    """Stored feature: task_logits or lm_logits, in any form, such as lm_logits@labels:top64. By default task_logits@row, or else the only
    word predictions that the pass stores."""

    @field_validator("of")
    @classmethod
    def _of_answers(cls, value: str | None) -> str | None:
        if value is not None and FeatureKey.parse(value).site not in ("task_logits", "lm_logits"):
            raise ValueError("expected task_logits or lm_logits, the answers of a teacher")
        return value


class Where(Strict):
    """Conditions that rows must meet, all of them. Rows of a group (the choices of a question) are kept where each of them does."""

    length: Range | None = None
    """Tokens of the row."""
    label: Labels | None = None
    """Label of the row; rows without one are left out."""
    domain: tuple[str, ...] = ()
    """Names of domains that the row may be of."""
    source: tuple[str, ...] = ()
    """Files that the text came from: patterns such as news-*.jsonl, for the whole path or its last part."""
    entropy: Sureness | None = None
    """Of the teacher's answer, in nats: over the classes or words that are stored, all others counting as one; the mean over the row's
    tokens where each has an answer. Rows without an answer are left out."""
    confidence: Sureness | None = None
    """Probability of the teacher's likeliest class or (of the stored) word, from 0 to 1; the mean over the row's tokens where each has an
    answer. Rows without an answer are left out."""

    @model_validator(mode="after")
    def _has_a_condition(self) -> "Where":
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError(f"expected at least one of {', '.join(type(self).model_fields)}")
        return self


Condition = Callable[[Ints], Mask]
"""Which of the rows with these numbers [n] (of one slot; ascending from call to call) meet it."""


def conditions(where: Where, store: Store, pass_name: PassName | None) -> dict[str, Condition]:
    """The conditions of ``where`` on rows of ``store`` by name, cheap ones first.

    Args:
        pass_name: The teacher's pass, or passes, whose answers count.

    Raises:
        ValueError: an unknown name of a class or domain, or answers that are no distribution.
        MissingFeature: the pass stores no such answers.
    """
    table, found = store.rows, {}
    if (length := where.length) is not None:
        found["length"] = lambda rows: length.holds(table.at(rows).length)
    if (label := where.label) is not None:
        found["label"] = _label(label, table)
    if where.domain:
        found["domain"] = _domain(where.domain, table)
    if where.source:
        found["source"] = Sources(table, where.source)
    for name in ("entropy", "confidence"):
        if (wanted := getattr(where, name)) is not None:
            found[name] = _sureness(name, wanted, store, pass_name)
    return found


class Sources:
    """Condition on where a text came from: reads the Parquet files of the row table once, one after the other."""

    def __init__(self, table: RowTable, patterns: tuple[str, ...]) -> None:
        self.seen: set[str] = set()
        """All sources that were met."""
        self._patterns = patterns
        self._parts = self._read(table)
        self._first, self._matches = 0, np.zeros(0, np.bool_)

    def __call__(self, rows: Ints) -> Mask:
        found = []
        while len(rows):
            here = int(np.searchsorted(rows, self._first + len(self._matches)))
            found.append(self._matches[rows[:here] - self._first])
            rows = rows[here:]
            if len(rows):
                self._first += len(self._matches)
                self._matches = next(self._parts)
        return np.concatenate(found) if found else np.zeros(0, np.bool_)

    def _read(self, table: RowTable) -> Iterator[Mask]:
        for number in range(len(table.info.parts)):
            column = table.part(number, ["source"])["source"].combine_chunks().dictionary_encode()
            names = column.dictionary.to_pylist()
            self.seen.update(names)
            yield np.array([self._match(name) for name in names], np.bool_)[column.indices.to_numpy()]

    def _match(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition("/")[2]) for pattern in self._patterns)


def _label(wanted: Labels, table: RowTable) -> Condition:
    if not wanted.values:
        return lambda rows: wanted.holds(table.label_at(rows))
    numbers = np.array([_class_number(value, table.info.task, table) for value in wanted.values], np.float64)
    return lambda rows: np.isin(table.label_at(rows), numbers)


def _domain(wanted: tuple[str, ...], table: RowTable) -> Condition:
    known = table.info.domains
    if not known:
        raise ValueError(f"where: domain: the rows of {table.store} have no domains; build them with rows.domain")
    for name in wanted:
        if name not in known:
            raise ValueError(f"where: domain: {table.store} has no domain {name!r}{did_you_mean(name, known)}")
    numbers = np.array([known.index(name) for name in wanted])
    return lambda rows: np.isin(table.domain_at(rows), numbers)


def _class_number(value: float | str, task: Task, table: RowTable) -> float:
    if not isinstance(value, str):
        return value
    if value not in task.classes:
        known = did_you_mean(value, task.classes) if task.classes else "; its labels are numbers"
        raise ValueError(f"where: label: {table.store} has no class {value!r}{known}")
    return float(task.classes.index(value))


def _sureness(name: str, wanted: Sureness, store: Store, pass_name: PassName | None) -> Condition:
    if pass_name is None:
        raise ValueError(f"where: {name}: give the data a pass_name, whose teacher it is about")
    key = _answers(name, wanted, store, names(pass_name))
    spec = store.spec(key)
    if spec.codec == "draw":
        raise ValueError(f"where: {name}: {key} holds random words, not how sure the teacher was; dump task_logits or a top form too")
    if not key.form and spec.arrays[0].width < 2:
        raise ValueError(f"where: {name}: {key} is one number, which is no distribution over classes")

    def holds(rows: Ints) -> Mask:
        values = np.empty(len(rows))
        counts = store.rows.at(rows).units(key.positions)[1]
        cuts = np.flatnonzero(np.diff(np.cumsum(counts) // UNITS)) + 1
        for some in np.split(np.arange(len(rows)), cuts):
            of_units = sureness(name, spec, store.read(key, rows[some]))
            values[some] = _means(of_units, counts[some])
        return wanted.holds(values)

    return holds


def _answers(name: str, wanted: Sureness, store: Store, passes: tuple[str, ...]) -> FeatureKey:
    """The stored feature that ``wanted`` is about."""
    known, pass_name = store.manifest.passes, ", ".join(passes)
    for one in passes:
        if one not in known:
            raise MissingFeature(f"{store.where} has no pass {one!r}{did_you_mean(one, sorted(known))}")
    of_pass = {key: one for key, (one, _) in stored({one: known[one] for one in passes}).items()}
    if wanted.of is not None:
        key = FeatureKey.parse(wanted.of)
        return key.of(of_pass.get(key.of(""), passes[0]))
    keys = list(of_pass)
    of_rows = [key for key in keys if (key.site, key.positions) == ("task_logits", "row")]
    found = of_rows or [key for key in keys if key.site in ("task_logits", "lm_logits")]
    if len(found) == 1:
        return found[0].of(of_pass[found[0]])
    if found:
        raise ValueError(f"where: {name}: pass {pass_name} stores {', '.join(map(str, found))}; say which with {name}.of")
    raise MissingFeature(
        f"where: {name}: pass {pass_name} of {store.where} stores no answers; dump task_logits@row, or word predictions such as "
        "lm_logits@labels:top64"
    )


def sureness(name: str, spec: FeatureSpec, arrays: dict[str, NDArray[Any]]) -> Floats:
    """[u] ``entropy`` or ``confidence`` of stored answers.

    With p the probabilities that are stored and q = 1 - sum(p) that of everything else, entropy = -sum(p ln p) - q ln q and confidence =
    max(p). Classes and whole vocabularies leave nothing else; ``topK`` and ``topHdrawM`` store the likeliest words and q, so that their
    confidence is exact and their entropy a lower bound; ``select`` is about the chosen words, and for its confidence the true one too.
    """
    values = {array: number.astype(np.float64) for array, number in decode(spec, arrays).items() if array != "ids"}
    if "log_probs" in values:
        log_p, others = values["log_probs"], np.exp(values["log_tail"][:, 0])
    elif "log_sum_exp" in values:
        log_p = values.get("logits", np.empty((len(values["log_sum_exp"]), 0))) - values["log_sum_exp"]
        others = np.clip(1 - np.exp(log_p).sum(1), 0, 1)
        if name == "confidence":
            log_p = np.concatenate([log_p, values["true_logit"] - values["log_sum_exp"]], 1)
    else:
        (logits,) = values.values()
        highest = logits.max(1, keepdims=True)
        log_p = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
        others = np.zeros(len(logits))
    if name == "confidence":
        sure: Floats = np.exp(np.fmax.reduce(log_p, 1))  # a true logit is NaN where there is no label
        return sure
    spread: Floats = -(np.exp(log_p) * log_p).sum(1) - others * np.log(np.where(others > 0, others, 1))
    return spread


def _means(values: Floats, counts: Ints) -> Floats:
    """[n] mean over each row's units; NaN where it has none."""
    sums = np.bincount(np.repeat(np.arange(len(counts)), counts), values, len(counts))
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
