"""Stores in object storage, read over a network that cannot be trusted."""

import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_storage import Proxy, check_same, put, quiet, replace_object
from small_store import GROUPS, Made, make_rows, make_store, spec

from store import CorruptShard, FeatureKey, Store, StoreError, StoreWriter, cache, commits, lines, remote
from store.remote import url_of
from store.transfer import download, upload


def test_a_store_is_read_by_its_address_as_from_its_folder(local: Made, there: str) -> None:
    stored = Store.open(local.path)
    for place in (there, Path(there)):
        store = Store.open(place)
        check_same(store, stored)
        assert store.where == there
        assert store.complete("bert")
        assert store.rows.table.equals(stored.rows.table)
        assert {name: values.tobytes() for name, values in store.statics("bert").items()} == {
            name: values.tobytes() for name, values in stored.statics("bert").items()
        }
        folder = store.shipped("bert")
        assert (folder / "config.json").read_text() == "{}"
        assert (folder / "words" / "vocab.txt").read_text() == "a\nb\n"
    check_same(pickle.loads(pickle.dumps(store)), stored)


def test_what_was_read_once_is_not_read_again(local: Made, there: str, proxy: Proxy) -> None:
    stored = Store.open(local.path)
    check_same(Store.open(there), stored)
    proxy.asked.clear()
    again = Store.open(there)
    check_same(again, stored)
    assert {key for _, key in proxy.asked} == {
        f"stores/one/{name}" for name in ("manifest.json", "commits/table.log", *(f"commits/{writer}.1.log" for writer in range(4)))
    }
    proxy.asked.clear()
    again.refresh()
    check_same(again, stored)
    assert proxy.gets(".0") == 0


def test_only_features_that_are_asked_for_are_fetched(local: Made, there: str, proxy: Proxy) -> None:
    store = Store.open(there)
    proxy.asked.clear()
    store.read(FeatureKey.parse("bert/final@first"), np.array([0]))
    features = [key for _, key in proxy.asked if "/bert/" in key]
    assert features == ["stores/one/bert/final/first/c.0.0"]


def test_a_store_opens_by_http_alone(local: Made, tmp_path: Path, proxy: Proxy) -> None:
    code = """import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    print(server.server_port, flush=True)
    server.serve_forever()"""
    with subprocess.Popen([sys.executable, "-c", code, local.path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as files:
        try:
            assert files.stdout is not None
            check_same(Store.open(f"http://127.0.0.1:{files.stdout.readline().strip()}"), Store.open(local.path))
        finally:
            files.kill()


def test_a_forked_child_reads_on_with_a_connection_of_its_own(local: Made, there: str) -> None:
    store, stored = Store.open(there), Store.open(local.path)
    check_same(store, stored, np.array([0, 1]))
    child = os.fork()
    if not child:
        try:
            check_same(store, stored)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_same(store, stored)


def test_faults_on_the_way_do_not_show(local: Made, there: str, proxy: Proxy) -> None:
    chance, kinds = random.Random(0), ["500", "503", "cut", "slow", "close"]
    happened = set()

    def fault(method: str, key: str, before: int) -> str | None:
        if before > 1 or chance.random() < 0.4:
            return None
        happened.add(kind := chance.choice(kinds))
        return kind

    proxy.fault = fault
    store = Store.open(there)
    check_same(store, Store.open(local.path))
    store.statics("bert")
    store.shipped("bert")
    assert happened == set(kinds)


def test_large_files_come_in_ranges_that_survive_cuts(tmp_path: Path, url: str, s3: int, proxy: Proxy) -> None:
    features = (spec("hidden.1@all", "float32", 2400),)
    made = make_store(tmp_path / "large", [[(2048, 3)]], features, slot_tokens=2048)
    size = next(iter(Store.open(made.path).committed("bert")[0].files.values())).size
    assert size > 2 * 8 << 20
    put(made.path, url, s3)
    proxy.asked.clear()
    proxy.fault = lambda method, key, before: "cut" if key.endswith("c.0.0") and before < 2 else None
    check_same(Store.open(url), Store.open(made.path))
    assert proxy.asked["GET", "stores/one/bert/hidden.1/all/c.0.0"] >= -(-size // (8 << 20)) + 2


@pytest.mark.parametrize("fault", ["500", "hang"])
def test_a_storage_that_never_answers_ends_in_a_store_error(
    local: Made, there: str, proxy: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.SECONDS, "1")
    store = Store.open(there)
    proxy.fault = lambda method, key, before: fault if "hidden" in key else None
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"c\.\d\.0 at http://127.0.0.1:\d+: no answer within 1 s"):
        check_same(store, Store.open(local.path))
    assert time.monotonic() - start < 10
    proxy.fault = lambda method, key, before: None
    check_same(store, Store.open(local.path))


def test_what_was_damaged_up_there_is_an_error_that_names_it(own: Made, own_there: str, proxy: Proxy) -> None:
    data = bytearray((own.path / "bert/final/first/c.1.0").read_bytes())
    data[5] ^= 1
    replace_object(own_there, "bert/final/first/c.1.0", bytes(data))
    store = Store.open(own_there)
    proxy.asked.clear()
    with pytest.raises(CorruptShard, match=r"stores/one/bert/final/first/c\.1\.0 is not what was committed.*upload it again"):
        check_same(store, Store.open(own.path))
    assert proxy.asked["GET", "stores/one/bert/final/first/c.1.0"] <= 4
    replace_object(own_there, "bert/final/first/c.1.0", bytes(100_000_000))
    with pytest.raises(StoreError, match="100,000,000 bytes are not what belongs there"):
        check_same(store, Store.open(own.path))
    assert sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file()) < 1_000_000


def test_absurd_sizes_are_refused_before_anything_is_read(own: Made, own_there: str, proxy: Proxy, tmp_path: Path) -> None:
    committed = commits.replay(own.path)["bert"]
    huge = [
        type(commit)("bert", shard, {name: type(seal)(10**13, 1) for name, seal in commit.files.items()})
        for shard, commit in committed.items()
    ]
    replace_object(own_there, "commits/table.log", lines.table_bytes(7, huge))
    store = Store.open(own_there)
    proxy.asked.clear()
    with pytest.raises(CorruptShard, match="found 10000000000000 in the commit log"):
        check_same(store, Store.open(own.path))
    assert not [key for _, key in proxy.asked if "/bert/" in key]
    replace_object(own_there, "manifest.json", bytes(70 << 20))
    with pytest.raises(StoreError, match=r"manifest.json: 73,400,320 bytes are not what belongs there"):
        Store.open(own_there)


def test_names_that_lead_out_of_the_cache_are_refused(own: Made, own_there: str, tmp_path: Path) -> None:
    for name in ("../../../evil", "/etc/evil", "a/../../evil", ".hidden"):
        replace_object(own_there, "model/bert.list", lines.line({"files": {name: [2, 1]}}))
        with pytest.raises(StoreError, match="expected a name of letters"):
            Store.open(own_there).shipped("bert")
    replace_object(own_there, "model/bert.list", b"00000000 {}\n")
    with pytest.raises(CorruptShard, match="list of files that ship with pass bert is damaged"):
        Store.open(own_there).shipped("bert")
    assert not list(tmp_path.rglob("evil"))


def test_errors_say_what_to_do(there: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, local: Made) -> None:
    with pytest.raises(StoreError, match=r"nothing there; check the address, or put a store there with: teacher-dump upload"):
        Store.open(f"{there}/deeper")
    for use in (lambda: Store.open("s3://no-such-bucket/x"), lambda: upload(local.path, "s3://no-such-bucket/x", quiet)):
        with pytest.raises(StoreError, match="no such bucket"):
            use()
    proxy.fault = lambda method, key, before: "403"
    with pytest.raises(StoreError, match=r"no access .*set credentials in the environment \(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY\)"):
        Store.open(there)
    with pytest.raises(StoreError, match=r"AZURE_STORAGE_ACCOUNT_NAME|refuses"):
        Store.open("az://container/store")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreError, match="allow it with AWS_ALLOW_HTTP=true"):
        Store.open(there)
    monkeypatch.setenv(remote.SECONDS, "soon")
    with pytest.raises(StoreError, match="TEACHERCACHE_REMOTE_SECONDS: expected a number of seconds, found 'soon'"):
        Store.open(there)
    monkeypatch.setenv(cache.SIZE, "much")
    with pytest.raises(StoreError, match="expected a size such as 200GB, found 'much'"):
        Store.open(there)
    with pytest.raises(ValueError, match="expected an address such as s3://"):
        download("folder", local.path, quiet)


