"""JSON lines of inference servers become a store: each distribution at the token that it is the answer at."""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import (
    MADE,
    VOCAB,
    best,
    bring_in,
    chat,
    check_next_words,
    follows,
    next_words,
    prompt_logprobs,
    scored_prompt,
    sentences,
    target,
    write_jsonl,
)
from step_kills import killed_at_random

from store import FeatureKey, FingerprintMismatch, Store, StoreError, feature_spec
from store.codecs.topk import NO_TAIL
from store.imports import LogProbs, Sample, import_rows, imported_pass
from store.verify import verify

HERE = Path(__file__).parent
TABLE = follows()


def log_probs(path: Path, top: int = 5, words: dict[str, int] | None = None) -> LogProbs:
    return LogProbs([path], top, VOCAB, "float32", words or {})


def test_scored_prompts_are_stored_at_the_token_before_the_one_they_are_of(tmp_path: Path) -> None:
    texts = sentences(20)
    source = log_probs(write_jsonl(tmp_path / "a.jsonl", [scored_prompt(ids, 5, TABLE) for ids in texts]))
    done = bring_in(source, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert (done.rows, done.tokens) == (20, sum(map(len, texts)))
    assert done.slots == done.new_slots > 2
    assert [ids for ids, _ in next_words(store, 5)] == texts
    assert [sorted(places) for _, places in next_words(store, 5)] == [list(range(len(ids) - 1)) for ids in texts]
    assert check_next_words(store, 5, TABLE) == sum(len(ids) - 1 for ids in texts)
    labels = store.tokens("token_labels", np.arange(20)).tolist()
    assert labels == [label for ids in texts for label in (*ids[1:], -100)]
    assert verify(store.path) == []
    about = store.rows.about(3)
    assert (about["source"], about["record"], about["split"]) == (str(tmp_path / "a.jsonl"), 3, "train")
    info = store.manifest.passes["teacher"]
    assert info.teacher == "unknown (imported)"
    assert (info.shape.family, info.shape.head, info.shape.vocab, info.shape.attends) == ("custom", "causal_lm", VOCAB, False)


def test_of_a_chat_only_the_answer_is_scored(tmp_path: Path) -> None:
    prompts, answers = sentences(9, seed=2), sentences(9, seed=3, shortest=1)
    source = log_probs(write_jsonl(tmp_path / "a.jsonl", [chat(p, a, 5, TABLE) for p, a in zip(prompts, answers, strict=True)]))
    bring_in(source, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    for (ids, places), prompt, answer in zip(next_words(store, 5), prompts, answers, strict=True):
        assert ids == prompt + answer
        assert sorted(places) == list(range(len(prompt) - 1, len(ids) - 1))
    assert check_next_words(store, 5, TABLE) == sum(map(len, answers))


def test_records_of_all_kinds_give_the_same_answers(tmp_path: Path) -> None:
    prompt, answer = [3, 7, 9], [4, 4, 30]
    whole = prompt + answer
    text = {f"w{word}": word for word in range(VOCAB)}
    named = [{f"w{word}": x for word, x in best(TABLE, before, 5)} for before in whole[:-1]]
    echoed = {"tokens": [f"w{word}" for word in whole], "top_logprobs": [None, *named]}
    spoken = [
        {"token": f"w{token}", "top_logprobs": [{"token": f"w{w}", "logprob": x} for w, x in best(TABLE, before, 5)]}
        for before, token in itertools.pairwise(whole[2:])
    ]
    both = {
        "prompt_token_ids": prompt,
        "prompt_logprobs": prompt_logprobs(prompt, 5, TABLE),
        "choices": [{"logprobs": {"content": spoken}}],
    }
    completion = {"tokens": [f"token_id:{w}" for w in answer], "top_logprobs": named[2:]}
    records: list[dict[str, Any]] = [
        both,
        {"response": {"status_code": 200, "body": both}, "error": None},
        {"choices": [{"logprobs": echoed}]},
        {"choices": [{"logprobs": echoed, "prompt_token_ids": prompt, "token_ids": answer}]},
        {"prompt_token_ids": whole, "prompt_logprobs": [None, *({str(text[w]): x for w, x in some.items()} for some in named)]},
        {
            "prompt_token_ids": prompt,
            "prompt_logprobs": both["prompt_logprobs"],
            "choices": [{"logprobs": completion, "token_ids": answer}],
        },
    ]
    bring_in(log_probs(write_jsonl(tmp_path / "a.jsonl", records), words=text), tmp_path / "store")
    first, *others = next_words(Store.open(tmp_path / "store"), 5)
    assert first[0] == whole
    assert sorted(first[1]) == [0, 1, 2, 3, 4]
    assert all(other == first for other in others)
    assert check_next_words(Store.open(tmp_path / "store"), 5, TABLE) == 30


def test_the_choices_of_a_record_are_a_group(tmp_path: Path) -> None:
    record = chat([1, 2], [5, 6, 7], 5, TABLE)
    record["choices"] += chat([1, 2], [8, 9], 5, TABLE)["choices"]
    bring_in(log_probs(write_jsonl(tmp_path / "a.jsonl", [record, record])), tmp_path / "store")
    rows = Store.open(tmp_path / "store").rows
    assert rows.columns.group.tolist() == [0, 0, 1, 1]
    assert [(row["record"], row["part"]) for row in rows.table.to_pylist()] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_tail_is_what_the_kept_words_leave(tmp_path: Path) -> None:
    words = [[0.5, 0.25], [1 - 1e-5, 1e-6], [0.75, 0.25], [0.75, 0.2501], [0.9, 0.1085]]
    record = {
        "prompt_token_ids": [1] * 6,
        "prompt_logprobs": [None, *({"7": math.log(a), "8": math.log(b)} for a, b in words)],
    }
    done = bring_in(log_probs(write_jsonl(tmp_path / "a.jsonl", [record]), top=2), tmp_path / "store")
    ((_, places),) = next_words(Store.open(tmp_path / "store"), 2)
    tails = [places[place][2] for place in range(5)]
    np.testing.assert_allclose(np.exp(tails[:2]), [0.25, 9e-6], rtol=1e-4)
    assert tails[2] == pytest.approx(NO_TAIL) or math.exp(tails[2]) < 1e-15
    assert tails[3:] == [float(NO_TAIL)] * 2
    np.testing.assert_allclose(np.exp(places[3][1]), [0.75, 0.2501], rtol=1e-6)  # rounding: left as it is
    np.testing.assert_allclose(np.exp(places[4][1]), [0.9 / 1.0085, 0.1085 / 1.0085], rtol=1e-6)  # lossy: made a distribution
    assert done.positions == 5
    assert done.full in (2, 3)


def scored(*words: object, prompt: object = (1, 2)) -> dict[str, object]:
    """A record of a prompt with these distributions."""
    return {"prompt_token_ids": prompt, "prompt_logprobs": list(words)}


def answered(**choice: object) -> dict[str, object]:
    """A record of an answer to a prompt of one token."""
    return {"prompt_token_ids": [1], "choices": [choice]}


ANSWER = chat([1], [2], 5, TABLE)["choices"][0]
REFUSED_LINES: dict[str, tuple[object, str]] = {
    "no JSON": (b"{", "not JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    "no object": ([1, 2], "expected a JSON object"),
    "nothing asked": (answered(text="x"), "has no log-probabilities"),
    "no prompt": ({"choices": [ANSWER]}, "no prompt_token_ids, so what the teacher read is not known"),
    "empty prompt": (chat([1], [2, 3], 5, TABLE) | {"prompt_token_ids": []}, "its prompt is empty"),
    "too few": (scored(None, {"1": -0.5}), "token 1: expected at least 5 words, found 1"),
    "cut short": (scored(None, {}, prompt=[1, 2, 3]), "expected 3 prompt_logprobs"),
    "first word": (scored({"1": -0.5}, {"1": -0.5}), "expected null for the first token"),
    "other words": (scored(None, {}, prompt=[1, 40]), "expected token ids 0 to 39, found 40"),
    "logits": (scored(None, {str(word): 3.0 - word for word in range(5)}), "add up to"),
    "NaN": (b'{"prompt_token_ids":[1,2],"prompt_logprobs":[null,{"1":NaN,"2":-1,"3":-2,"4":-3,"5":-9}]}', "finite"),
    "true": (scored(None, {str(word): True for word in range(5)}), "expected a log-probability"),
    "a text": (scored(None, {str(word): "x" for word in range(5)}), "expected a log-probability"),
    "no number": (scored(None, {"the": -1}), "expected the number of a token"),
    "huge number": (scored(None, {}, prompt=[1, 10**40]), "expected token ids 0 to 39"),
    "unknown text": (answered(logprobs={"content": [{"token": "the", "top_logprobs": []}]}), "no one token"),
    "failed": ({"response": {"status_code": 500, "body": "overloaded"}}, "the request failed: overloaded"),
    "wrong types": (answered(logprobs={"content": 3}), "not a server's response"),
    "no words": (scored(None, [1, 2]), "not a server's response"),
    "two lengths": (answered(**{**ANSWER, "token_ids": [1, 2]}), "for each of 3 tokens, found 2"),
}


@pytest.mark.parametrize("what", REFUSED_LINES)
def test_a_record_that_is_not_what_it_should_be_is_named(what: str, tmp_path: Path) -> None:
    record, message = REFUSED_LINES[what]
    path = tmp_path / "a.jsonl"
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    path.write_bytes(json.dumps(scored_prompt([1, 2, 3], 5, TABLE)).encode() + b"\n\n" + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1: ") as caught:
        bring_in(log_probs(path), tmp_path / "store")
    assert message in str(caught.value)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "store")


def test_a_word_given_twice_is_refused(tmp_path: Path) -> None:
    answer = [{"token": f"token_id:{word}", "logprob": -3.0} for word in (4, 5, 4, 6, 7)]
    record = {"prompt_token_ids": [1], "choices": [{"logprobs": {"content": [{"token": "token_id:4", "top_logprobs": answer}]}}]}
    with pytest.raises(ValueError, match="record 0: token 1: a word is given twice"):
        bring_in(log_probs(write_jsonl(tmp_path / "a.jsonl", [record])), tmp_path / "store")


def test_a_record_longer_than_a_slot_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [scored_prompt([1] * 200, 5, TABLE)])
    with pytest.raises(ValueError, match=r"a\.jsonl, record 0: .* does not fit in a slot of 128"):
        bring_in(log_probs(path), tmp_path / "store")


def test_what_is_known_of_the_teacher_must_agree(tmp_path: Path) -> None:
    source = log_probs(write_jsonl(tmp_path / "a.jsonl", [scored_prompt([1, 2], 5, TABLE)]))
    bring_in(source, tmp_path / "store")
    shape = Store.open(tmp_path / "store").manifest.passes["teacher"].shape
    known = shape.model_copy(update={"layers": 4, "width": 8, "windows": (None,) * 4})
    about: dict[str, Any] = {"vocab": VOCAB, "model": "m", "dtype": "float32", "made": MADE}
    info = imported_pass(source.features, width=0, known=known, **about)
    assert (info.shape.layers, info.shape.width) == (4, 8)
    with pytest.raises(ValueError, match="4 blocks of width 8 and 40 words; what is imported has 4 blocks of width 6 and 40"):
        imported_pass(source.features, width=6, known=known, **about)
    states = feature_spec(FeatureKey("hidden", 8), "bfloat16", 6)
    with pytest.raises(ValueError, match="features name block 8, the teacher has 2"):
        imported_pass((states,), width=6, layers=2, **about)


# Going on


def stored_bytes(store: Path) -> dict[str, bytes]:
    """Rows, tokens and answers: all files but those that say when and by whom."""
    files = (path for path in store.rglob("*") if path.is_file())
    kept = {str(path.relative_to(store)): path.read_bytes() for path in files}
    return {name: data for name, data in kept.items() if not name.startswith(("manifest", "commits", "claims", "."))}


def test_an_import_goes_on_where_it_was_and_ends_in_the_same_store(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [scored_prompt(ids, 5, TABLE) for ids in sentences(40)])
    bring_in(log_probs(path), tmp_path / "whole")
    broken = log_probs(path)
    to = target(tmp_path / "store")
    import_rows(broken, to)
    read = broken.records

    def stopping(start: int, answers: bool) -> Iterator[list[Sample]]:
        yield from itertools.islice(read(start, answers), 17)
        raise KeyboardInterrupt

    broken.records = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bring_in(broken, to.path)
    have = len(Store.open(to.path).committed("teacher"))
    assert 0 < have < 6
    starts = []
    again = log_probs(path)
    watched = again.records
    again.records = lambda start, answers: starts.append(start) or watched(start, answers)  # type: ignore[method-assign, func-returns-value]
    done = bring_in(again, to.path)
    assert done.new_slots == done.slots - have
    assert starts[0] > 5  # committed records are skipped
    assert stored_bytes(to.path) == stored_bytes(tmp_path / "whole")
    assert bring_in(log_probs(path), to.path).new_slots == 0


def test_other_files_or_options_do_not_go_on_with_a_store(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [scored_prompt(ids, 5, TABLE) for ids in sentences(5)])
    bring_in(log_probs(path), tmp_path / "store")
    with pytest.raises(FingerprintMismatch, match="another top: expected 5 as stored, found 4"):
        bring_in(log_probs(path, top=4), tmp_path / "store")
    with path.open("a") as file:
        file.write(json.dumps(scored_prompt([1, 2], 5, TABLE)))
    with pytest.raises(FingerprintMismatch, match="another files"):
        bring_in(log_probs(path), tmp_path / "store")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="something else"):
        bring_in(log_probs(path), tmp_path / "other")


def test_sources_that_change_between_rows_and_answers_are_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [scored_prompt([1, 2, 3], 5, TABLE)])
    to = target(tmp_path / "store")
    import_rows(log_probs(path), to)
    path.write_text(path.read_text().replace("[1, 2, 3]", "[1, 2, 4]"))
    with pytest.raises(StoreError, match="other tokens than the sources hold now"):
        bring_in(log_probs(path), to.path)


@pytest.mark.slow
def test_a_killed_import_starts_over_or_goes_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [scored_prompt(ids, 5, TABLE) for ids in sentences(80)])
    bring_in(log_probs(path), tmp_path / "whole")
    killed_at_random([sys.executable, HERE / "foreign.py", path, tmp_path / "store"], kills=5, within=0.5, seed=4)
    assert verify(tmp_path / "store") == []
    assert stored_bytes(tmp_path / "store") == stored_bytes(tmp_path / "whole")
