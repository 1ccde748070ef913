"""Upload, download, and stores that grow meanwhile."""

import pickle
import random
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from object_storage import Proxy, check_same, keys_of, objects_as, process, quiet
from small_store import GROUPS, MADE, SPECS, Made, answers, make_rows, make_store, pass_info

from store import CorruptShard, FeatureKey, FingerprintMismatch, MissingFeature, Store, StoreError, StoreWriter, commits, layout, transfer
from store.drop import drop
from store.manifest import manifest_bytes, read_manifest
from store.transfer import download, upload
from store.verify import verify

TRANSFER = """
import sys
from pathlib import Path
from store.transfer import download, upload
def tick(done, total):
    print(done, flush=True)
if sys.argv[1] == "up":
    upload(Path(sys.argv[2]), sys.argv[3], tick)
else:
    download(sys.argv[3], Path(sys.argv[2]), tick)
"""


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_transfer_that_was_killed_goes_on_and_makes_a_whole_store(tmp_path: Path, url: str, proxy: Proxy, way: str) -> None:
    made = make_store(tmp_path / "store", [[(128, 9)]] * 8, SPECS[:1])
    path = made.path if way == "up" else tmp_path / "copy"
    if way == "down":
        upload(made.path, url, quiet)
    proxy.fault = lambda method, key, before: "slow" if method == ("PUT" if way == "up" else "GET") else None
    for kill in range(2):
        running = process(TRANSFER, way, path, url)
        assert running.stdout is not None
        for _ in range(kill * 20 + 1):
            if not running.stdout.readline():
                break
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if way == "down" and not layout.manifest(path).exists():
            with pytest.raises(StoreError, match="expected a store at"):
                Store.open(path)
    proxy.fault = lambda method, key, before: None
    proxy.asked.clear()
    if way == "up":
        whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert 0 < upload(path, url, quiet) < whole / 2  # what was there did not come anew
        download(url, tmp_path / "copy", quiet)
    else:
        download(url, path, quiet)
    assert verify(tmp_path / "copy") == []
    assert objects_as(tmp_path / "copy", made.path)
    check_same(Store.open(tmp_path / "copy"), Store.open(made.path))
    assert upload(made.path, url, quiet) == 0
    assert download(url, tmp_path / "copy", quiet) == 0


def test_faults_on_the_way_do_not_keep_a_store_from_being_uploaded(own: Made, url: str, proxy: Proxy, tmp_path: Path) -> None:
    chance = random.Random(0)
    proxy.fault = lambda method, key, before: (
        chance.choice(["500", "503", "close", "cut"]) if before < 2 and chance.random() < 0.4 else None
    )
    upload(own.path, url, quiet)
    download(url, tmp_path / "copy", quiet)
    assert verify(tmp_path / "copy") == []
    assert objects_as(tmp_path / "copy", own.path)


def test_a_copy_from_object_storage_can_be_written_on(tmp_path: Path, url: str) -> None:
    made = make_rows(tmp_path / "store", GROUPS)
    _commit(made, [0, 2])
    upload(made.path, url, quiet)
    download(url, tmp_path / "copy", quiet)
    copy = Made(tmp_path / "copy", made.rows)
    assert _commit(copy, [1, 3])
    upload(copy.path, url, quiet)
    store = Store.open(url)
    assert store.complete("bert")
    check_same(store, Store.open(copy.path))
    _commit(copy, [0], "again")
    with pytest.raises(FingerprintMismatch, match=r"has shards \[0\] of pass again that s3://.* lacks"):
        download(url, copy.path, quiet)


def _commit(made: Made, shards: list[int], name: str = "bert", pause: float = 0.0) -> bool:
    with StoreWriter.open(made.path) as writer:
        writer.add_pass(name, pass_info(), {"1.query.bias": np.arange(8, dtype=np.uint16)})
        for shard in shards:
            time.sleep(pause)
            writer.commit(name, shard, answers(made, shard, SPECS, writer.rows.columns.slot))
        return not writer.pending(name)


