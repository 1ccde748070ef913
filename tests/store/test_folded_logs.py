"""Commit logs that are folded into a table now and then say the same as before, whoever writes or is killed meanwhile."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import Made
from twelve_slots import SLOTS, answer, check, unanswered

from store import CorruptShard, Store, StoreWriter, commits, layout, writer
from store.commits import Commit, Logs
from store.shards import Seal


@pytest.fixture
def rows(tmp_path: Path) -> Made:
    return unanswered(tmp_path / "store")


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
