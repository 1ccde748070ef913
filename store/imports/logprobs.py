"""JSON lines as inference servers answer: the likeliest words at each position, of the prompt, of the answer, or of both.

A record is one response of the OpenAI protocol or what vLLM makes of it:

- ``prompt_logprobs`` (vLLM), for each token of the prompt ``{"<id>": {"logprob": x, ...}, ...}`` and null for the first,
  which nothing predicts; at the top or in a choice, with ``prompt_token_ids`` beside it;
- ``choices[].logprobs.content[].top_logprobs`` (chat) or ``choices[].logprobs.top_logprobs`` (completions, also echoed);
- either inside ``response.body``, as batch runs write it.

The distribution *of* token j is the model's answer *at* token j - 1, which is where it is stored. Tokens without a
distribution, such as a prompt that was not scored, are inputs whose labels are left out.

Source: OpenAI API reference (chat and completion objects); vLLM's protocol classes and ``vllm.logprobs``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store.codecs import feature_spec
from store.errors import StoreError
from store.features import FeatureKey, FeatureSpec, StoreDtype
from store.imports.samples import UNSCORED, Sample
from store.imports.words import MISSING, top_words
from store.manifest import Json

MOST_MASS = 1.01
"""Sum of probabilities that servers' float32 still explains."""
_LONGEST_LINE = 1 << 28
"""Bytes of one record."""
_ID = "token_id:"
"""Prefix of words that vLLM gives by number (return_tokens_as_token_ids)."""

Words = list[tuple[int, float]]
"""Ids and log-probabilities of one position."""


