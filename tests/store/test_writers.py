"""Several writers at once: each in a place of its own, sharing the shards of a pass."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_store import Made, make_rows, pass_info, spec
from twelve_slots import SLOTS, STATICS, answer, check, claims, unanswered

from store import FingerprintMismatch, Store, StoreBusy, StoreError, StoreWriter, commits, layout, leases, locks
from store.commits import Logs
from store.verify import verify

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1])])

CLAIMS = """
import sys
from pathlib import Path
from small_store import *
with StoreWriter.open(Path(sys.argv[1])) as writer:
    print(writer.claim("bert", 3), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def rows(tmp_path: Path) -> Made:
    return unanswered(tmp_path / "store")


def test_writers_share_the_shards_of_a_pass_and_hear_of_each_other(rows: Made) -> None:
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        taken: dict[StoreWriter, list[int]] = {one: [], other: []}
        sources = {one: one.shards("bert"), other: other.shards("bert")}
        for store in [one, other, other] * 4:
            answer(store, shard := next(sources[store]))
            taken[store].append(shard)
            assert one.pending("bert") == other.pending("bert")
        assert sorted(taken[one] + taken[other]) == list(range(SLOTS))
        assert [next(source, None) for source in sources.values()] == [None, None]
        assert claims(rows.path) == []
    by_log = {0: set(taken[one]), 1: set(taken[other])}
    for commit in commits.replay(rows.path)["bert"].values():
        assert commit.shard in by_log[commit.writer]
    check(rows.path)


def test_a_writer_takes_the_lowest_free_place_and_goes_on_with_its_log(rows: Made) -> None:
    first, second = StoreWriter.open(rows.path), StoreWriter.open(rows.path)
    answer(second, 5)  # although nothing is in the first log yet
    assert sorted(commits.replay(rows.path)["bert"]) == [5]
    answer(first, 6)
    first.close()
    third = StoreWriter.open(rows.path)
    answer(third, 7)
    second.close()
    third.close()
    lines = [layout.log(rows.path, number).read_text().splitlines() for number in (0, 1)]
    assert [[int(line.partition('"shard": ')[2].partition(",")[0]) for line in log] for log in lines] == [[6, 7], [5]]
    assert not layout.log(rows.path, 2).exists()


def test_who_holds_the_store_is_named(rows: Made) -> None:
    me = rf"another process \({os.getpid()} on \S+\) is writing to .*; wait for it to end, or stop it"
    with StoreWriter.open(rows.path) as store, StoreWriter.open(rows.path):
        assert store.others() == [pytest.approx(store.others()[0])]
        with pytest.raises(StoreBusy, match=me), commits.exclusive(rows.path):
            pass
        assert Store.open(rows.path).committed("bert") == {}  # readers do not mind
    with commits.exclusive(rows.path):
        with pytest.raises(StoreBusy, match=me):
            StoreWriter.open(rows.path)
        with pytest.raises(StoreBusy, match=me), commits.exclusive(rows.path):
            pass
    StoreWriter.open(rows.path).close()


def test_who_holds_the_store_for_a_moment_is_waited_for(rows: Made) -> None:
    held, opened = threading.Event(), threading.Event()

    def fold() -> None:
        with commits.exclusive(rows.path, brief=True):
            held.set()
            time.sleep(2 * locks.PATIENCE)
            assert not opened.is_set()

    thread = threading.Thread(target=fold)
    thread.start()
    held.wait()
    StoreWriter.open(rows.path).close()
    opened.set()
    thread.join()


def test_a_lock_that_is_a_link_is_refused(rows: Made, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for lock in (layout.lock(rows.path, 0), layout.store_lock(rows.path)):
        lock.unlink()
        lock.symlink_to(tmp_path / "precious")
        with pytest.raises(StoreError, match="expected a plain file, found a link"):
            StoreWriter.open(rows.path)
        lock.unlink()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_line_that_another_is_still_writing_is_heard_once_it_is_whole(rows: Made) -> None:
    log = layout.log(rows.path, 0)
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        answer(one, 0)
        answer(one, 1)
        whole = log.read_bytes()
        for kept in (len(whole) - 1, len(whole) - 9, len(whole.splitlines(keepends=True)[0]) + 1):
            log.write_bytes(whole[:kept])
            logs = Logs(rows.path)
            assert sorted(logs.committed["bert"]) == [0]
            log.write_bytes(whole)
            logs.refresh()
            assert sorted(logs.committed["bert"]) == [0, 1]
        assert other.pending("bert") == list(range(2, SLOTS))


def test_all_writers_may_announce_one_pass_at_once(tmp_path: Path) -> None:
    made = make_rows(tmp_path / "store", [[(100, 9)]] * SLOTS)
    failed = []

    def announce(name: str) -> None:
        try:
            with StoreWriter.open(made.path) as store:
                for each in ("bert", name):
                    store.add_pass(each, pass_info(), STATICS)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=announce, args=(f"pass{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(Store.open(made.path).manifest.passes) == ["bert", *(f"pass{number}" for number in range(6))]
    assert verify(made.path) == []


def test_a_pass_does_not_give_way_while_another_writer_may_be_at_it(rows: Made) -> None:
    changed = pass_info((spec("final@first"),))
    with StoreWriter.open(rows.path) as store:
        with StoreWriter.open(rows.path) as other:
            with pytest.raises(StoreBusy, match=rf"another features: .* wait until another process \({os.getpid()} on .*\) has ended"):
                store.add_pass("bert", changed, STATICS)
            answer(other, 0)
        with pytest.raises(FingerprintMismatch, match="another features"):
            store.add_pass("bert", changed, STATICS)


def test_claims_of_a_killed_writer_go_to_others_and_those_of_a_live_one_do_not(rows: Made) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(rows.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "[0, 1, 2]\n"
    with StoreWriter.open(rows.path) as store:
        assert store.claim("bert", 2) == [3, 4]
        with pytest.raises(StoreBusy, match="another process works on shard 1"):
            answer(store, 1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert store.claim("bert", 5) == [0, 1, 2, 5, 6]
        assert claims(rows.path) == ["0.2", "1.2", "2.2", "3.1", "4.1", "5.1", "6.1"]
        for shard in range(SLOTS):
            answer(store, shard)
        assert claims(rows.path) == []
    check(rows.path)


def test_a_writer_forgets_the_claims_of_the_one_that_had_its_place_before(rows: Made) -> None:
    first = StoreWriter.open(rows.path)
    first.claim("bert", 2)
    first._lock.close()  # as the end of its process does
    with StoreWriter.open(rows.path):
        assert claims(rows.path) == []


def test_a_writer_that_hangs_loses_its_claims_and_cannot_publish_any_more(rows: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.2)
    monkeypatch.setattr(leases, "RENEW", 1000.0)
    with StoreWriter.open(rows.path) as hung, StoreWriter.open(rows.path) as other:
        assert hung.claim("bert", 2) == [0, 1]
        assert other.claim("bert", 1) == [2]
        time.sleep(0.3)
        with hung._leases.publishing("bert", 1):  # it hangs while it commits: who knows how far it is
            assert other.claim("bert", 1) == [3]
        assert other.claim("bert", 1) == [0]
        answer(other, 0)
        before = (rows.path / "bert/hidden.1/all/c.0.0").stat()
        for _ in range(2):
            with pytest.raises(StoreError, match=r"shard 0 of pass bert (was taken over|is committed already)"):
                answer(hung, 0, seed=1)
        assert (rows.path / "bert/hidden.1/all/c.0.0").stat() == before
        assert other.claim("bert", 1) == [1]
        with pytest.raises(StoreBusy, match=r"shard 1 of pass bert was taken over by another process, because this one had not renewed"):
            answer(hung, 1, seed=1)
        assert not (rows.path / "bert/hidden.1/all/c.1.0").exists()
        assert not list(rows.path.rglob("*.tmp"))
        for shard in range(1, SLOTS):
            answer(other, shard)
    check(rows.path)


def test_a_writer_that_works_long_keeps_its_claims(rows: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.5)
    monkeypatch.setattr(leases, "RENEW", 0.05)
    with StoreWriter.open(rows.path) as slow, StoreWriter.open(rows.path) as other:
        slow.claim("bert", 1)
        for number in range(1, 5):
            assert other.claim("bert", 1) == [number]
            time.sleep(0.25)
        answer(slow, 0)


def test_of_many_takers_one_wins_each_shard(rows: Made) -> None:
    hung = StoreWriter.open(rows.path)
    hung.claim("bert", SLOTS)
    stores = [StoreWriter.open(rows.path) for _ in range(4)]
    hung._lock.close()  # as the end of its process does
    won: list[int] = []

    def take(store: StoreWriter) -> None:
        while shards := store.claim("bert", 1):
            won.extend(shards)

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(SLOTS))
    for store in stores:
        store.close()


def test_a_taker_that_was_killed_half_way_leaves_a_shard_to_the_next(rows: Made) -> None:
    with StoreWriter.open(rows.path) as first:
        first.claim("bert", 1)
        second = StoreWriter.open(rows.path)
        os.link(layout.lock(rows.path, 1), layout.claims(rows.path, "bert") / "0.2")  # and no more: the first claim is still there
        with pytest.raises(StoreBusy, match="was taken over"):
            answer(first, 0)
        second._lock.close()  # as the end of its process does
        assert first.claim("bert", 1) == [0]
        assert claims(rows.path) == ["0.3"]
        answer(first, 0)
