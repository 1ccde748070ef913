"""How text becomes rows (RowsSpec), and what tells rows that were built in one way from others."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from online.batch import BUCKET
from online.chat import ChatSpec, chat_problems
from online.cloze_rows import MASK, ClozeSpec, cloze_problems
from online.corpus import SourceSpec, read_records
from online.domains import DomainSpec
from online.kept_words import mapped_by
from online.labels import LabelSpec
from online.padded import padding_problems
from online.pairs import InterchangeSpec
from online.phrases import PhraseSpec
from online.spans import SpanSpec
from online.templates import Template
from store.manifest import Task
from store.shards import CHUNK
from store.strict import Strict

BUILDING = 1
"""Version of row building; any change that alters rows bumps it."""


class RowsSpec(Strict):
    """How text becomes rows."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    text: tuple[str, ...] = ("{text}",)
    """Templates over columns, such as "{question}". The first is the row's first segment; all others are the second, joined by the
    tokenizer's separator token (or its end-of-text token, or a line break)."""
    choices: tuple[str, ...] = ()
    """One template for each choice; each makes a row of one group, with the choice at the end of the second segment."""
    label: LabelSpec | None = None
    """The label of a record; for choices the number of the right one."""
    cloze: ClozeSpec | None = None
    """Rows in which a masked word stands for the label: ``text`` has a field {mask}, as in "{sentence1} It was {mask}."; goes with
    objective mlm, which then masks nothing else."""
    group: str | None = None
    """Column; consecutive records of one source with one value are read together (MultiRC: the question)."""
    response: str | None = None
    """Field of the text at which, in causal rows, a response begins: it alone is scored, and what stands in front of it is its prompt.
    A token that reaches into it belongs to it."""
    chat: ChatSpec | None = None
    """Conversations in place of texts, as the tokenizer's chat template writes them; what the assistant says is scored, and it alone."""
    spans: tuple[SpanSpec, ...] = ()
    """Marked stretches of text that metrics need."""
    domain: DomainSpec | None = None
    """The domain of a record, for methods that treat domains apart."""
    phrases: PhraseSpec | None = None
    """Which tokens make a phrase, for methods that compare phrases."""
    interchange: InterchangeSpec | None = None
    """Rows in pairs that take hidden states of one another, for interventions (DIITO); each masking copy pairs them anew."""
    vocabulary: Path | None = None
    """Folder of a student with a smaller vocabulary: each word that it drops is replaced by the one that stands for it, so that teachers
    read what it reads (an ablation of GLMD)."""
    padding: bool = False
    """Rows are filled up to max_length with padding that counts: no token of the text sees it, but it sees the text, and what teachers
    answer on it is kept and compared like everything else (an ablation of GLMD)."""
    max_length: int = Field(default=128, ge=2)
    """Longest row in tokens, special tokens included."""
    long: Literal["truncate", "split", "pack"] = "truncate"
    """truncate: tokens go from the end of the longer segment, one by one; split: a document becomes several rows; pack: documents
    follow one another in rows of max_length tokens, each seeing only itself."""
    empty: Literal["error", "skip"] = "error"
    """What happens to records whose text is nothing but white space."""
    objective: Literal["plain", "mlm", "causal"] = "plain"
    """mlm: chosen tokens are hidden and labelled with the original; causal: each token is labelled with the next one, and documents end
    with the end-of-text token where there is room; plain: neither."""
    mask_probability: float = Field(default=0.15, gt=0, le=1)
    """Chance of a token to be chosen for mlm; of the chosen 80 % are masked, 10 % replaced, 10 % kept. Every row has at least one."""
    copies: int = Field(default=1, ge=1, le=1000)
    """Different maskings of each text; epoch e of a training reads copy e mod copies, evaluation copy 0."""
    hold_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training records (with a group column: of the groups) that become split dev, chosen by a hash of their number."""
    slot_tokens: int = Field(default=32768, ge=CHUNK, multiple_of=CHUNK)
    """Tokens of a shard, the unit in which a dump is committed."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the masks."""

    @field_validator("text", mode="before")
    @classmethod
    def _one_template(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("text", "choices")
    @classmethod
    def _templates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            Template(template)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for wrong, problem in self._problems():
            if wrong:
                raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[tuple[bool, str]]:
        fields = self._fields
        yield not fields, "text: expected a column name between braces, such as {text}"
        whole = len(self.text) == 1 and not (self.choices or self.label or self.group or self.spans)
        yield self.long != "truncate" and not whole, f"long: {self.long} takes one text template and no choices, label, group or spans"
        yield self.long == "pack" and self.max_length > 1 << 16, "long: pack takes a max_length up to 65536"
        yield (
            self.objective == "causal" and (len(self.text) > 1 or bool(self.choices)),
            "objective: causal takes one text template and no choices",
        )
        answered = self.response is None or (self.objective == "causal" and self.long == "truncate" and self.response in fields)
        yield not answered, f"response: expected a field of a causal row's text, with long: truncate, found {self.response}"
        yield from chat_problems(self) if self.chat else ()
        yield self.copies > 1 and self.objective != "mlm", "copies: only objective mlm has masks that could differ"
        yield len(self.choices) == 1, "choices: expected two or more"
        yield from cloze_problems(self) if self.cloze else ()
        yield from padding_problems(self) if self.padding else ()
        grouped = bool(self.choices) or self.group is not None
        yield self.interchange is not None and grouped, "interchange: pairs are groups: leave choices and group out"
        masked = self.interchange is not None and self.interchange.positions == "masked"
        yield masked and self.objective != "mlm", "interchange: positions: only objective mlm has masked tokens"
        yield bool(self.choices) and self.group is not None, "group: the choices of a record already are a group"
        in_all = [*fields, *(name for choice in self.choices for name in Template(choice).fields)]
        by_column = self.phrases is not None and self.phrases.column is not None
        yield by_column and len(in_all) != 1, f"phrases: column takes one text field that is used once, found {', '.join(in_all)}"
        yield self.phrases is not None and self.max_length >= 1 << 16, "phrases: expected a max_length up to 65535"
        for span in self.spans:
            yield span.field not in fields, f"spans: no text template uses the field {span.field!r}"
        if self.label is None:
            return
        yield not (self.label.score or self.label.classes or self.choices), "label: expected classes or score"
        yield self.label.tokens and self.objective != "plain", "label: tokens takes objective plain"
        by_word = len(self.text) == 1 and Template(self.text[0]).parts == (("", fields[0]),)
        yield self.label.tokens and not by_word, "label: tokens takes one text template that is a single field"
        if self.choices:
            yield self.label.score or self.label.tokens, "label: of choices is the number of the right one, neither score nor tokens"
            yield len(self.label.classes) not in (0, len(self.choices)), f"label: expected {len(self.choices)} classes, one for each choice"

    @property
    def _fields(self) -> list[str]:
        """The columns of the text, in the order of their templates, or of conversations."""
        if self.chat is not None:
            return list(self.chat.columns)
        fields = [name for template in self.text for name in Template(template).fields]
        return [name for name in fields if name != MASK] if self.cloze else fields

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        used = [*self._fields, *(name for choice in self.choices for name in Template(choice).fields)]
        used += [name for span in self.spans for name in span.columns]
        used += [self.label.column] if self.label else []
        used += [self.group] if self.group else []
        used += [self.domain.column] if self.domain else []
        used += [self.phrases.column] if self.phrases and self.phrases.column else []
        return tuple(dict.fromkeys(used))

    @property
    def task(self) -> Task:
        """What the labels mean."""
        if self.choices:
            return Task(kind="choice", choices=len(self.choices))
        if self.label is None:
            return Task(kind="none")
        if self.label.score:
            return Task(kind="regression")
        return Task(kind="token" if self.label.tokens else "classification", classes=tuple(map(str, self.label.classes)))


def corpus_fingerprint(spec: RowsSpec) -> str:
    """SHA-256 over the values of all columns that are read, in order, and the split of each source; file names do not count."""
    digest = hashlib.sha256()
    for _ in read_records(spec.sources, spec.columns, digest=digest.update):
        pass
    return digest.hexdigest()


def building_fingerprint(spec: RowsSpec) -> str:
    """SHA-256 over everything but the corpus that decides what rows look like and where they lie."""
    # rows without these are as they always were
    later = {name for name in ("domain", "phrases", "interchange", "response", "cloze", "chat", "padding") if not getattr(spec, name)}
    options = spec.model_dump(mode="json", exclude={"sources", "vocabulary", *later})
    if spec.vocabulary is not None:
        options["vocabulary"] = mapped_by(spec.vocabulary).fingerprint
    return hashlib.sha256(json.dumps([BUILDING, BUCKET, options], sort_keys=True).encode()).hexdigest()
