"""Manifests and files that lie about pairs of rows and interventions are refused with a sentence."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import forge
import numpy as np
import pytest
import small_store
from forge import Tree
from pair_store import make_store

from store import CorruptShard, Store, StoreError
from store.verify import verify


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("good") / "store").path


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "store")


def plan_array(**change: object) -> Callable[[Tree], object]:
    return lambda tree: next(array for array in tree["rows"]["token_arrays"] if array["name"] == "interchange").update(change)


def written(value: object) -> Callable[[Tree], object]:
    return lambda tree: tree["passes"]["bert"].update(intervention=value)


def one_less(rows: Tree) -> None:
    """Say that there is one row less in the first slot."""
    rows["rows"] -= 1
    rows["splits"]["train"] -= 1
    rows["parts"][0]["rows"] -= 1
    rows["filled"]["rows"][0] -= 1


MANIFESTS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "plans without draws": (lambda tree: tree["rows"]["slot_crcs"].pop("draw"), "a checksum for each of"),
    "draws without plans": (
        lambda tree: (tree["rows"]["token_arrays"].pop(), tree["rows"]["slot_crcs"].pop("interchange")),
        "a checksum for each of",
    ),
    "plans that are not announced": (lambda tree: tree["rows"]["token_arrays"].pop(), "a checksum for each of"),
    "a slot of draws without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["draw"].pop(), "a checksum for each of"),
    "a slot of plans without a checksum": (lambda tree: tree["rows"]["slot_crcs"]["interchange"].pop(), "interchange needs its type"),
    "plans of another type": (plan_array(dtype="uint8"), "interchange needs its type"),
    "plans of another width": (plan_array(width=10**6), "interchange needs its type"),
    "a row without a partner": (lambda tree: one_less(tree["rows"]), "an even number of rows in each slot, for they stand in pairs"),
    "a block that is not there": (
        written({"layers": [[1], [2]]}),
        "pass bert: intervention: layers: expected different blocks",
    ),
    "a block twice": (written({"layers": [[1, 1]]}), r"expected different blocks from 1 to 1, found \[1, 1\]"),
    "block 0": (written({"layers": [[0]]}), "greater than or equal to 1"),
    "no alternative": (written({"layers": []}), "at least 1"),
    "an empty alternative": (written({"layers": [[]]}), "at least 1"),
    "an intervention of another kind": (written({"heads": [[1]]}), "heads"),
    "a million alternatives": (written({"layers": [["a"]] * 10**6}), "layers.0.0"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused(path: Path, name: str) -> None:
    change, said = MANIFESTS[name]
    forge.manifest(path, change)
    with pytest.raises(StoreError, match=said):
        Store.open(path)


def test_an_intervention_among_rows_without_partners_is_refused(tmp_path: Path) -> None:
    plain = small_store.make_store(tmp_path / "plain", small_store.GROUPS).path
    forge.manifest(plain, written({"layers": [[1]]}))
    with pytest.raises(StoreError, match="pass bert has an intervention, and its rows no partners"):
        Store.open(plain)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("number", [-1, -(2**31)])
def test_a_draw_below_nought_is_refused(path: Path, number: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.table.SMALL", 10**6 if small else 0)
    store = Store.open(path)
    draws = store.rows.draw_at(store.rows.rows_of(1)).astype(np.int32)[:, None]
    draws[0] = number
    forge.row_slot(path, "draw", 1, draws)
    store = Store.open(path)
    with pytest.raises(CorruptShard, match="holds draws below 0; rows cannot be mended: remove the folder"):
        store.rows.draw_at(store.rows.rows_of(1)[:1])
    [problem] = verify(path)
    assert problem.file == path / "rows" / "draw" / "c.1.0"


@pytest.mark.parametrize("file", ["rows/draw/c.0.0", "tokens/interchange/c.0"])
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
        store.rows.draw_at(row) if "draw" in file else store.tokens("interchange", row)


@pytest.mark.parametrize("folder", ["rows/draw", "tokens/interchange"])
def test_a_folder_that_leads_out_is_refused(path: Path, tmp_path: Path, folder: str) -> None:
    shutil.move(path / folder, tmp_path / "outside")
    (path / folder).symlink_to(tmp_path / "outside")
    store, row = Store.open(path), np.array([0])
    with pytest.raises(StoreError, match=r"but a link leads to .*outside.*; remove the link"):
        store.rows.draw_at(row) if "draw" in folder else store.tokens("interchange", row)
