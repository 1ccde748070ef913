"""Conversations become causal rows: as the tokenizer's template writes them, scored on the assistant's words alone, packed whole."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from online.batch import IGNORED
from online.collate import collate
from online.rows import build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint
from store.manifest import Provenance
from store.reader import Store
from store.rows import Row
from store.strict import parse

MADE = Provenance(command=("tests",), versions={}, created="2026-01-01T00:00:00Z")
PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
)
FORGETFUL = (  # as templates do that drop the thoughts of earlier turns
    "{% for message in messages %}<|{{ message.role }}|>{% if loop.last and message.role == 'assistant' %}!{% endif %}"
    "{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>!{% endif %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TALK = [
    [("user", "ab"), ("assistant", "cde")],
    [("system", "s"), ("user", "a"), ("assistant", "xy"), ("user", "b"), ("assistant", "z")],
    [("user", "q"), ("assistant", "")],
]


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """A token for each letter and for each mark of a turn."""
    numbers = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(numbers, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", additional_special_tokens=SPECIAL[:3])
    made.chat_template = template
    return made


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


def spec(folder: Path, talks: list[list[tuple[str, str]]], **options: Any) -> RowsSpec:  # noqa: ANN401
    file = folder / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages(talk)}) for talk in talks))
    rows = {"sources": [{"files": str(file)}], "chat": {"messages": "messages"}, "objective": "causal", "max_length": 32}
    return parse(RowsSpec, rows | options, "rows")


def built(made: RowsSpec, using: PreTrainedTokenizerFast) -> list[Row]:
    return [row for group in iter_groups(made, using) for row in group]


def written(talk: list[tuple[str, str]]) -> tuple[list[str], list[bool]]:
    """The tokens of a conversation by hand, and which of them the assistant says: a reply's letters and what ends it."""
    tokens, said = [], []
    for role, content in talk:
        tokens += [f"<|{role}|>", *content, "<|end|>"]
        said += [False, *([role == "assistant"] * (len(content) + 1))]
    return tokens, said


def expected_labels(using: PreTrainedTokenizerFast, talk: list[tuple[str, str]], most: int = 99) -> list[int]:
    tokens, said = (part[:most] for part in written(talk))
    ids = using.convert_tokens_to_ids(tokens)
    return [ids[place + 1] if place + 1 < len(ids) and said[place + 1] else IGNORED for place in range(len(ids))]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_every_reply_and_its_end_are_scored_and_nothing_else(template: str, tmp_path: Path) -> None:
    using = tokenizer(template)
    rows = built(spec(tmp_path, TALK), using)
    assert [using.convert_ids_to_tokens(row.input_ids.tolist()) for row in rows] == [written(talk)[0] for talk in TALK]
    for row, talk in zip(rows, TALK, strict=True):
        assert row.token_labels is not None
        assert row.token_labels.tolist() == expected_labels(using, talk)
        assert row.labelled == sum(label != IGNORED for label in row.token_labels.tolist())


def test_a_prompt_and_its_response_are_a_conversation_of_two_turns(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"p": "ab", "r": "cde"}))
    columns = {"sources": [{"files": str(tmp_path / "pairs.jsonl")}], "chat": {"prompt": "p", "response": "r"}, "objective": "causal"}
    [pair], [turns] = (
        built(made, tokenizer()) for made in (parse(RowsSpec, columns | {"max_length": 32}, "rows"), spec(tmp_path, TALK[:1]))
    )
    assert pair.input_ids.tolist() == turns.input_ids.tolist()
    assert pair.token_labels is not None
    assert turns.token_labels is not None
    assert pair.token_labels.tolist() == turns.token_labels.tolist()


def test_messages_of_parquet_are_those_of_json(tmp_path: Path) -> None:
    made = spec(tmp_path, TALK)
    pq.write_table(pa.table({"messages": [messages(talk) for talk in TALK]}), tmp_path / "chat.parquet")
    other = made.model_copy(update={"sources": (made.sources[0].model_copy(update={"files": (str(tmp_path / "chat.parquet"),)}),)})
    assert [row.input_ids.tolist() for row in built(other, tokenizer())] == [row.input_ids.tolist() for row in built(made, tokenizer())]


