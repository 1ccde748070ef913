"""The cache of remote stores: its limit, its damages, and those who share it."""

from pathlib import Path

import numpy as np
import pytest
from object_storage import Proxy, check_same, process, put
from small_store import SPECS, Made, make_store

from store import FeatureKey, Store, StoreError, cache, mirror
from store.cache import Cache

READER = """
import sys
import numpy as np
from store import Store
from store.features import FeatureKey
store, local = Store.open(sys.argv[1]), Store.open(sys.argv[2])
keys = [spec.feature.of("bert") for spec in local.manifest.passes["bert"].features]
print("ready", flush=True)
sys.stdin.readline()
chance = np.random.default_rng(int(sys.argv[3]))
for _ in range(5):
    rows = chance.integers(0, len(local.rows), 4)
    found, wanted = store.read_all(keys, rows), local.read_all(keys, rows)
    assert all(found[key][name].tobytes() == values.tobytes() for key in keys for name, values in wanted[key].items())
    assert np.array_equal(store.tokens("input_ids", rows), local.tokens("input_ids", rows))
print("same", flush=True)
"""


def test_a_cache_stays_within_its_limit(tmp_path: Path, url: str, s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "store", [[(128, 9)]] * 12, SPECS[:2])
    put(made.path, url, s3)
    monkeypatch.setenv(cache.SIZE, "20KB")
    monkeypatch.setattr(mirror, "NOTE_SECONDS", 0.0)
    store, local, chance = Store.open(url), Store.open(made.path), np.random.default_rng(0)

    def taken() -> int:
        files = [path for path in store.path.rglob("*") if path.is_file() and path.parent.name != "commits"]
        return sum(path.stat().st_size for path in files if path.name != "manifest.json")

    for _ in range(8):
        rows = chance.integers(0, len(local.rows), 3)
        check_same(store, local, rows)
        assert taken() <= 20_000
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert not [line for line in maps if str(store.path) in line and line.endswith("(deleted)")]
    assert taken() > 10_000
    monkeypatch.setenv(cache.SIZE, "10KB")
    Store.open(url)
    assert taken() <= 10_000


def test_files_in_use_are_kept_longest(tmp_path: Path, url: str, s3: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "store", [[(128, 9)]] * 12, SPECS[:1])
    put(made.path, url, s3)
    monkeypatch.setenv(cache.SIZE, "25KB")
    monkeypatch.setattr(mirror, "NOTE_SECONDS", 0.0)
    store, key = Store.open(url), FeatureKey.parse("bert/hidden.1@all")
    for row in range(1, 12):
        store.read(key, np.array([0]))
        store.read(key, np.array([row]))
    assert proxy.asked["GET", "stores/one/bert/hidden.1/all/c.0.0"] == 1


def test_a_cache_that_is_too_small_says_so(local: Made, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.SIZE, "2KB")
    with pytest.raises(StoreError, match=r"may hold 2,000 bytes.*set TEACHERCACHE_CACHE_SIZE to more"):
        check_same(Store.open(there), Store.open(local.path))


def test_files_of_killed_processes_do_not_fill_the_cache(tmp_path: Path) -> None:
    kept = Cache(tmp_path, 1000)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x").mkdir()
    (tmp_path / "s" / "x" / ".c.0.0.0.tmp").write_bytes(bytes(900))
    kept.reserve(0)
    kept.reserve(1001 - 900)
    assert kept.reserve(950) == set()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_damaged_files_of_the_cache_are_read_again(local: Made, there: str, proxy: Proxy, how: str) -> None:
    def use(store: Store) -> None:
        check_same(store, stored)
        store.statics("bert")
        store.rows.about(0)
        assert (store.shipped("bert") / "config.json").read_text() == "{}"

    def damaged(data: bytes) -> bytes:
        at = len(data) // 3
        return data[:-1] if how == "cut" else data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :]

    stored, store = Store.open(local.path), Store.open(there)
    use(store)
    names = ("bert/hidden.1/all/c.2.0", "tokens/input_ids/c.1", "rows/numbers/c.0.0", "rows/part-00000.parquet")
    names = (*names, "static/bert/1.query.bias/c.0", "model/bert/config.json")
    whole = {name: (store.path / name).read_bytes() for name in names}
    for name, data in whole.items():
        (store.path / name).unlink()
        (store.path / name).write_bytes(damaged(data))
    proxy.asked.clear()
    use(Store.open(there))
    for name, data in whole.items():
        assert (store.path / name).read_bytes() == data
        assert proxy.asked["GET", f"stores/one/{name}"] == 1


@pytest.mark.parametrize("limit", ["1GB", "15KB"])
def test_two_processes_share_a_cache(tmp_path: Path, url: str, s3: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    made = make_store(tmp_path / "store", [[(128, 9)]] * 8, SPECS[:2])
    put(made.path, url, s3)
    monkeypatch.setenv(cache.SIZE, limit)
    readers = [process(READER, url, made.path, seed) for seed in range(2)]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        proxy.asked.clear()
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
        assert [reader.communicate(timeout=60)[0] for reader in readers] == ["same\n", "same\n"]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    if limit == "1GB":
        assert set(proxy.asked.values()) == {1}  # each file once for both
    total = int((tmp_path / "cache" / "total.lock").read_text())
    assert total <= Cache.from_environment().most
