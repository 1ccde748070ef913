"""Which methods are worth a try for a teacher, a student, an amount of text and a budget: what each reads, takes and needs to run.

The advice is that of student_train.advice. Whether a method fits the two models is asked of the method itself, what it reads of
`student-train needs`' outline of the recipe that would be pasted, and what a dump keeps of it of the planner.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from online.flops import ForwardFlops, forward_flops
from online.models import load_config, model_shape
from online.planner import Units, plan
from store.codecs import feature_spec
from store.features import FeatureKey
from store.reader import Store
from store.shape import Head, ModelShape
from store.strict import parse
from student_train.advice import Case, Rule, Task, about, takes_blocks
from student_train.break_even import USUAL, Passes, Rates
from student_train.method_reads import DTYPE, Pair, pair_of
from student_train.needs import needs
from student_train.outline import HEAD_OF, outline
from student_train.recipe import TrainRecipe

STORE, PASS = "STORE", "teacher"
"""What recipes call a store and a pass that are not there yet."""
LABELLED = {"masked_lm": 0.15, "causal_lm": 1.0}
"""Share of tokens with a word to predict, where there is no store to count them in."""
TRAINING = 3
"""Forward passes that a step of training takes: forward, and twice as much backward (Kaplan et al. 2020, arXiv 2001.08361)."""
_OF_HEAD: dict[Head, Task] = {
    "masked_lm": "masked_lm",
    "causal_lm": "causal_lm",
    "token_classification": "classification",
    "multiple_choice": "classification",
}


@dataclass(frozen=True)
class Asked:
    """What advice is asked for."""

    teacher: Path
    store: Path | None = None
    """Whose rows are learned from; without one, ``rows`` or ``tokens`` of ``length`` each."""
    rows: float | None = None
    tokens: float | None = None
    length: float = 128.0
    changes: tuple[str, ...] = ()
    """``option=value`` of the student's configuration."""
    student: Path | None = None
    """Folder of a pretrained student, instead of ``changes``."""
    task: str | None = None
    """Of student_train.advice.TASKS; that of the teacher's head by default."""
    students: int = 1
    """How many are trained: combinations of a sweep times seeds."""
    epochs: float = 3.0
    """Of each phase."""
    disk: float | None = None
    """Bytes that a store may take."""
    hours: float | None = None
    """Of the machine, for everything."""
    rates: Rates = USUAL


@dataclass(frozen=True)
class Text:
    """How much is learned from."""

    rows: float
    tokens: float
    labelled: float
    """Tokens with a word to predict."""

    @classmethod
    def of(cls, asked: Asked, head: Head) -> "Text":
        """The rows of a store, all splits, or as many as are said."""
        if asked.store is not None:
            rows = Store.open(asked.store).rows
            return cls(len(rows), rows.info.tokens, int(rows.slot_labelled.sum()))
        tokens = asked.tokens or (asked.rows or 0.0) * asked.length
        return cls(tokens / asked.length, tokens, tokens * LABELLED.get(head, 0.0))

    @property
    def length(self) -> float:
        """Tokens of a row."""
        return self.tokens / self.rows

    @property
    def units(self) -> Units:
        """How many values a row has."""
        return Units(self.length, self.labelled / self.rows)


@dataclass(frozen=True)
class Suggestion:
    """A method for the case, worked out."""

    rule: Rule
    live: bool
    """Whether the teacher is to answer in each run, because it must or because that is cheaper than a store."""
    tree: Mapping[str, Any]
    """The recipe as it is to be pasted."""
    dump: str
    """Lines of a dump recipe; empty where the teacher answers live."""
    reads: tuple[FeatureKey, ...]
    stored: tuple[FeatureKey, ...]
    unit_bytes: Mapping[str, int]
    """Unit -> bytes of the features that are stored, in DTYPE."""
    bytes: float
    """Of the store's features."""
    passes: Passes
    student_seconds: float
    """Of all students' own work."""

    @property
    def seconds(self) -> float:
        """Of everything, the cheaper way."""
        return self.student_seconds + (self.passes.live if self.live else self.passes.stored)

    def fits(self, asked: Asked) -> bool:
        """Whether the disk takes the store, where there is to be one."""
        return self.live or asked.disk is None or self.bytes <= asked.disk


@dataclass(frozen=True)
class Suggested:
    """All advice on a case."""

    asked: Asked
    case: Case
    text: Text
    found: tuple[Suggestion, ...]
    """Those that fit the disk in the order of the rules, then the others."""
    refused: Mapping[str, str]
    """Name of a rule -> why its methods cannot be taken."""
    rest: tuple[Rule, ...]
    """Advice beside methods."""

    @property
    def best(self) -> Suggestion | None:
        """The first one that the disk takes."""
        return next((one for one in self.found if one.fits(self.asked)), None)


def suggest(asked: Asked) -> Suggested:
    """Work the advice out; configurations are read, and nothing else but the numbers of a store.

    Raises:
        ValueError: no such folder, a task that the teacher has no head for, or a student that its configuration does not allow.
    """
    pair = pair_of(asked.teacher, asked.changes)
    task = _task(asked, pair.teacher)
    student = pair.student if asked.student is None else _folder_shape(asked.student, pair.teacher.head)
    text = Text.of(asked, pair.teacher.head)
    two_blocks = 2 * 2 * pair.teacher.width * text.tokens
    case = Case(task, pair.teacher, student, asked.student is not None, asked.disk is not None and asked.disk < two_blocks)
    found, refused = [], {}
    for rule in about("method", case):
        try:
            found.append(_worked_out(rule, asked, case, pair, text))
        except ValueError as error:
            refused[rule.name] = str(error)
    ranked = sorted(found, key=lambda one: not one.fits(asked))
    rest = tuple(rule for kind in ("start", "features", "order", "caution") for rule in about(kind, case))
    return Suggested(asked, case, text, tuple(ranked), refused, rest)