def test_packed_conversations_stay_whole_and_carry_their_own_labels(tmp_path: Path) -> None:
    using = tokenizer()
    sizes = [len(written(talk)[0]) for talk in TALK]
    rows = built(spec(tmp_path, TALK, long="pack", max_length=sizes[0] + sizes[1] + 2), using)
    assert [len(row.input_ids) for row in rows] == [sizes[0] + sizes[1], sizes[2]]
    first = rows[0]
    assert first.documents is not None
    assert first.token_labels is not None
    assert first.documents.tolist() == [0] * sizes[0] + [1] * sizes[1]
    assert first.token_labels.tolist() == [*expected_labels(using, TALK[0]), *expected_labels(using, TALK[1])]


def test_a_batch_of_packed_conversations_has_their_borders_and_positions(tmp_path: Path) -> None:
    build_rows(spec(tmp_path, TALK, long="pack", max_length=32), tokenizer(), tmp_path / "store", MADE)
    batch = collate(Store.open(tmp_path / "store"), np.arange(1))
    sizes = [len(written(talk)[0]) for talk in TALK]
    assert batch.position_ids is not None
    assert batch.token_labels is not None
    assert batch.position_ids[0, : sum(sizes)].tolist() == [place for size in sizes for place in range(size)]
    assert batch.token_labels[0, : sum(sizes)].tolist() == [label for talk in TALK for label in expected_labels(tokenizer(), talk)]


def test_a_long_conversation_loses_its_end_and_without_a_reply_is_refused_or_left_out(tmp_path: Path) -> None:
    using, short = tokenizer(), [TALK[1], [("user", "abcdefghij"), ("assistant", "k")]]
    [row] = built(spec(tmp_path, short, max_length=8, empty="skip"), using)
    assert row.token_labels is not None
    assert row.token_labels.tolist() == expected_labels(using, TALK[1], 8)
    with pytest.raises(ValueError, match=r"record 1 .*: no word of the assistant among its first 8 of 15 tokens; raise rows.max_length"):
        built(spec(tmp_path, short, max_length=8), using)


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    made = spec(tmp_path, TALK[1:2])
    with pytest.raises(ValueError, match="no chat template"):
        built(made, tokenizer(None))
    with pytest.raises(ValueError, match=r"writes turn 2 \(counted from 0\) otherwise once others follow it"):
        built(made, tokenizer(FORGETFUL))
    assert len(built(spec(tmp_path, TALK[:1]), tokenizer(FORGETFUL))) == 1
    with pytest.raises(ValueError, match="refuses the messages: no system"):
        built(made, tokenizer("{{ raise_exception('no system') }}"))


def test_a_template_that_writes_the_date_takes_one_from_the_recipe(tmp_path: Path) -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}" + PLAIN
    with pytest.raises(ValueError, match=r"today's date.* rows.chat.variables.date_string"):
        built(spec(tmp_path, TALK[:1]), tokenizer(dated))
    told = spec(tmp_path, TALK[:1], chat={"messages": "messages", "variables": {"date_string": "7"}})
    assert tokenizer().convert_ids_to_tokens(built(told, tokenizer(dated))[0].input_ids.tolist())[:2] == ["7", "<|user|>"]


@pytest.mark.parametrize("value", ["text", [], [{"role": "user"}], [{"role": "user", "content": "a", "tool": "b"}], [["user", "a"]]])
def test_what_is_no_conversation_is_refused_with_its_place(value: object, tmp_path: Path) -> None:
    made = spec(tmp_path, TALK[:1])
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": value}))
    with pytest.raises(ValueError, match=r"record 0 .*expected a (list|turn)"):
        built(made, tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "{a}"}, "chat: the tokenizer's template writes the whole row; leave text out"),
        ({"objective": "plain"}, "chat: expected objective causal, found plain"),
        ({"long": "split"}, "chat: expected long: truncate or pack, found split"),
        ({"chat": {"prompt": "a"}}, "expected a column of messages, or the two columns prompt and response"),
    ],
)
def test_options_that_do_not_go_with_conversations_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        spec(tmp_path, TALK, **options)


def test_rows_without_conversations_are_built_as_they_always_were(tmp_path: Path) -> None:
    plain = parse(RowsSpec, {"sources": [{"files": "a.jsonl"}]}, "rows")
    assert "chat" not in plain.columns
    assert building_fingerprint(plain) != building_fingerprint(spec(tmp_path, TALK))
