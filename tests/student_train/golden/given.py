"""Fixed random features for the formulas of methods, and the pieces that several formulas share, in float64.

Five rows of unequal lengths (one padded on the left, one of a single token) keep padding in every batch. A formula is a
function of ``Given`` that returns each term's sum and count, written from the paper, token by token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from online.batch import IGNORED, Batch, Drawn, Features, TopBanded, TopDrawn, TopK, Value
from store.features import FeatureKey
from store.forms import word_form
from store.shape import ModelShape
from student_train.moment import START, Moment

BERT = dict(
    family="bert", layers=4, width=12, heads=4, kv_heads=4, head_width=3, vocab=11, causal=False, pre_norm=False, windows=(None,) * 4
)
SMALL_BERT = BERT | dict(layers=2, width=8, head_width=2, windows=(None, 2))
LLAMA = dict(
    family="llama", layers=4, width=10, heads=4, kv_heads=2, head_width=6, vocab=11, causal=True, pre_norm=True, windows=(None, 3, None, 2)
)
SMALL_LLAMA = LLAMA | dict(layers=2, width=8, head_width=4, windows=(None, 3))
SAME = BERT | dict(layers=2, windows=(None, None))


def shape(sizes: dict[str, object], head: str = "base", labels: int = 0) -> ModelShape:
    return ModelShape.model_validate({**sizes, "head": head, "labels": labels})


def make_batch(labels: str = "") -> Batch:
    """Rows of 7, 4 (padded on the left), 2, 5 and 1 tokens, of domains 0 and 2; labels by kind."""
    mask = torch.zeros(5, 8, dtype=torch.bool)
    for row, (start, length) in enumerate([(0, 7), (4, 4), (0, 2), (0, 5), (0, 1)]):
        mask[row, start : start + length] = True
    token_labels = None
    if labels in ("tokens", "pairs", "answers"):
        token_labels = torch.full((5, 8), IGNORED)
        for row, token, label in [(0, 1, 2), (0, 6, 0), (1, 4, 1), (3, 0, 2), (3, 2, 2)]:
            token_labels[row, token] = label
    verbalisers = torch.tensor([4, 0, 7]) if labels == "clozes" else None
    if labels == "clozes":  # one masked token a row
        token_labels = torch.full((5, 8), IGNORED)
        for row, token, label in [(0, 5, 4), (1, 6, 7), (2, 0, 0), (3, 3, 0), (4, 0, 7)]:
            token_labels[row, token] = label
    row_labels = {
        "clozes": torch.tensor([0, 2, IGNORED, 1, 2]),
        "classes": torch.tensor([0, 2, IGNORED, 1, 2]),
        "scores": torch.tensor([0.5, math.nan, 1.0, -2.0, 0.0]),
        "choices": torch.tensor([0, 1, 0, 0, 1]),
        "distinct": torch.arange(5),
    }.get(labels)
    phrases = None
    if labels == "phrases":
        phrases = torch.zeros(5, 8, dtype=torch.int64)
        phrases[0, :7], phrases[1, 4:], phrases[2, :2] = (
            torch.tensor([1, 1, 0, 2, 3, 3, 4]),
            torch.tensor([1, 2, 2, 3]),
            torch.tensor([0, 1]),
        )
        phrases[3, :5] = torch.tensor([1, 2, 2, 0, 3])
    interchange = draws = None
    if labels == "pairs":  # rows 0 and 1, 2 and 3; the last one has no partner
        interchange, draws = torch.full((5, 8), -1), torch.tensor([6, 6, 9, 9, 2])
        for (row, token), (other, there) in [((0, 2), (1, 6)), ((0, 5), (1, 7)), ((2, 1), (3, 4))]:
            interchange[row, token], interchange[other, there] = there, token
    groups = torch.tensor([3, 3, 9, 9, 9])
    domains = torch.tensor([0, 2, 2, 0, 2])
    written = torch.tensor([False, True, False, True, False]) if labels == "answers" else None
    return Batch(
        torch.arange(5), torch.ones(5, 8).long(), mask, None, None, None, token_labels, row_labels, groups, domains, phrases,
        interchange, draws, written, verbalisers,
    )  # fmt: skip


def sees(one: ModelShape, block: int, query: int, key: int) -> bool:
    window = one.windows[max(block, 1) - 1]
    if one.causal:
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window


@functools.cache
def table_of(one: ModelShape, block: int) -> Tensor:
    """[8, 8] bool: what ``sees`` says of every query and key."""
    return torch.tensor([[sees(one, block, query, key) for key in range(8)] for query in range(8)])


def make_value(key: FeatureKey, one: ModelShape, batch: Batch, generator: torch.Generator) -> Value:
    rows, tokens = batch.mask.shape
    if key.site.startswith("attention"):
        scores = torch.randn(rows, one.heads, tokens, tokens, generator=generator) * 2
        assert key.layer is not None
        unseen = ~(table_of(one, key.layer) & batch.mask[:, None, None, :])
        scores = scores.masked_fill(unseen, torch.finfo(torch.float32).min)
        return scores if key.site == "attention_scores" else scores.softmax(-1)
    width = key.kept or one.width_of(key.site)
    if key.leftmost:
        real = torch.arange(key.leftmost) < batch.lengths[:, None]
        return torch.randn(rows, key.leftmost, width, generator=generator) * 2 * real[..., None]
    if key.positions == "all":
        value = torch.randn(rows, tokens, width, generator=generator) * 2 * batch.mask[..., None]
    elif key.positions in ("labels", "masked"):
        value = torch.randn(int(batch.labelled.sum()), width, generator=generator) * 2
    else:
        value = torch.randn(rows, width, generator=generator) * 2
    if not key.words:
        return value
    return in_words(value, key.form, generator)


def in_words(logits: Tensor, text: str, generator: torch.Generator) -> TopK | Drawn | TopDrawn | TopBanded:
    """Dense logits in a form of word predictions, word by word; what is drawn follows from ``generator`` instead of the text."""
    form = word_form(text)
    assert form is not None
    rows = logits.log_softmax(-1).double().flatten(0, -2)
    found: list[list[list[float]]] = []
    for log_p in rows:
        order = log_p.sort(descending=True, stable=True).indices.tolist()
        kept = order[: form.top]
        if form.nucleus < 1:
            enough = [n for n in range(1, form.top + 1) if log_p[kept[:n]].exp().sum() >= form.nucleus]
            kept = kept[: max(form.least, enough[0] if enough else form.top)]
        others = [word for word in range(len(log_p)) if word not in kept]
        tail = log_p[others].logsumexp(0).item() if others else torch.finfo(torch.float32).min
        unused = form.top - len(kept)
        weights = (log_p[others] * form.tau).exp()
        sets = [
            [others[n] for n in torch.multinomial(weights, form.draws, True, generator=generator)]
            for _ in range(form.samples * (form.draws > 0))
        ]
        if form.top:
            ids = [*kept, *([0] * unused), *(word for words in sets for word in sorted(words))]
            found.append([ids, [*log_p[kept].tolist(), *([-32768.0] * unused)], [tail]])
            continue
        log_q = log_p * form.tau - (log_p * form.tau).logsumexp(0)
        distinct = [[*sorted(set(words)), *([0] * (form.draws - len(set(words))))] for words in sets]
        counts = [
            words.count(word) * (n < len(set(words))) for words, firsts in zip(sets, distinct, strict=True) for n, word in enumerate(firsts)
        ]
        ids = [word for firsts in distinct for word in firsts]
        found.append([ids, counts, [(log_p - log_q)[word].item() * (count > 0) for word, count in zip(ids, counts, strict=True)]])
    columns = [torch.tensor([row[n] for row in found]).unflatten(0, logits.shape[:-1]) for n in range(3)]
    if not form.top:
        return Drawn(columns[0].long(), columns[1].float(), columns[2].float()[..., : None if form.tau != 1 else 0])
    if form.bands:
        return in_bands(logits, columns[0].long(), columns[1].float(), form.bands)
    kind = TopDrawn if form.draws else TopK
    return kind(columns[0].long(), columns[1].float(), columns[2].float().squeeze(-1))


def in_bands(logits: Tensor, ids: Tensor, log_probs: Tensor, bands: int) -> TopBanded:
    """Likeliest words, and a sixteenth of a nat's steps of the mass of the others in each band of ids, word by word."""
    words, codes = logits.shape[-1], []
    for log_p, kept in zip(logits.log_softmax(-1).double().flatten(0, -2), ids.flatten(0, -2).tolist(), strict=True):
        masses = [0.0] * bands
        for word in range(words):
            if word not in kept:
                masses[band_of(word, words, bands)] += log_p[word].exp().item()
        codes.append([min(255, round(-16 * math.log(mass))) if mass else 255 for mass in masses])
    return TopBanded(ids, log_probs, torch.tensor(codes).float().unflatten(0, logits.shape[:-1]))