class LogProbs:
    """JSON lines files; ``words`` maps the text of a token to its id where a server gives text."""

    def __init__(self, files: Sequence[Path], top: int, vocab: int, dtype: StoreDtype, words: Mapping[str, int]) -> None:
        self.files = tuple(files)
        self.vocab = vocab
        self.features: tuple[FeatureSpec, ...] = (feature_spec(FeatureKey("lm_logits", None, "labels", f"top{top}"), dtype, vocab),)
        self.options: Json = {"top": top, "vocab": vocab, "dtype": dtype}
        self._words = words

    def records(self, start: int, answers: bool) -> Iterator[list[Sample]]:
        """One record for each line that is not blank."""
        before = 0
        for path in self.files:
            number = -1
            for number, line in enumerate(_lines(path)):
                if before + number >= start:
                    yield self._record(path, number, line)
            before += number + 1

    def _record(self, path: Path, number: int, line: bytes) -> list[Sample]:
        where = f"{path}, record {number}"
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({str(error)[:100]})") from None
        try:
            return [self._sample(path, number, part, ids, found) for part, (ids, found) in enumerate(self._inputs(tree))]
        except _Unfit as error:
            raise ValueError(f"{where}: {error}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: not a server's response with log-probabilities ({type(error).__name__}: {error})") from None

    def _inputs(self, tree: Any) -> Iterator[tuple[list[int], list[Words | None]]]:  # noqa: ANN401
        """Token ids of each choice, and for each token its distribution."""
        if isinstance(tree, dict) and isinstance(tree.get("response"), dict):
            if tree.get("error") or tree["response"].get("status_code", 200) != 200:
                raise _Unfit(f"the request failed: {str(tree.get('error') or tree['response'].get('body'))[:200]}; leave it out")
            tree = tree["response"].get("body", tree["response"])
        if not isinstance(tree, dict):
            raise _Unfit("expected a JSON object")
        for choice in tree.get("choices") or [{}]:
            about = {**tree, **{name: value for name, value in choice.items() if value is not None}}
            yield self._input(about)

    def _input(self, about: dict[str, Any]) -> tuple[list[int], list[Words | None]]:
        prompt = about.get("prompt_token_ids")
        tokens, found = self._answer(about.get("logprobs") or {})
        echoed = bool(found) and found[0] is None
        if prompt is None and not echoed:
            raise _Unfit("it has no prompt_token_ids, so what the teacher read is not known; ask the server with return_token_ids")
        prompt_ids = [self._number(token) for token in prompt or []]
        given = about.get("token_ids") if tokens else []
        if given is not None:
            ids = [self._number(token) for token in given]
        else:
            ids = [self._text(token) for token in tokens[len(prompt_ids) if echoed else 0 :]]
        if echoed:
            scored = []
        else:
            scored = self._prompt(about.get("prompt_logprobs") or [None] * len(prompt_ids))
            if len(scored) != len(prompt_ids):
                raise _Unfit(f"expected {len(prompt_ids)} prompt_logprobs, one for each of prompt_token_ids, found {len(scored)}")
            if not prompt_ids and found:
                raise _Unfit("its prompt is empty, so nothing predicts the first word; start it with the beginning-of-text token")
        if len(prompt_ids + ids) != len(scored + found):
            raise _Unfit(f"expected log-probabilities for each of {len(prompt_ids + ids)} tokens, found {len(scored + found)}")
        return prompt_ids + ids, scored + found

    def _prompt(self, kept: list[dict[str, Any] | None]) -> list[Words | None]:
        """Distributions of the prompt's tokens: ids are the names of each."""
        return [None if words is None else [(self._number(_digits(word)), _log_prob(words[word])) for word in words] for words in kept]

    def _answer(self, kept: dict[str, Any]) -> tuple[list[str], list[Words | None]]:
        """The tokens that a choice has log-probabilities of, as text, and their distributions."""
        if kept.get("content") is not None:
            tokens = [entry["token"] for entry in kept["content"]]
            return tokens, [[(self._text(word["token"]), _log_prob(word)) for word in entry["top_logprobs"]] for entry in kept["content"]]
        found = kept.get("top_logprobs") or []
        if len(kept.get("tokens") or []) != len(found):
            raise _Unfit(f"expected as many tokens as top_logprobs, found {len(kept.get('tokens') or [])} and {len(found)}")
        return kept.get("tokens") or [], [
            None if words is None else [(self._text(word), _log_prob(words[word])) for word in words] for words in found
        ]

    def _sample(self, path: Path, number: int, part: int, ids: list[int], found: list[Words | None]) -> Sample:
        input_ids = np.array(ids, np.int32)
        if found and found[0] is not None:
            raise _Unfit("expected null for the first token, which nothing predicts")
        places = [j - 1 for j in range(1, len(found)) if found[j] is not None]
        if not places:
            raise _Unfit("it has no log-probabilities; ask the server for logprobs or prompt_logprobs")
        labels = np.full(len(ids), UNSCORED, np.int32)
        labels[places] = input_ids[1:][places]
        words = [found[place + 1] or [] for place in places]
        most = max(len(some) for some in words)
        ids_nM = np.full((len(words), most), MISSING, np.int64)
        log_probs_nM = np.zeros((len(words), most))
        for n, some in enumerate(words):
            if some:
                ids_nM[n, : len(some)], log_probs_nM[n, : len(some)] = zip(*some, strict=True)
        (spec,) = self.features
        try:
            arrays = top_words(ids_nM, log_probs_nM, spec, self.vocab, MOST_MASS, lambda n: f"token {places[n] + 1}")
        except ValueError as error:
            raise _Unfit(str(error)) from None
        return Sample(str(path), number, input_ids, token_labels=labels, answers={spec.feature: arrays}, part=part)

    def _text(self, word: object) -> int:
        """The id of a word that is given as text, or by number with vLLM's prefix."""
        if not isinstance(word, str):
            raise _Unfit(f"expected the text of a token, found {str(word)[:60]}")
        if word.startswith(_ID):
            return self._number(_digits(word.removeprefix(_ID)))
        if word not in self._words:
            raise _Unfit(
                f"no one token of the tokenizer is {word[:60]!r}; ask the server with return_tokens_as_token_ids, "
                "or give the tokenizer that it serves with (--tokenizer)"
            )
        return self._words[word]

    def _number(self, token: object) -> int:
        if type(token) is not int or not 0 <= token < self.vocab:
            raise _Unfit(f"expected token ids 0 to {self.vocab - 1}, found {str(token)[:60]}")
        return token


class _Unfit(Exception):
    """What is wrong with a record; the caller says which."""


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _Unfit(f"expected the number of a token, found {text[:60]!r}")
    return int(text)


def _log_prob(value: Any) -> float:  # noqa: ANN401
    number = value["logprob"] if isinstance(value, dict) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _Unfit(f"expected a log-probability, found {str(number)[:60]}")
    return float(number)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that are not blank."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"{path}: a line has more than {_LONGEST_LINE} bytes; expected one response on each")
                if line.strip():
                    yield line
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