def test_a_growing_store_is_followed_while_a_writer_commits(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transfer, "POLL_SECONDS", 0.1)
    made = make_rows(tmp_path / "store", GROUPS)
    _commit(made, [])
    upload(made.path, url, quiet)
    followed = [Store.open(url, follow=30), Store.open(made.path, follow=30), pickle.loads(pickle.dumps(Store.open(url, follow=30)))]
    assert not followed[0].committed("bert")
    writer = threading.Thread(target=_commit, args=(made, [3, 0, 1, 2], "bert", 0.3))
    sender = threading.Thread(target=upload, args=(made.path, url, quiet, True))
    writer.start()
    sender.start()
    rows, keys = np.arange(len(followed[0].rows)), keys_of(followed[0])
    found = [store.read_all(keys, rows) for store in followed]
    writer.join(30)
    sender.join(30)
    assert not sender.is_alive()
    wanted = Store.open(made.path).read_all(keys, rows)
    for each in found:
        assert all(each[key][name].tobytes() == values.tobytes() for key in keys for name, values in wanted[key].items())
    assert "waiting for shards" in caplog.text


def test_a_dump_that_has_stopped_is_not_followed_for_ever(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", GROUPS)
    _commit(made, [0])
    store = Store.open(made.path, follow=0.5)
    store.read(FeatureKey.parse("bert/final@first"), np.array([0]))
    with pytest.raises(MissingFeature, match=r"1 of 4 shards, not \[1, 2, 3\], and none came for 0.5 s; look whether its dump still runs"):
        store.read(FeatureKey.parse("bert/final@first"), np.arange(len(store.rows)))
    with pytest.raises(MissingFeature, match="start its dump again"):
        Store.open(made.path).read(FeatureKey.parse("bert/final@first"), np.arange(len(store.rows)))


def test_a_shard_that_was_made_again_is_read_anew(own: Made, own_there: str) -> None:
    store, local = Store.open(own_there), Store.open(own.path)
    check_same(store, local)
    with commits.exclusive(own.path):
        commits.drop(own.path, local.committed("bert")[1])
    with StoreWriter.open(own.path) as writer:
        writer.commit("bert", 1, answers(own, 1, SPECS, writer.rows.columns.slot, seed=7))
    upload(own.path, own_there, quiet)
    now = Store.open(own.path)
    check_same(Store.open(own_there), now)
    store.refresh()
    check_same(store, now)


def test_a_feature_that_was_dropped_is_gone_after_an_upload(own: Made, own_there: str) -> None:

    drop(own.path, ["bert/final@first"], MADE, lambda name, info: info)
    upload(own.path, own_there, quiet)
    store = Store.open(own_there)
    check_same(store, Store.open(own.path))
    with pytest.raises(MissingFeature, match=r"s3://.* has no bert/final@first"):
        store.read(FeatureKey.parse("bert/final@first"), np.array([0]))


def test_another_store_is_not_written_over(own: Made, own_there: str, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", GROUPS, seed=3)
    with pytest.raises(FingerprintMismatch, match=r"holds another store than .*other: its rows are others; give it another address"):
        upload(other.path, own_there, quiet)
    with pytest.raises(FingerprintMismatch, match=r"holds another store .*give another folder"):
        download(own_there, other.path, quiet)
    info = read_manifest(own.path).passes["bert"].model_copy(update={"teacher": "someone else"})
    manifest = read_manifest(own.path).model_copy(update={"passes": {"bert": info}})
    layout.manifest(own.path).write_bytes(manifest_bytes(manifest))
    with pytest.raises(FingerprintMismatch, match="pass bert has another teacher"):
        upload(own.path, own_there, quiet)


def test_a_damaged_store_is_not_uploaded(own: Made, url: str) -> None:
    file = own.path / "bert/hidden.1/all/c.2.0"
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"c\.2\.0: chunk 0 fails its checksum; mend it with teacher-dump verify --repair"):
        upload(own.path, url, quiet)
    with pytest.raises(StoreError, match="nothing there"):
        Store.open(url)


def test_a_store_is_not_downloaded_into_a_folder_with_other_things(local: Made, there: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="expected an empty folder"):
        download(there, tmp_path / "mine", quiet)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_programs_upload_download_and_show(own: Made, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from teacher_dump.cli import main

    main(["upload", str(own.path), url])
    main(["upload", str(own.path), url])
    main(["download", url, str(tmp_path / "copy")])
    main(["status", url])
    said = capsys.readouterr().out
    assert re.search(rf"{url} is as .* sent\)\n{url} was as ", said)
    assert said.count("pass bert: 4 of 4 shards (complete)") == 2
    with pytest.raises(SystemExit, match="2"):
        main(["verify", url])
    assert "come back with `teacher-dump download`" in capsys.readouterr().err