def band_of(word: int, words: int, bands: int) -> int:
    """The last band that starts no later than ``word``; band b starts at 1000 ((V / 1000 + 1)^(b / B) - 1), but not before b."""
    return max(b for b in range(bands) if max(b, math.floor(1000 * ((words / 1000 + 1) ** (b / bands) - 1))) <= word)


def make_features(keys: frozenset[FeatureKey], one: ModelShape, batch: Batch, seed: int) -> Features:
    return {key: make_value(key, one, batch, torch.Generator().manual_seed(seed + n)) for n, key in enumerate(sorted(keys))}


# The formulas. P: the method's parameters; S, T: features by name; all float64.
Named = dict[str, Tensor]


@dataclasses.dataclass
class Given:
    S: Named
    T: dict[str, Tensor | TopK | Drawn | TopDrawn | TopBanded]
    P: Named
    batch: Batch
    student: ModelShape
    teacher: ModelShape | None
    """The only or the first one."""
    teachers: dict[str, ModelShape] = dataclasses.field(default_factory=dict)
    moment: Moment = START

    def tokens(self) -> Iterator[tuple[int, int]]:
        yield from ((int(row), int(token)) for row, token in self.batch.mask.nonzero())

    def rows_of_scores(self, blocks: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        """(row, query, keys that both models see)."""
        assert self.teacher
        for row, query in self.tokens():
            keys = [
                k
                for r, k in self.tokens()
                if r == row and sees(self.student, blocks[0], query, k) and sees(self.teacher, blocks[1], query, k)
            ]
            yield row, query, keys

    def pair_total(self, blocks: tuple[int, int]) -> int:
        return sum(len(keys) for _, _, keys in self.rows_of_scores(blocks))


def ref_kl(s: Tensor, t: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0)
    return temperature**2 * (p * (p / q).log()).sum()


def ref_mse(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum() / len(s)


def ref_cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - (s @ t) / ((s @ s).sqrt() * (t @ t).sqrt())


def ref_huber(s: Tensor, t: Tensor) -> Tensor:
    d = (s - t).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5).sum() / len(s)


def ref_ce(z: Tensor, label: int) -> Tensor:
    return -(z[label] - z.exp().sum().log())


def ref_maps(given: Given, maps_s: Tensor, maps_t: Tensor, blocks: tuple[int, int], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over queries of the mean over heads of a distance between rows of scores."""
    total = torch.zeros((), dtype=torch.float64)
    heads = maps_s.shape[1]
    for row, query, keys in given.rows_of_scores(blocks):
        for head in range(heads):
            total = total + distance(maps_s[row, head, query, keys], maps_t[row, head, query, keys]) / heads
    return total


def ref_relation(x: Tensor, heads: int) -> Tensor:
    parts = x.reshape(*x.shape[:2], heads, -1)
    return torch.einsum("bihd,bjhd->bhij", parts, parts) / math.sqrt(parts.shape[-1])


def squares(s: Tensor, t: Tensor) -> Tensor:
    return ((s - t) ** 2).sum()


Reference = Callable[[Given], dict[str, tuple[Tensor, float]]]


def linear(given: Given, name: str, x: Tensor) -> Tensor:
    return given.P[f"{name}.weight"] @ x + given.P[f"{name}.bias"]


CLASSES, SCORES, CHOICES, TOKENS = ("classification", 3), ("classification", 1), ("multiple_choice", 1), ("token_classification", 3)
ROWS: list[slice | int] = [0, 1, 2, 3, 4]
GROUPS: list[slice | int] = [slice(0, 2), slice(2, 5)]
MLM, CLM, BASE = ("masked_lm", 0), ("causal_lm", 0), ("base", 0)
UNIFORM = [(1, 2), (2, 4)]
LAST = [(2, 4)]
PAIRS = [[2, 3], [1, 1]]
