"""Domains are looked up when rows are built, and reach batches beside phrases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online.batch import Batch
from online.collate import collate, collate_rows
from online.rows import add_rows, build_rows, iter_groups
from online.rows_spec import RowsSpec, building_fingerprint, corpus_fingerprint
from store.errors import FingerprintMismatch
from store.manifest import Provenance
from store.reader import Store
from store.rows import Row
from store.strict import parse

MADE = Provenance(command=("test",), versions={}, created="2000-01-01T00:00:00Z")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GENRES = ["news", "books", "web"]
DOMAIN = {"column": "genre", "classes": GENRES}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w99, with [CLS], [SEP] and segments."""
    words = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(100))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names)


def corpus(path: Path, genres: list[object], seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    words = [" ".join(f"w{n}" for n in rng.integers(0, 100, int(rng.integers(1, 12)))) for _ in genres]
    lines = [
        {"text": text, "other": text[:2], "id": n // 3, "genre": genre} for n, (text, genre) in enumerate(zip(words, genres, strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def spec(files: str, **options: object) -> RowsSpec:
    return parse(RowsSpec, {"sources": [{"files": files}], "slot_tokens": 128, "max_length": 16, **options}, "recipe")


def rows(spec: RowsSpec, tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    return [row for group in iter_groups(spec, tokenizer) for row in group]


def test_a_row_has_the_place_of_its_domain_in_the_list(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = corpus(tmp_path / "a.jsonl", ["web", "news", 1, "books", "2"])
    assert [row.domain for row in rows(spec(files, domain=DOMAIN), tokenizer)] == [2, 0, 1, 1, 2]
    assert [row.domain for row in rows(spec(files), tokenizer)] == [None] * 5
    found = rows(spec(files, domain=DOMAIN, choices=["{text}", "{other}"], text="{other}"), tokenizer)
    assert [row.domain for row in found] == [2, 2, 0, 0, 1, 1, 1, 1, 2, 2]
    years = spec(corpus(tmp_path / "b.jsonl", ["2020", 2019]), domain={"column": "genre", "classes": ["2019", "2020"]})
    assert [row.domain for row in rows(years, tokenizer)] == [1, 0]
    masked = rows(spec(files, domain=DOMAIN, objective="mlm", copies=2), tokenizer)
    assert [row.domain for row in masked] == [2, 0, 1, 1, 2] * 2


@pytest.mark.parametrize("genre", ["talk", "", None, 3, 0.5, ["web"]])
@pytest.mark.parametrize("long", ["truncate", "split", "pack"])
def test_an_unknown_domain_is_refused_with_its_place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, genre: object, long: str) -> None:
    files = corpus(tmp_path / "a.jsonl", ["web", genre])
    with pytest.raises(
        ValueError, match=r"a\.jsonl, record 1 \(counted from 0\): column 'genre' holds the domain .*; expected one of news, books, web"
    ):
        rows(spec(files, domain=DOMAIN, long=long), tokenizer)


def test_long_documents_keep_their_domain_and_are_packed_with_their_like(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    genres = ["web", "news", "web", "books", "news", "web"]
    texts = ["w1 w2 w3 w4", "w11 w12 w13", "w5 w6 w7", "w21", "w14 w15 w16 w17", "w8"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "genre": genre}) for text, genre in zip(texts, genres, strict=True)))
    cut = rows(spec(str(path), domain=DOMAIN, long="split", max_length=4), tokenizer)
    assert [GENRES[row.domain] for row in cut] == [
        genre for text, genre in zip(texts, genres, strict=True) for _ in range(-(-len(text.split()) // 2))
    ]
    packed = rows(spec(str(path), domain=DOMAIN, long="pack", max_length=12), tokenizer)
    found = {}
    for row in packed:
        found.setdefault(row.domain, []).extend(word for word in tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) if word[0] == "w")
    assert found == {
        number: [word for text, genre in zip(texts, genres, strict=True) if genre == name for word in text.split()]
        for number, name in enumerate(GENRES)
    }


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"column": "genre"}, "domain.classes: required, not given"),
        ({"column": "genre", "classes": []}, "domain.classes: .* at least 1 item"),
        ({"column": "genre", "classes": ["a", "b", "a"]}, "domain.classes: expected names that differ and are not empty, found"),
        ({"column": "genre", "classes": ["a", ""]}, "domain.classes: expected names that differ and are not empty, found"),
        ({"column": "genre", "classes": [2019, 2020]}, "domain.classes.0: Input should be a valid string"),
        ({"column": "genre", "clases": ["a"]}, "did you mean 'classes'"),
    ],
)
def test_a_list_of_domains_that_says_nothing_is_refused(domain: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec("a.jsonl", domain=domain)


def test_rows_without_either_have_the_fingerprints_of_earlier_releases() -> None:
    """As the release before domains and phrases gave them."""
    plain = parse(RowsSpec, {"sources": [{"files": "a.jsonl"}]}, "")
    label = {"column": "y", "classes": ["n", "p"]}
    pairs = parse(
        RowsSpec,
        {"sources": [{"files": "a"}], "text": ["{a}", "{b}"], "objective": "mlm", "label": label, "copies": 2, "hold_out": 0.1},
        "",
    )
    assert building_fingerprint(plain) == "9b5d827b7712bc0dc1ee0e3262eaa499f89b2a9ec22c2b35cc2270d949e4677e"
    assert building_fingerprint(pairs) == "8636d4c364025baaec3d5771fe388f0a86983d03bead903d768de3d5e97f9f7f"


def test_what_decides_domains_and_phrases_is_in_the_fingerprints(tmp_path: Path) -> None:
    files = corpus(tmp_path / "a.jsonl", ["web", "news"])
    options = [
        {},
        {"domain": DOMAIN},
        {"domain": {**DOMAIN, "classes": GENRES[::-1]}},
        {"phrases": {"words": 2}},
        {"phrases": {"words": 3}},
        {"phrases": {"column": "id"}},
    ]
    assert len({building_fingerprint(spec(files, **each)) for each in options}) == len(options)
    before = corpus_fingerprint(spec(files, domain=DOMAIN))
    assert before != corpus_fingerprint(spec(files))
    corpus(tmp_path / "a.jsonl", ["web", "books"])
    assert before != corpus_fingerprint(spec(files, domain=DOMAIN))


# Batches

BOTH = {"domain": DOMAIN, "phrases": {"words": 2}}
LAYOUTS: dict[str, dict[str, object]] = {
    "single": {},
    "pairs": {"text": ["{text}", "{other}"]},
    "masked": {"objective": "mlm", "copies": 2},
    "packed": {"objective": "causal", "long": "pack", "max_length": 24},
    "choices": {"text": "{other}", "choices": ["{text}", "{other}"]},
    "groups": {"group": "id"},
}


def genres(count: int) -> list[object]:
    return [GENRES[number] for number in np.random.default_rng(1).integers(0, 3, count)]


def assert_same(found: Batch, wanted: Batch, but: tuple[str, ...] = ()) -> None:
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        assert (value is None) == (other is None), name
        assert value is None or name in but or (value.dtype == other.dtype and torch.equal(value, other)), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_batch_holds_what_its_rows_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    built = spec(corpus(tmp_path / "a.jsonl", genres(40)), **BOTH, **LAYOUTS[name])
    info = build_rows(built, tokenizer, tmp_path / "store", MADE)
    assert info.domains == tuple(GENRES)
    wanted, store = rows(built, tokenizer), Store.open(tmp_path / "store")
    order = np.random.default_rng(0).permutation(len(wanted))
    batch = collate(store, order)
    assert batch.domains is not None
    assert batch.phrases is not None
    assert batch.domains.dtype == batch.phrases.dtype == torch.int64
    assert batch.domains.tolist() == [wanted[row].domain for row in order]
    width = batch.input_ids.shape[1]
    for found, row in zip(batch.phrases.tolist(), order, strict=True):
        assert found == wanted[row].phrases.tolist() + [0] * (width - len(wanted[row].input_ids))
        assert max(found) > 0
    assert_same(collate_rows([wanted[row] for row in order], built.objective, built.task, 0), batch, but=("rows", "groups"))


def test_a_batch_without_either_has_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_rows(spec(corpus(tmp_path / "a.jsonl", genres(5))), tokenizer, tmp_path / "store", MADE)
    batch = collate(Store.open(tmp_path / "store"), np.arange(5))
    assert batch.domains is batch.phrases is None


def test_a_batch_keeps_both_on_its_way_to_a_device(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_rows(spec(corpus(tmp_path / "a.jsonl", genres(9)), **BOTH), tokenizer, tmp_path / "store", MADE)
    batch = collate(Store.open(tmp_path / "store"), np.arange(9))
    away = batch.to(torch.device("meta"))
    assert away.domains is not None
    assert away.phrases is not None
    assert (away.domains.device.type, away.domains.shape, away.phrases.shape) == ("meta", (9,), batch.input_ids.shape)


def test_rows_that_are_added_must_have_the_same_domains(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first, more = corpus(tmp_path / "a.jsonl", genres(9)), corpus(tmp_path / "b.jsonl", genres(7), seed=1)
    build_rows(spec(first, **BOTH), tokenizer, tmp_path / "store", MADE)
    for options in ({**BOTH, "domain": {**DOMAIN, "classes": [*GENRES, "talk"]}}, {**BOTH, "phrases": {"words": 3}}):
        with pytest.raises(FingerprintMismatch, match=r"what is added has another (domains|building) than"):
            add_rows(spec(more, **options), tokenizer, tmp_path / "store", MADE)
    assert add_rows(spec(more, **BOTH), tokenizer, tmp_path / "store", MADE).rows == 16
    wanted = rows(spec(first, **BOTH), tokenizer) + rows(spec(more, **BOTH), tokenizer)
    batch = collate(Store.open(tmp_path / "store"), np.arange(16))
    assert batch.domains.tolist() == [row.domain for row in wanted]
    assert batch.phrases[batch.mask].tolist() == np.concatenate([row.phrases for row in wanted]).tolist()