def test_a_storage_that_is_not_there_is_an_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(remote.SECONDS, "1")
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"no answer within 1 s of trying.*check network and endpoint"):
        Store.open("s3://bucket/store")
    assert time.monotonic() - start < 8


def test_without_obstore_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"pip install 'teachercache\[remote\]'"):
        Store.open("s3://bucket/store")


def test_a_helper_that_was_killed_is_an_error_and_the_next_read_goes_on(local: Made, there: str) -> None:
    store = Store.open(there)
    helper = store._mirror._connection._helper  # type: ignore[union-attr]
    assert helper is not None
    helper._process.kill()
    helper._process.wait()
    with pytest.raises(StoreError, match="the process that reads it has ended"):
        check_same(store, Store.open(local.path))
    check_same(store, Store.open(local.path))


def test_commands_that_need_a_folder_refuse_an_address(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/store: expected a folder of this machine; .*come back with `teacher-dump download`"):
        StoreWriter.open(Path("s3://bucket/store"))


def test_a_store_is_not_made_at_an_address() -> None:
    with pytest.raises(StoreError, match="expected a folder of this machine"):
        make_rows(Path("s3://bucket/store"), GROUPS)
    assert not Path("s3:").exists()


def test_addresses_are_told_from_folders() -> None:
    assert url_of("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert url_of(Path("s3://bucket/a")) == "s3://bucket/a"
    assert url_of("abfss://container@account/store") == "abfss://container@account/store"
    for folder in ("store", "/data/s3/x", "./s3:/x", "S3", "c:/x", "file.s3://x"):
        assert url_of(folder) is None
    for bad in ("s3://bucket/../x", "https://user:word@host/x", "s3://bucket/a?versionId=1", "s3://a//b", "gs://b/ x"):
        with pytest.raises(StoreError, match="expected an address such as"):
            url_of(bad)


@given(st.lists(st.text("abc.-_0", min_size=1, max_size=5), min_size=1, max_size=4))
def test_an_address_survives_being_a_path(parts: list[str]) -> None:
    url = "gs://" + "/".join(part for part in parts if part not in (".", "..")).strip("/")
    if url != "gs://":
        assert url_of(Path(url)) == url_of(url) == url
