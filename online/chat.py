"""Conversations as causal rows: rendered by the tokenizer's own chat template, scored on the assistant's words alone.

The template is a Jinja program in the tokenizer's folder; transformers runs it in Jinja's sandbox, which reaches neither files nor network.
Where it marks what the assistant says (``{% generation %}``), that is scored. Otherwise a reply is what rendering with it adds to rendering
up to it with the generation prompt: its words, and what ends the turn. A template for which that is no continuation (one that drops the
thoughts of earlier turns, for instance) is refused for such conversations rather than guessed at.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from online.batch import IGNORED
from online.corpus import Record
from online.drafts import Draft
from store.strict import Strict

if TYPE_CHECKING:
    from online.rows_spec import RowsSpec

Message = dict[str, str]
ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatSpec(Strict):
    """Where the turns of a conversation stand in a record: a column of messages, or one of a prompt and one of its response."""

    messages: str | None = None
    """Column with a list of {role, content}, both text."""
    prompt: str | None = None
    """Column of what the user says, in conversations of one exchange."""
    response: str | None = None
    """Column of what the assistant answers to it."""
    variables: dict[str, str | bool | int] = Field(default_factory=dict)
    """What the template is told beside the messages, such as {enable_thinking: false} or {date_string: 1 Jan 2026}."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = (self.messages is not None, self.prompt is not None, self.response is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ValueError("expected a column of messages, or the two columns prompt and response")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(name for name in (self.messages, self.prompt, self.response) if name is not None)


def chat_problems(spec: "RowsSpec") -> Iterator[tuple[bool, str]]:
    """Options that conversations do not go with: whether each is given, and what is wrong then."""
    others = ("response", "cloze", "label", "group", "phrases", "interchange", "spans", "choices")
    given = [name for name in others if getattr(spec, name)] + (["text"] if spec.text != ("{text}",) else [])
    yield bool(given), f"chat: the tokenizer's template writes the whole row; leave {', '.join(given)} out"
    yield spec.objective != "causal", f"chat: expected objective causal, found {spec.objective}"
    yield spec.long == "split", "chat: expected long: truncate or pack, found split: half a conversation lacks what it answers to"


class Conversation(NamedTuple):
    """One conversation of n tokens."""

    record: Record
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """[n] the next token where the assistant says it, else IGNORED."""


def conversations(records: Iterable[Record], spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Draft]]:
    """The rows of all conversations, each a group of its own.

    ``long: truncate``: a row for each. ``long: pack``: as many whole ones as fit, in their order, splits and domains apart; none is cut in
    two, since its second half would lack what it answers to. A conversation longer than ``max_length`` loses its end in either case; one
    of which no word of the assistant is left is refused, or skipped where the rows skip what is empty.

    Raises:
        ValueError: a tokenizer without a chat template, or one that cannot tell replies apart; messages that are none; names the record.
    """
    read = _Reader(spec, tokenizer)
    waiting: dict[tuple[str, int | None], list[Conversation]] = {}
    for record in records:
        found = read(record)
        if found is None:
            continue
        if spec.long == "truncate":
            yield [_row([found], packed=False)]
            continue
        row = waiting.setdefault((record.split, record.domain), [])
        if row and sum(len(one.ids) for one in row) + len(found.ids) > spec.max_length:
            yield [_row(row, packed=True)]
            row.clear()
        row.append(found)
    for row in waiting.values():
        yield [_row(row, packed=True)]


def _row(members: list[Conversation], packed: bool) -> Draft:
    ids = np.concatenate([one.ids for one in members])
    documents = np.repeat(np.arange(len(members), dtype=np.uint16), [len(one.ids) for one in members]) if packed else None
    labels = np.concatenate([one.labels for one in members])
    return Draft(members[0].record, 0, ids, np.zeros(len(ids), bool), documents=documents, token_labels=labels)


class _Reader:
    """Record -> conversation, or None where it is skipped."""

    def __init__(self, spec: "RowsSpec", tokenizer: PreTrainedTokenizerBase) -> None:
        assert spec.chat is not None
        self.spec, self.chat, self.tokenizer = spec, spec.chat, tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                "chat: this tokenizer has no chat template, so nobody knows how its model expects turns to be written; put the model's "
                "chat_template.jinja into the tokenizer's folder, or write the turns yourself with text and response"
            )
        if not tokenizer.is_fast:
            raise ValueError("chat: a fast tokenizer (tokenizer.json) is needed, which knows where a token lies in the text")
        self.variables = {**spec.chat.variables, "strftime_now": ""}  # in place of the function of this name, so that a call to it fails
        self.marked = _MARKS.search(tokenizer.get_chat_template()) is not None

    def __call__(self, record: Record) -> Conversation | None:
        messages = self.messages(record)
        try:
            tokens, said = self.by_marks(messages) if self.marked else self.by_prefix(messages, record)
        except TypeError:
            if "strftime_now" not in self.tokenizer.get_chat_template():
                raise
            raise ValueError(
                f"{record.where}: the tokenizer's chat template writes today's date, with which rows would differ from day to day; give it "
                "one, as in rows.chat.variables.date_string='1 Jan 2026'"
            ) from None
        except TemplateError as error:
            raise ValueError(f"{record.where}: the tokenizer's chat template refuses the messages: {error}") from None
        ids, said_n = np.array(tokens[: self.spec.max_length], np.int32), np.array(said[: self.spec.max_length], bool)
        labels = np.full(len(ids), IGNORED, np.int32)
        labels[:-1][said_n[1:]] = ids[1:][said_n[1:]]
        if (labels != IGNORED).any():
            return Conversation(record, ids, labels)
        if self.spec.empty == "error":
            raise ValueError(
                f"{record.where}: no word of the assistant among its first {self.spec.max_length} of {len(tokens)} tokens; raise "
                "rows.max_length, or set rows.empty=skip to leave such records out"
            )
        return None

    def messages(self, record: Record) -> list[Message]:
        """The turns of a record."""
        if self.chat.messages is None:
            said = [record.values[column] for column in self.chat.columns]
            return [_message({"role": role, "content": text}, record) for role, text in zip(("user", ASSISTANT), said, strict=True)]
        value = record.values[self.chat.messages]
        if not isinstance(value, list) or not value:
            raise ValueError(f"{record.where}: column {self.chat.messages!r}: expected a list of {{role, content}}, found {value!r}")
        return [_message(item, record) for item in value]

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self.variables)
        assert isinstance(text, str)
        return text

    def by_marks(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them the template marks as the assistant's."""
        found = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **self.variables)
        return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]

    def by_prefix(self, messages: list[Message], record: Record) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them reach into what a reply adds to the conversation so far."""
        text, replies = self.render(messages), []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.render(messages[:number], prompt=True)
            after = self.render(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{record.where}: the chat template writes turn {number} (counted from 0) otherwise once others follow it, or begins "
                    "it otherwise than its generation prompt, so that nobody can say which words are the assistant's; end the conversation "
                    "there, or give a template that marks them with {% generation %}"
                )
            replies.append((len(before), len(after)))
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        said = [any(start < end and first < end and start < last for start, end in replies) for first, last in encoding["offset_mapping"]]
        return list(encoding["input_ids"]), said


def _message(item: object, record: Record) -> Message:
    """One turn; keys that are null (as Parquet has them for those of other turns) are not there."""
    known = {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else {}
    if known.keys() != {"role", "content"} or not all(isinstance(value, str) for value in known.values()):
        raise ValueError(f"{record.where}: expected a turn as {{role, content}}, both text, found {item!r}")
    return known
