"""Domains and phrases of rows come back as they were put in, through everything that is done to a store."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from domain_store import GROUPS, NAMES, answer, make_rows, make_store
from object_storage import quiet
from safetensors import safe_open
from safetensors.torch import load_file
from small_store import GROUPS as PLAIN
from small_store import MADE, Made
from small_store import make_store as make_plain

from store import FingerprintMismatch, MissingFeature, Row, Store
from store.copies import Wanted, copy
from store.diff import diff
from store.exports import export
from store.filters import Where
from store.merge import merge
from store.pool import pools
from store.recode import Keeping
from store.strict import parse
from store.transfer import download, upload
from store.verify import repair, verify


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_store(tmp_path / "store")


def check(store: Store, rows: list[Row]) -> None:
    """The store holds these rows, and nothing is wrong with it."""
    assert verify(store.path) == []
    order = np.random.default_rng(5).permutation(len(rows))
    names = store.manifest.rows.domains
    assert [names[number] for number in store.rows.domain_at(order)] == [NAMES[rows[row].domain] for row in order]
    assert store.tokens("phrases", order).tolist() == np.concatenate([rows[row].phrases for row in order]).tolist()
    assert store.tokens("phrases", order).dtype == np.uint16
    assert store.tokens("input_ids", order).tolist() == np.concatenate([rows[row].input_ids for row in order]).tolist()


def copied(path: Path, new: Path, **wanted: object) -> Store:
    copy(path, new, Wanted(**wanted), MADE, lambda name, info: info, lambda done, total: None)
    return Store.open(new)


def test_rows_come_back_with_their_domain_and_phrases(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Store.open(made.path), made.rows)
    monkeypatch.setattr("store.table.SMALL", 3)  # a store too large to be held in memory
    check(Store.open(made.path), made.rows)
    assert Store.open(made.path).manifest.rows.domains == NAMES


def test_plain_zarr_reads_both(made: Made) -> None:
    root = zarr.open_group(str(made.path), mode="r")
    store = Store.open(made.path)
    numbers = store.rows.columns
    domains, phrases = root["rows/domain"], root["tokens/phrases"]
    assert (domains.dtype, domains.shape[1], phrases.dtype) == (np.int32, 1, np.uint16)
    for row, slot, index, offset in zip(made.rows, numbers.slot, numbers.index, numbers.offset, strict=True):
        assert domains[slot * 128 + index].tolist() == [row.domain]
        start = slot * 128 + offset
        assert phrases[start : start + len(row.input_ids)].tolist() == row.phrases.tolist()


def test_a_store_without_them_has_neither(tmp_path: Path) -> None:
    made = make_plain(tmp_path / "plain", PLAIN)
    rows = Store.open(made.path).manifest.rows
    assert rows.domains == ()
    assert "domain" not in rows.slot_crcs
    assert not (made.path / "rows" / "domain").exists()
    with pytest.raises(MissingFeature, match="has no token array 'phrases'"):
        Store.open(made.path).tokens("phrases", np.array([0]))


@pytest.mark.parametrize(
    ("groups", "names", "message"),
    [
        ([[(3, 0)], [(3, None)]], NAMES, "record 1: domain: expected a number from 0 on in all rows, or in none, found None"),
        ([[(3, None)], [(3, 0)]], NAMES, "record 1: domain: .* found 0"),
        ([[(3, -1)]], NAMES, "record 0: domain: .* found -1"),
        ([[(3, 2**31)]], NAMES, "record 0: domain: .* found 2147483648"),
        ([[(3, 0)], [(3, 3)]], NAMES, "domains: expected a name for each of the rows' 4 domains, found 3"),
        ([[(3, 0)]], (), "domains: expected a name for each of the rows' 1 domains, found 0"),
        ([[(3, None)]], NAMES, "domains: expected a name for each of the rows' 0 domains, found 3"),
    ],
)
def test_domains_that_contradict_one_another_are_refused(tmp_path: Path, groups: list, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rows(tmp_path / "store", groups, names)


@pytest.mark.parametrize("numbers", [[2, 2, 3], [1, 3, 0], [2, 1, 0], [1, 0, 1], [1, 2, 1], [0, 65535, 0]])
def test_phrases_that_do_not_ascend_in_stretches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> None:
    monkeypatch.setattr("domain_store.phrases", lambda length, seed: np.array(numbers, np.uint16))
    with pytest.raises(ValueError, match=r"text\.jsonl, record 0: phrases: expected numbers from 1 on"):
        make_rows(tmp_path / "store", [[(3, 0)]])


# What is done to a store


def test_a_copy_keeps_both_linked_or_written_anew(made: Made, tmp_path: Path) -> None:
    check(copied(made.path, tmp_path / "whole"), made.rows)
    dev = copied(made.path, tmp_path / "dev", split="dev")
    check(dev, [row for row in made.rows if row.split == "dev"])
    some = copied(made.path, tmp_path / "some", rows=(1, 6), keeping=Keeping(positions="first"))
    check(some, made.rows[1:6])
    assert some.manifest.rows.domains == dev.manifest.rows.domains == NAMES


def test_added_and_merged_rows_keep_both(made: Made, tmp_path: Path) -> None:
    further = [[(11, 0)], [(40, 2)], [(99, 1)]]
    other = make_store(tmp_path / "other", further, "d", seed=1)
    merge(tmp_path / "merged", [made.path, other.path], MADE, lambda done, total: None)
    check(Store.open(tmp_path / "merged"), made.rows + other.rows)
    added = make_rows(made.path, further, corpus="d", seed=1, adding=True)
    check(Store.open(made.path), made.rows + added.rows)
    answer(Made(made.path, made.rows + added.rows))
    found = diff((made.path, tmp_path / "merged"))
    assert (found.compared, found.differing) == (len(made.rows) + 3, [])


def test_a_merge_that_renumbers_splits_keeps_both(made: Made, tmp_path: Path) -> None:
    other = make_rows(tmp_path / "other", [[(11, 0)], [(40, 2)]], corpus="d", splits=("dev", "train"))
    merge(tmp_path / "merged", [made.path, other.path], MADE, lambda done, total: None)
    check(Store.open(tmp_path / "merged"), made.rows + other.rows)


def test_stores_of_other_domains_or_phrases_are_not_put_together(made: Made, tmp_path: Path) -> None:
    others = {
        "swapped": ({"names": ("books", "news", "web")}, "another domains than .*: expected news, books, web, found books, news, web"),
        "more": ({"names": (*NAMES, "talks")}, "another domains than"),
        "none": ({"groups": [[(9, None)]], "names": ()}, "another domains than"),
        "unphrased": ({"phrased": False}, "another token_arrays than"),
    }
    for name, (options, message) in others.items():
        make_rows(tmp_path / name, **{"groups": [[(9, 1)]], "corpus": "d", **options})
        with pytest.raises(FingerprintMismatch, match=message):
            merge(tmp_path / "merged", [made.path, tmp_path / name], MADE, lambda done, total: None)
    with pytest.raises(FingerprintMismatch, match="what is added has another domains than"):
        make_rows(made.path, [[(9, 1)]], ("books", "news", "web"), "d", adding=True)
    with pytest.raises(ValueError, match="domain: expected a number from 0 on in all rows"):
        make_rows(made.path, [[(9, None)]], (), "d", adding=True)
    with pytest.raises(ValueError, match="phrases must be in all rows or in none"):
        make_rows(made.path, [[(9, 1)]], NAMES, "d", phrased=False, adding=True)
    check(Store.open(made.path), made.rows)


def test_rows_of_other_domains_or_phrases_are_not_the_same(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [[(length, 1 - domain if domain < 2 else 2) for length, domain in group] for group in GROUPS]
    make_rows(tmp_path / "moved", moved)
    assert diff((made.path, tmp_path / "moved")).differing == [row for row, each in enumerate(made.rows) if each.domain != 2]
    make_rows(tmp_path / "renamed", moved, ("books", "news", "web"))
    assert diff((made.path, tmp_path / "renamed")).differing == []  # the same domain under another number
    make_rows(tmp_path / "none", [[(length, None) for length, _ in group] for group in GROUPS], ())
    assert len(diff((made.path, tmp_path / "none")).differing) == len(made.rows)
    monkeypatch.setattr("domain_store.phrases", lambda length, seed: np.full(length, 1 if length == 60 else 0, np.uint16))
    alike = [row for row, each in enumerate(made.rows) if not each.phrases.any()]
    make_rows(tmp_path / "phrased", GROUPS)
    assert diff((made.path, tmp_path / "phrased")).differing == [row for row in range(len(made.rows)) if row not in alike]


def test_exports_hold_both(made: Made, tmp_path: Path) -> None:
    export(made.path, tmp_path / "parquet", "parquet")
    found = sorted(pq.read_table(tmp_path / "parquet").to_pylist(), key=lambda row: row["row"])
    assert [row["domain"] for row in found] == [NAMES[row.domain] for row in made.rows]
    assert [row["phrases"] for row in found] == [row.phrases.tolist() for row in made.rows]
    export(made.path, tmp_path / "tensors", "safetensors")
    for file in (tmp_path / "tensors").glob("*.safetensors"):
        tensors = load_file(file)
        rows = [made.rows[row] for row in tensors["row"].tolist()]
        assert tensors["domain"].tolist() == [row.domain for row in rows]
        assert tensors["tokens/phrases"].tolist() == np.concatenate([row.phrases for row in rows]).tolist()
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["rows"])["domains"] == list(NAMES)


def test_object_storage_gives_both_back(made: Made, tmp_path: Path, url: str) -> None:
    upload(made.path, url, quiet)
    download(url, tmp_path / "back", quiet)
    check(Store.open(tmp_path / "back"), made.rows)
    there, rows = Store.open(url), np.arange(len(made.rows))
    assert there.rows.domain_at(rows).tolist() == [row.domain for row in made.rows]
    assert there.tokens("phrases", rows).tolist() == np.concatenate([row.phrases for row in made.rows]).tolist()


@pytest.mark.parametrize("file", ["rows/domain/c.1.0", "tokens/phrases/c.1"])
def test_damage_is_found_and_repair_leaves_the_rest(made: Made, file: str) -> None:
    data = bytearray((made.path / file).read_bytes())
    data[5] ^= 1
    (made.path / file).write_bytes(data)
    [problem] = verify(made.path)
    assert (problem.file, problem.repairs) == (made.path / file, False)
    (made.path / file).write_bytes(bytes(data[:5]) + bytes([data[5] ^ 1]) + bytes(data[6:]))
    (made.path / "rows" / "domain" / "zarr.json").unlink()
    (made.path / "rows" / "domain" / "c.77.0").write_bytes(b"of a killed command")
    (made.path / "tokens" / "phrases" / "c.77").write_bytes(b"of a killed command")
    done = repair(made.path)
    assert (len(done.mended), done.left, done.freed.files) == (1, [], 2)
    check(Store.open(made.path), made.rows)


# Conditions


def test_rows_are_chosen_by_domain(made: Made) -> None:
    store = Store.open(made.path)
    for names in (("books",), ("web", "news")):
        (pool,) = pools(store, None, parse(Where, {"domain": list(names)}, "where"))
        wanted = []
        for group in {row.group for row in made.rows}:
            members = [number for number, row in enumerate(made.rows) if row.group == group]
            wanted += members if all(NAMES[made.rows[row].domain] in names for row in members) else []
        assert pool.take(np.arange(len(pool))).tolist() == sorted(wanted)
        assert wanted


def test_a_condition_on_domains_that_cannot_be_met_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"where: domain: .* has no domain 'boks'; did you mean 'books'"):
        pools(Store.open(made.path), None, Where(domain=("boks",)))
    plain = make_plain(tmp_path / "plain", PLAIN)
    with pytest.raises(ValueError, match=r"where: domain: the rows of .*plain have no domains; build them with rows\.domain"):
        pools(Store.open(plain.path), None, Where(domain=("books",)))
    make_rows(tmp_path / "news", [[(9, 0)]])
    with pytest.raises(ValueError, match="no row meets where: it has 1 rows; domain leaves 0"):
        pools(Store.open(tmp_path / "news"), None, Where(domain=("books",)))
