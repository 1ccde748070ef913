"""Files as other programs write them, of a teacher whose every answer is known: a table of what follows which word.

``follows[v]`` are the log-probabilities of the word after v, so that what a teacher answers *at* a token of id v, the
distribution of the token after it, can be looked up without any notion of alignment.
"""

import itertools
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from store import Provenance, Store
from store.features import FeatureKey
from store.imports import Imported, LogProbs, Source, Target, import_answers, import_rows, imported_pass

VOCAB = 40
MADE = Provenance(command=("tests",), versions={}, created="2026-01-01T00:00:00Z")


def follows(vocab: int = VOCAB, seed: int = 0) -> NDArray[np.float64]:
    """[vocab, vocab] float64, each row a distribution."""
    logits = np.random.default_rng(seed).standard_normal((vocab, vocab)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def sentences(number: int, seed: int = 1, shortest: int = 2, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(shortest, longest + 1)).tolist() for _ in range(number)]


def best(table: NDArray[np.float64], word: int, top: int) -> list[tuple[int, float]]:
    """The ``top`` likeliest words after ``word``, likeliest first, found by sorting a list."""
    return sorted(((i, float(x)) for i, x in enumerate(table[word])), key=lambda pair: -pair[1])[:top]


def prompt_logprobs(ids: list[int], top: int, table: NDArray[np.float64]) -> list[dict[str, Any] | None]:
    """As vLLM answers: nothing of the first token; of token j the likeliest words there and the token itself."""
    found: list[dict[str, Any] | None] = [None]
    for before, token in itertools.pairwise(ids):
        words = {token: float(table[before][token]), **dict(best(table, before, top))}
        found.append({str(word): {"logprob": x, "rank": 1, "decoded_token": f"w{word}"} for word, x in words.items()})
    return found


def scored_prompt(ids: list[int], top: int, table: NDArray[np.float64]) -> dict[str, Any]:
    """A response of vLLM to a request that only scores its prompt."""
    dummy = {"index": 0, "text": "", "logprobs": None, "prompt_token_ids": ids, "prompt_logprobs": prompt_logprobs(ids, top, table)}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [dummy]}


def chat(prompt: list[int], answer: list[int], top: int, table: NDArray[np.float64]) -> dict[str, Any]:
    """A chat completion with the log-probabilities of its answer, words given by number."""
    content = []
    for before, token in itertools.pairwise([prompt[-1], *answer]):
        words = [{"token": f"token_id:{word}", "logprob": x, "bytes": None} for word, x in best(table, before, top)]
        content.append({"token": f"token_id:{token}", "logprob": float(table[before][token]), "bytes": None, "top_logprobs": words})
    choice = {"index": 0, "message": {"role": "assistant", "content": "..."}, "logprobs": {"content": content}}
    return {"id": "chatcmpl-1", "object": "chat.completion", "prompt_token_ids": prompt, "prompt_logprobs": None, "choices": [choice]}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def packed_bits(numbers: list[int], bits: int) -> list[int]:
    """Bytes that hold ``numbers`` in so many bits each, through text."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]


def distillkit_row(ids: list[int], top: int, table: NDArray[np.float64]) -> dict[str, Any]:
    """A captured row whose values are all exact float32: one position for each token but the first."""
    words = [best(table, before, top) for before in ids[:-1]]
    bits = math.ceil(math.log2(VOCAB))
    return {
        "input_ids": ids,
        "compressed_logprobs": [list(struct.pack(f"<{top}f", *(x for _, x in some))) for some in words],
        "bytepacked_indices": [packed_bits([word for word, _ in some], bits) for some in words],
    }


def write_distillkit(path: Path, rows: list[dict[str, Any]], row_group: int = 7) -> Path:
    lists = pa.list_(pa.list_(pa.uint8()))
    fields = [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", lists), ("bytepacked_indices", lists)]
    if "attention_mask" in rows[0]:
        fields.append(("attention_mask", pa.list_(pa.int64())))
    schema = pa.schema(fields)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group)
    return path


def target(path: Path, slot_tokens: int = 128) -> Target:
    return Target(path, "teacher", "train", slot_tokens, bucket=16, pad_id=0, tokenizer="t", made=MADE)


def bring_in(source: Source, path: Path, slot_tokens: int = 128, width: int = 0) -> Imported:
    """Rows and answers of ``source`` in a new store at ``path``."""
    to = target(path, slot_tokens)
    import_rows(source, to)
    vocab = int(str(source.options["vocab"]))
    info = imported_pass(source.features, vocab=vocab, width=width, model="known table", dtype="float32", made=MADE)
    return import_answers(source, to, info)


def next_words(store: Store, top: int) -> list[tuple[list[int], dict[int, tuple[list[int], list[float], float]]]]:
    """For each row its tokens, and for each scored token (by its place) ids, log-probabilities and tail."""
    key = FeatureKey("lm_logits", None, "labels", f"top{top}", "teacher")
    names = {array.name for array in store.manifest.rows.token_arrays}
    found = []
    for row in range(len(store.rows)):
        one = np.array([row])
        ids = store.tokens("input_ids", one).tolist()
        if "token_labels" in names:
            places = np.flatnonzero(store.tokens("token_labels", one) != -100).tolist()
        else:
            documents = store.tokens("documents", one) if "documents" in names else np.zeros(len(ids))
            places = [place for place in range(len(ids) - 1) if documents[place] == documents[place + 1]]
        kept = store.read(key, one)
        values = zip(kept["ids"].tolist(), kept["log_probs"].tolist(), kept["log_tail"][:, 0].tolist(), strict=True)
        found.append((ids, dict(zip(places, values, strict=True))))
    return found


def check_next_words(store: Store, top: int, table: NDArray[np.float64], tolerance: float = 1e-6) -> int:
    """Compare every stored distribution with the table; how many there are."""
    checked = 0
    for ids, places in next_words(store, top):
        for place, (words, log_probs, log_tail) in places.items():
            expected = best(table, ids[place], top)
            assert words == [word for word, _ in expected]
            np.testing.assert_allclose(log_probs, [x for _, x in expected], rtol=tolerance, atol=tolerance)
            others = math.fsum(math.exp(x) for word, x in enumerate(table[ids[place]]) if word not in words)
            np.testing.assert_allclose(math.exp(log_tail), others, rtol=1e-4, atol=1e-6)
            checked += 1
    return checked


if __name__ == "__main__":  # an import to be killed
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    bring_in(LogProbs([Path(sys.argv[1])], 5, VOCAB, "float32", {}), Path(sys.argv[2]))
    sys.stdout.write("done\n")
