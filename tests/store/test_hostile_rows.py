"""Manifests and files that lie about domains and phrases are refused with a sentence."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import forge
import numpy as np
import pytest
from domain_store import make_store
from forge import Tree

from store import CorruptShard, Store, StoreError
from store.verify import verify


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("good") / "store").path


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "store")


def rows(**change: object) -> Callable[[Tree], object]:
    return lambda tree: tree["rows"].update(change)


def phrase_array(**change: object) -> Callable[[Tree], object]:
    return lambda tree: next(array for array in tree["rows"]["token_arrays"] if array["name"] == "phrases").update(change)


MANIFESTS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "a domain twice": (rows(domains=["a", "a", "b"]), "rows has 'a' twice"),
    "domains that are no names": (rows(domains=[1, 2, 3]), "domains.0: Input should be a valid string"),
    "a million wrong domains": (rows(domains=[0] * 10**6), "domains.0"),
    "domains without their array": (lambda tree: tree["rows"]["slot_crcs"].pop("domain"), "a checksum for each of"),
    "an array of domains without names": (rows(domains=[]), "a checksum for each of"),
    "a slot of domains without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["domain"].pop(), "a checksum for each of"),
    "a slot of phrases without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["phrases"].pop(), "phrases needs its type"),
    "phrases of another type": (phrase_array(dtype="int32"), "phrases needs its type"),
    "phrases of another width": (phrase_array(width=10**6), "phrases needs its type"),
    "phrases elsewhere": (phrase_array(name="../../phrases"), "expected a name"),
    "phrases that are not announced": (lambda tree: tree["rows"]["token_arrays"].pop(), "a checksum for each of"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(path: Path, name: str) -> None:
    change, said = MANIFESTS[name]
    forge.manifest(path, change)
    with pytest.raises(StoreError, match=said):
        Store.open(path)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("number", [-1, 3, 2**31 - 1])
def test_a_domain_that_is_not_there_is_refused(path: Path, number: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.table.SMALL", 10**6 if small else 0)
    domains = Store.open(path).rows.domains_in(1).astype(np.int32)[:, None]
    domains[0] = number
    forge.row_slot(path, "domain", 1, domains)
    store = Store.open(path)
    row = store.rows.rows_of(1)[:1]
    with pytest.raises(CorruptShard, match="holds rows of domains other than its 3; rows cannot be mended: remove the folder"):
        store.rows.domain_at(row)
    [problem] = verify(path)
    assert problem.file == path / "rows" / "domain" / "c.1.0"
    assert "domains other than its 3" in problem.what


@pytest.mark.parametrize("file", ["rows/domain/c.0.0", "tokens/phrases/c.0"])
@pytest.mark.parametrize("instead", ["a link", "a pipe", "a terabyte", "nothing"])
def test_what_is_no_plain_file_of_its_size_is_refused(path: Path, file: str, instead: str) -> None:
    place = path / file
    place.rename(place.with_name("moved"))
    if instead == "a link":
        place.symlink_to(place.with_name("moved"))
    elif instead == "a pipe":
        os.mkfifo(place)
    elif instead == "a terabyte":
        place.touch()
        os.truncate(place, 1 << 40)
    store, row = Store.open(path), np.array([0])
    with pytest.raises(CorruptShard, match=place.name):
        store.rows.domain_at(row) if "domain" in file else store.tokens("phrases", row)


@pytest.mark.parametrize("folder", ["rows/domain", "tokens/phrases"])
def test_a_folder_that_leads_out_is_refused(path: Path, tmp_path: Path, folder: str) -> None:
    shutil.move(path / folder, tmp_path / "outside")
    (path / folder).symlink_to(tmp_path / "outside")
    store, row = Store.open(path), np.array([0])
    with pytest.raises(StoreError, match=r"but a link leads to .*outside.*; remove the link"):
        store.rows.domain_at(row) if "domain" in folder else store.tokens("phrases", row)
