"""Several writers at once: each in a place of its own, sharing the shards of a pass, while commit logs are folded now and then."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import SPECS, Made, answers, make_rows, pass_info, spec

from store import CorruptShard, FingerprintMismatch, Store, StoreBusy, StoreError, StoreWriter, commits, layout, leases, locks, writer
from store.commits import Commit, Logs
from store.shards import Seal
from store.verify import verify

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parents[1])])
SLOTS = 12
STATICS = {"1.query.bias": np.arange(8, dtype=np.uint16)}

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
    """A store of SLOTS slots with the pass ``bert`` and nothing of it yet."""
    made = make_rows(tmp_path / "store", [[(100, 9)]] * SLOTS)
    with StoreWriter.open(made.path) as store:
        store.add_pass("bert", pass_info(), STATICS)
    return made


def answer(store: StoreWriter, shard: int, seed: int = 0) -> None:
    rows = Store.open(store.path).rows
    lengths = rows.columns.length, rows.columns.labelled
    made = Made(store.path, [ROW for _ in lengths[0]])
    store.commit("bert", shard, answers(made, shard, SPECS, rows.columns.slot, seed))


ROW = type("Row", (), {"input_ids": np.zeros(100), "labelled": 9})()


def check(path: Path) -> None:
    """The store is whole, complete, and holds what ``answer`` gives."""
    assert verify(path) == []
    store = Store.open(path)
    assert store.complete("bert")
    wanted = Made(path, [ROW] * SLOTS)
    for shard in range(SLOTS):
        answers(wanted, shard, SPECS, np.arange(SLOTS))
    for feature in SPECS:
        for array, values in store.read(feature.feature.of("bert"), np.arange(SLOTS)).items():
            assert values.tobytes() == np.concatenate(wanted.values[feature.key, array]).tobytes()


def claims(path: Path) -> list[str]:
    return sorted(entry.name for entry in layout.claims(path, "bert").iterdir())


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


def test_folded_logs_say_the_same_and_writers_go_on_in_new_ones(rows: Made) -> None:
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        for shard in range(6):
            answer((one, other)[shard % 2], shard)
    reader, logs, before = Store.open(rows.path), Logs(rows.path), commits.replay(rows.path)["bert"]
    assert commits.compact(rows.path)
    assert not commits.compact(rows.path), "nothing new"
    names = sorted(file.name for file in (rows.path / "commits").iterdir() if file.suffix == ".log")
    assert names == ["table.log"]
    logs.refresh()
    for after in (commits.replay(rows.path)["bert"], logs.committed["bert"], reader.committed("bert")):
        assert {shard: commit.files for shard, commit in after.items()} == {shard: commit.files for shard, commit in before.items()}
    commits.drop(rows.path, commits.replay(rows.path)["bert"][3])
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        assert one.pending("bert") == [3, 6, 7, 8, 9, 10, 11]
        answer(other, 3)
        for shard in range(6, SLOTS):
            answer(one, shard)
    assert layout.log(rows.path, 0, 1).exists()
    check(rows.path)
    commits.drop(rows.path, commits.replay(rows.path)["bert"][3])
    assert sorted(set(range(SLOTS)) - commits.replay(rows.path)["bert"].keys()) == [3]
    assert commits.compact(rows.path)
    assert sorted(set(range(SLOTS)) - commits.replay(rows.path)["bert"].keys()) == [3]


def test_the_last_writer_of_a_complete_pass_folds_the_logs(rows: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FOLD", SLOTS)
    one, other = StoreWriter.open(rows.path), StoreWriter.open(rows.path)
    for shard in range(SLOTS):
        answer((one, other)[shard % 2], shard)
    one.close()
    assert not layout.commit_table(rows.path).exists()
    other.close()
    assert layout.commit_table(rows.path).exists()
    check(rows.path)


def test_a_damaged_table_is_an_error_that_repair_mends(rows: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.lines._MANY", 4)
    with StoreWriter.open(rows.path) as store:
        for shard in range(SLOTS):
            answer(store, shard)
    commits.compact(rows.path)
    table = layout.commit_table(rows.path)
    lines = table.read_bytes().splitlines(keepends=True)
    harms: list[tuple[list[bytes], list[int]]] = [
        ([*lines[:2], lines[2].replace(b'"shards": [4', b'"shards": [3'), lines[3]], [4, 5, 6, 7]),
        (lines[:3], [8, 9, 10, 11]),
        ([lines[0].replace(b"1", b"2"), *lines[1:]], []),
        ([], list(range(SLOTS))),
    ]
    for damaged, lost in harms:
        table.write_bytes(b"".join(damaged))
        with pytest.raises(CorruptShard, match=r"table.log: lines are missing or fail their checksum; mend it with: teacher-dump verify"):
            commits.replay(rows.path)
        assert commits.damage(rows.path).keys() == {table}
        commits.salvage(rows.path)
        assert commits.damage(rows.path) == {}
        assert sorted(set(range(SLOTS)) - commits.replay(rows.path).get("bert", {}).keys()) == lost
        commits.write(rows.path, [])
        table.write_bytes(b"".join(lines))


Step = tuple[str, int, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["commit", "drop"]), st.integers(0, 5), st.integers(0, 2)),
        st.just(("fold", 0, 0)),
    ),
    max_size=20,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logs_hold_what_was_committed_last_however_they_are_read(tmp_path_factory: pytest.TempPathFactory, steps: list[Step]) -> None:
    store = tmp_path_factory.mktemp("logs")
    (store / "commits").mkdir()
    logs, wanted = Logs(store), dict[int, tuple[Seal, int | None]]()
    for number, (what, shard, place) in enumerate(steps):
        if what == "commit" and shard not in wanted:
            wanted[shard] = Seal(number, shard), (None, 64, 128)[number % 3]
            files = {"hidden.1/all": wanted[shard][0], "final/first": Seal(1, 2)}
            commits.append(store, Commit("bert", shard, files, place, wanted[shard][1]))
        elif what == "drop" and shard in wanted:
            commits.drop(store, commits.replay(store)["bert"][shard])
            del wanted[shard]
        elif what == "fold":
            commits.compact(store)
        logs.refresh()
        for said in (logs.committed, commits.replay(store)):
            found = said.get("bert", {})
            assert {each: (commit.files["hidden.1/all"], commit.batch_tokens) for each, commit in found.items()} == wanted
            assert all(isinstance(commit, Commit) and commit.files["final/first"] == Seal(1, 2) for commit in found.values())


@pytest.mark.parametrize("damaged", [False, True])
def test_folding_that_is_killed_at_any_step_loses_nothing(rows: Made, damaged: bool) -> None:
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        for shard in range(8):
            answer((one, other)[shard % 2], shard)
    commits.compact(rows.path)
    with StoreWriter.open(rows.path) as one, StoreWriter.open(rows.path) as other:
        for shard in range(8, SLOTS):
            answer((one, other)[shard % 2], shard)
    if damaged:  # a line of the first log, not the last
        log = layout.log(rows.path, 0, 1)
        log.write_bytes(b"0" * 8 + log.read_bytes()[8:])
    known = commits.replay(rows.path, damaged=True)["bert"]
    assert len(known) == SLOTS - damaged
    for step in range(100):
        path = shutil.copytree(rows.path, rows.path.with_name(f"step-{step}"))
        change = commits.salvage if damaged else commits.compact
        child = os.fork()
        if not child:
            try:
                die_at(step)
                change(path)
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for _ in range(2):
            now = commits.replay(path, damaged=True)["bert"]
            assert {shard: commit.files for shard, commit in now.items()} == {shard: commit.files for shard, commit in known.items()}
            change(path)
        commits.compact(path)
        assert commits.damage(path) == {}
        assert [file.name for file in (path / "commits").iterdir() if file.suffix in (".log", ".tmp")] == ["table.log"]
        if not killed:
            break
    assert step > 5


def die_at(step: int) -> None:
    """Meet SIGKILL before change number ``step`` to any file."""
    left = iter(range(step))
    opened = os.open

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object, **options: object) -> object:
            writes = change is not opened or int(str(arguments[1])) & (os.O_WRONLY | os.O_RDWR)
            if writes and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    for name in ("open", "link", "replace", "rename", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