def _task(asked: Asked, teacher: ModelShape) -> Task:
    """What the teacher's head is for; raises ValueError where the task that is asked for is another."""
    if teacher.head == "base":
        raise ValueError(
            f"{asked.teacher} names no head in its config.json (architectures), so there is nothing to predict: expected one of "
            f"{', '.join(HEAD_OF)}. To distil sentence vectors or hidden states of an encoder see `student-train methods sentence`"
        )
    own = _OF_HEAD.get(teacher.head, "classification" if teacher.labels > 1 else "regression")
    if asked.task not in (None, own):
        raise ValueError(
            f"--task {asked.task}: {asked.teacher} has the head {teacher.head}, which is one for {own}: tune it on the task first (a phase "
            "with `teacher: none`), since answers of a teacher that does not know the task are of no use there"
        )
    return own


def _folder_shape(folder: Path, head: Head) -> ModelShape:
    """A pretrained student's shape, with the teacher's head."""
    return model_shape(load_config(folder), head)


def _worked_out(rule: Rule, asked: Asked, case: Case, pair: Pair, text: Text) -> Suggestion:
    """What a rule comes to; raises ValueError where its methods refuse the models."""
    recipe = parse(TrainRecipe, _tree(rule, asked, case, rule.online), rule.name)
    folders = {"": asked.teacher}
    outlines = [outline(recipe, phase, folders) for phase in recipe.phases]
    keys = {key for one in outlines for key in one.method_keys[""]}
    stored = {} if rule.online else plan(dict.fromkeys(sorted(keys), DTYPE), pair.teacher, pair.wiring, text.units).stored
    units: dict[str, int] = {}
    total = 0.0
    for key, dtype in stored.items():
        unit_bytes = feature_spec(key, dtype, pair.teacher.unit_width(key)).unit_bytes
        units[key.unit] = units.get(key.unit, 0) + unit_bytes
        total += unit_bytes * text.rows * text.units.of(key)
    shaped, flops = outlines[0].blueprint, forward_flops(load_config(asked.teacher), pair.teacher.head)
    words = max((text.rows * text.units.of(key) for key in keys if key.site == "lm_logits"), default=0.0)
    count = asked.students * asked.epochs * len(outlines)
    own = TRAINING * count * text.tokens * _of_token(forward_flops(shaped.config, shaped.head), text, words)
    passes = Passes(text.tokens, count, _of_token(flops, text, 0), total / text.tokens, asked.rates)
    live = rule.online or not passes.pays
    return Suggestion(
        rule=rule,
        live=live,
        tree=_tree(rule, asked, case, live),
        dump="" if live else needs([recipe], folders),
        reads=tuple(sorted(keys)),
        stored=tuple(stored),
        unit_bytes=units,
        bytes=total,
        passes=passes,
        student_seconds=own / asked.rates.flops,
    )


def _of_token(flops: ForwardFlops, text: Text, words: float) -> float:
    """Operations of a forward pass for a token, ``words`` tokens of all going through the language-model head."""
    return flops.token + flops.pair * text.length + flops.row / text.length + flops.word * words / text.tokens


def _tree(rule: Rule, asked: Asked, case: Case, live: bool) -> dict[str, Any]:
    """The training recipe of a rule, with the teacher at work or its answers in a store."""
    online = {"teacher": {"online": {"model": str(asked.teacher), "head": case.teacher.head}}}
    data = [{"store": STORE} if live else {"store": STORE, "pass_name": PASS}]
    phases: list[dict[str, Any]] = []
    for methods in rule.phases:
        name = "_".join(str(method["name"]) for method in methods)
        start = {"phase": phases[-1]["name"]} if phases else _start(rule, asked, case)
        written = [_with_map(method, rule, case) for method in methods]
        phase = {"name": name, **(online if live else {}), "student": start, "data": data, "methods": written}
        phases.append({**phase, "epochs": asked.epochs, "batch_rows": 32})
    return {"output": "OUTPUT", "seed": 0, "phases": phases}


def _with_map(method: Mapping[str, Any], rule: Rule, case: Case) -> dict[str, Any]:
    """A method whose student blocks learn from those that they start from, as arXiv 2305.15032 has it."""
    if method["name"] in ("att_mse", "hid_seq") and takes_blocks(case) and rule.start != "random":
        return {**method, "options": {**method.get("options", {}), "layers": "same_as_init"}}
    return dict(method)


def _start(rule: Rule, asked: Asked, case: Case) -> dict[str, Any]:
    """The student of a recipe's first phase."""
    if asked.student is not None:
        return {
            "model": {"model": str(asked.student), "head": case.teacher.head, "new_head": case.task in ("classification", "regression")}
        }
    if takes_blocks(case) and rule.start != "random":
        step = case.teacher.layers // case.student.layers
        blocks = [step * block for block in range(1, case.student.layers + 1)] if rule.start == "every" else None
        return {"layers": blocks or f"first {case.student.layers}"}
    return {"random": dict(_changes(asked, case))}


def _changes(asked: Asked, case: Case) -> Iterator[tuple[str, Any]]:
    """What differs in the student's configuration."""
    given: Sequence[str] = asked.changes
    if not any(change.startswith("num_hidden_layers=") for change in given):
        yield "num_hidden_layers", case.student.layers
    for change in given:
        name, _, value = change.partition("=")
        yield name, yaml.safe_load(value)
