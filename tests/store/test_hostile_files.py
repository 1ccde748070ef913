"""Files and folders that are not what they should be, and what writers do among them."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from harm import GROUPS, INSTEAD, SPECS, limited, refused
from small_store import Made, answers, make_store, pass_info

from store import RowWriter, StoreError, StoreWriter

FILES = {
    "the manifest": "manifest.json",
    "a row part": "rows/part-00000.parquet",
    "addresses": "rows/numbers/c.0.0",
    "labels": "rows/label/c.1.0",
    "tokens": "tokens/input_ids/c.1",
    "a raw shard": "bert/hidden.1/all/c.0.0",
    "a compressed shard": "bert/final/all/c.1.0",
    "a weight": "static/bert/1.query.bias/c.0",
    "the log": "commits/0.log",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("instead", INSTEAD)
def test_what_is_no_plain_file_of_its_size_is_refused_unread(path: Path, file: str, instead: str) -> None:
    place = path / FILES[file]
    shutil.copyfile(place, place.with_name("moved"))
    place.unlink()
    INSTEAD[instead](place)
    refused(path, r"found a (link|pipe|folder)|expected (at most )?[\d,]+ bytes|do not need 1099511627776 bytes|fails its checksum")


FOLDERS = [
    "rows",
    "rows/numbers",
    "tokens",
    "tokens/input_ids",
    "bert",
    "bert/hidden.1/all",
    "static",
    "static/bert/1.query.bias",
    "commits",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_leads_out_is_refused(path: Path, tmp_path: Path, folder: str) -> None:
    shutil.move(path / folder, tmp_path / "outside")
    (path / folder).symlink_to(tmp_path / "outside")
    refused(path, "but a link leads to .*outside.*; remove the link")


@pytest.mark.parametrize("file", FILES)
def test_what_may_not_be_read_is_refused(file: str, good: Made, tmp_path: Path) -> None:
    path = shutil.copytree(good.path, tmp_path / "store")
    for folder in (path, *path.parents):
        if tmp_path.parent.parent in folder.parents or folder == tmp_path.parent.parent:
            folder.chmod(0o755)
    (path / FILES[file]).chmod(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        if not os.access(path / "zarr.json", os.R_OK, effective_ids=True):
            pytest.skip("the folder of temporary files is closed to other users")
        refused(path, "may not be read")
    finally:
        if before == 0:
            os.seteuid(0)
    (path / FILES[file]).chmod(0o600)


def test_writers_follow_no_links_out(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("commits/0.lock", "commits/1.log", "bert/hidden.1/all/.c.0.0.0.tmp", ".manifest.json.0.tmp"):
        place = path / name
        place.unlink(missing_ok=True)
        place.symlink_to(mine)
    (path / "commits" / "0.log").write_text("")  # nothing is committed: all of it will be written
    with limited(), contextlib.suppress(StoreError), StoreWriter.open(path) as writer:
        made = Made(path, make_store(tmp_path / "same", GROUPS, SPECS, 256).rows)
        writer.add_pass("second", pass_info(SPECS[:1]), {})
        writer.commit("bert", 0, answers(made, 0, SPECS, writer.rows.columns.slot))
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["commits/0.lock", "commits/store.lock", "commits/0.log", "commits"])
def test_writers_wait_for_no_pipes(path: Path, name: str) -> None:
    place = path / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    os.mkfifo(place)
    with limited(), contextlib.suppress(StoreError), StoreWriter.open(path) as writer:
        writer.add_pass("second", pass_info(SPECS[:1]), {})


def test_a_build_in_a_hostile_folder_follows_no_links(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "c.0").write_text("mine")
    store = tmp_path / "store"
    (store / "tokens").mkdir(parents=True)
    (store / ".building").touch()
    (store / "tokens" / "input_ids").symlink_to(mine)
    with limited(), pytest.raises(StoreError, match="remove the link"):
        RowWriter(store, 128)
    assert (mine / "c.0").read_text() == "mine"
