"""Files on network file systems are read piece by piece, with the same result as through a map."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from forge import read_all
from small_store import GROUPS, SPECS, Made, make_store, spec

from store import CorruptShard, Store
from store.filesystem import is_network
from store.shards import Shard, write_slot
from store.slot_file import SlotFile

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
30 22 0:40 / /data rw,relatime shared:2 - nfs4 server:/export rw,vers=4.2
31 30 254:1 / /data/scratch rw - xfs /dev/vdb rw
32 22 0:41 / /my\040models rw - lustre mgs@tcp:/fs rw
33 22 0:42 / /modèles rw - ceph a,b:/ rw
34 22 0:43 / /far rw - fuse.sshfs me@far:/ rw
35 22 8:1 / /usb rw - fuseblk /dev/sda1 rw
36 22 0:44 / /twice rw - nfs server:/old rw
37 22 8:2 / /twice rw - ext4 /dev/sdb rw
38 22 0:45 / /guest rw master:1 propagate_from:2 - 9p share rw
"""


@pytest.mark.parametrize(
    ("path", "network"),
    [
        ("/store", False),
        ("/data", True),
        ("/data/store", True),
        ("/data/scratch/store", False),
        ("/database/store", False),
        ("/my models/store", True),
        ("/my", False),
        ("/modèles/store", True),
        ("/far/store", True),
        ("/usb/store", False),
        ("/twice/store", False),
        ("/guest/store", True),
    ],
)
def test_the_mount_that_a_path_lies_on_tells(tmp_path: Path, path: str, network: bool) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS, encoding="utf-8")
    assert is_network(Path(path), tmp_path / "mountinfo") == network


def test_a_link_leads_to_the_mount_that_counts(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS, encoding="utf-8")
    (tmp_path / "link").symlink_to("/data/store")
    assert is_network(tmp_path / "link", tmp_path / "mountinfo")


def test_a_system_that_does_not_tell_has_local_files(tmp_path: Path) -> None:
    assert not is_network(tmp_path, tmp_path / "absent")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Raw, compressed, and numbers with scales."""
    specs = (*SPECS, spec("final@all", "float32", compression="zstd"), spec("hidden.0@all", "int8"))
    return make_store(tmp_path_factory.mktemp("both") / "store", GROUPS, specs, 256)


def test_pieces_are_what_a_map_gives(both: Made) -> None:
    assert read_all(both.path, mapped=False) == read_all(both.path, mapped=True)


def test_any_rows_in_any_order_are_what_a_map_gives(both: Made) -> None:
    mapped, pieces = Store.open(both.path, mapped=True), Store.open(both.path, mapped=False)
    chance = np.random.default_rng(3)
    keys = [feature.feature.of("bert") for feature in mapped.manifest.passes["bert"].features]
    for _ in range(20):
        rows = chance.integers(0, len(both.rows), chance.integers(0, 12))
        one, other = mapped.read_all(keys, rows), pieces.read_all(keys, rows)
        for key in keys:
            assert {name: values.tobytes() for name, values in one[key].items()} == {
                name: values.tobytes() for name, values in other[key].items()
            }
        assert mapped.tokens("input_ids", rows).tobytes() == pieces.tokens("input_ids", rows).tobytes()


def test_a_loader_process_reads_as_its_parent_does(both: Made) -> None:
    for mapped in (True, False):
        assert pickle.loads(pickle.dumps(Store.open(both.path, mapped)))._mapped is mapped


@pytest.fixture
def slot(tmp_path: Path) -> SlotFile:
    """A file of two chunks, read in pieces."""
    shard = Shard(spec("hidden.1@all").arrays[0], 256, 200)
    values = np.arange(1600, dtype=np.float32).reshape(200, 8)
    return SlotFile(tmp_path / "c.0.0", shard, write_slot(tmp_path / "c.0.0", values, shard), mapped=False)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(slot: SlotFile) -> None:
    assert slot.decode(0).shape == (128, 8)
    os.truncate(slot.path, 600)
    with pytest.raises(CorruptShard, match=r"c.0.0: the file was cut short while it was read"):
        slot.check(1)
    with pytest.raises(CorruptShard, match="cut short"):
        slot.raw(0, 0, 128)
    assert slot.raw(0, 0, 2)[1, 7] == 15


def test_a_disk_that_cannot_be_read_is_an_error_of_the_file(slot: SlotFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("os.pread", stale)
    with pytest.raises(CorruptShard, match=r"c.0.0: the file was taken away while it was read"):
        slot.check(0)


def test_a_file_is_closed_when_nobody_uses_it(tmp_path: Path) -> None:
    shard = Shard(spec("hidden.1@all").arrays[0], 256, 200)
    seal = write_slot(tmp_path / "c.0.0", np.zeros((200, 8), np.float32), shard)

    def descriptors() -> int:
        return sum(os.path.realpath(file) == str(tmp_path / "c.0.0") for file in Path("/proc/self/fd").iterdir())

    for mapped in (True, False):
        opened = [SlotFile(tmp_path / "c.0.0", shard, seal, mapped=mapped) for _ in range(20)]
        assert descriptors() == 20  # a map keeps its file open too
        del opened
        assert descriptors() == 0
