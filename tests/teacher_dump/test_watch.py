"""What a run says of itself is what it did: events, log, bar, figures for Prometheus, a stalled disk."""

import json
import os
import pty
import re
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tiny_dump import Outcome, Tree, World
from torch.utils.flop_counter import FlopCounterMode

from online.collate import collate
from online.replica import joined
from store import layout, locks
from store.provenance import provenance
from store.reader import Store
from store.writer import StoreWriter
from teacher_dump import dump, progress, watch
from teacher_dump.batches import cut, padding, rows_of
from teacher_dump.mfu import counting
from teacher_dump.progress import Answered, Speed
from teacher_dump.recipe import DumpRecipe, load
from teacher_dump.teacher import load_pass

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]
Event = dict[str, Any]


def events_of(store: Path, rank: int = 0) -> list[Event]:
    """The events of the last run over ``store``."""
    file = max((store.parent / f"{store.name}.logs").glob(f"*/*-rank{rank}*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(line) for line in file.read_text().splitlines()]


def of_kind(events: list[Event], kind: str) -> list[dict[str, Any]]:
    return [event["facts"] for event in events if event["kind"] == kind]


def padded(store: Store) -> int:
    """Tokens of all rows, each with its padding to a multiple of 16."""
    return sum(-(-int(length) // 16) * 16 for length in store.rows.columns.length)


def test_the_events_of_a_run_are_what_the_store_holds(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    recipe = write(masked_recipe)
    done = teacher_dump("run", recipe)
    assert done.code == 0, done.err
    store = Store.open(Path(masked_recipe["store"]))
    events = events_of(store.path)
    for event in events:
        assert event.keys() == {"time", "rank", "host", "pid", "kind", "facts"}
        assert (event["rank"], event["pid"]) == (0, os.getpid())
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    (start,), (answering,), (end,) = (of_kind(events, kind) for kind in ("start", "answering", "end"))
    assert DumpRecipe.model_validate(start["recipe"]) == load(recipe, ["sharding.kind=none"])
    assert start["versions"]["torch"] == torch.__version__
    assert start["world"] == {"ranks": 1, "replica": 0, "replica_rank": 0, "replica_size": 1, "local_rank": 0}
    assert (answering["batch_tokens"], answering["shards"], answering["device"]) == (256, store.manifest.rows.slots, "cpu")
    sizes = {shard: sum(seal.size for seal in commit.files.values()) for shard, commit in store.committed("bert").items()}
    assert {fact["shard"]: fact["bytes"] for fact in of_kind(events, "shard_committed")} == sizes
    assert {fact["shard"] for fact in of_kind(events, "shard_begun")} == set(sizes)
    assert end["ended"] == "done"
    assert (end["rows"], end["tokens"]) == (len(store.rows), store.manifest.rows.tokens)
    assert (end["shards"], end["bytes"]) == (len(sizes), sum(sizes.values()))
    assert end["padded_tokens"] == padded(store)
    assert 0 <= end["disk_wait"] <= end["seconds"] < 60
    assert end["mfu"] is None, "the peak of this machine is not known"
    added = padded(store) / store.manifest.rows.tokens - 1
    assert padding(store.rows, range(store.manifest.rows.slots)) == pytest.approx(added)
    assert f"padding added {added:.1%} tokens" in done.out
    log = next((store.path.parent / "store.logs" / "bert").glob("*-rank0.log")).read_text()
    assert "INFO teacher_dump.watch: done" in log


def test_the_prometheus_file_agrees_with_the_events(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    folder = tmp_path / "collected" / "here"
    assert teacher_dump("run", write(masked_recipe), f"prometheus={folder}").code == 0
    (end,) = of_kind(events_of(Path(masked_recipe["store"])), "end")
    (file,) = folder.iterdir()
    assert file.name == "teacher-dump-store-bert-rank0.prom"
    samples = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels == {"store": masked_recipe["store"], "pass": "bert", "rank": "0"}
            samples[sample.name.removeprefix("teachercache_dump_")] = sample.value
    slots = Store.open(Path(masked_recipe["store"])).manifest.rows.slots
    assert samples["rows_total"] == end["rows"]
    assert samples["tokens_total"] == end["tokens"]
    assert samples["padded_tokens_total"] == end["padded_tokens"]
    assert samples["committed_shards_total"] == samples["pass_shards"] == samples["pass_committed_shards"] == end["shards"] == slots
    assert samples["written_bytes_total"] == end["bytes"]
    assert samples["running"] == samples["queue_bytes"] == 0
    assert samples["disk_wait_seconds_total"] <= samples["answering_seconds_total"]
    assert "mfu_ratio" not in samples


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Outcome]) -> tuple[Outcome, str]:
    """What ``run`` returns, and what it shows on a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # closed
                return
            shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patched, os.fdopen(theirs, "w") as terminal:
        patched.setattr(sys, "stderr", terminal)
        outcome = run()
    reader.join(10)
    os.close(ours)
    return outcome, shown.decode()


def test_the_bar_shows_speed_time_left_and_the_queue(
    masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(masked_recipe)
    done, shown = on_a_terminal(monkeypatch, lambda: teacher_dump("run", recipe))
    assert done.code == 0
    slots = Store.open(Path(masked_recipe["store"])).manifest.rows.slots
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    pattern = (
        rf"bert 100%\|█+\| {slots} of {slots} shards, ETA 0 s, [\d,]+ rows/s, [\d,]+ tokens/s, [\d.]+ MB/s, "
        r"queue 0%, waited \d+ s for the disk"
    )
    assert re.search(pattern, last), shown
    assert not re.search(r" 0 rows/s| 0 tokens/s", last)


def test_where_there_is_no_terminal_progress_is_lines(
    masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE", 0.0)
    done = teacher_dump("run", write(masked_recipe))
    slots = Store.open(Path(masked_recipe["store"])).manifest.rows.slots
    assert re.search(rf"^bert 100%, {slots} of {slots} shards, ETA 0 s, [\d,]+ rows/s, [\d,]+ tokens/s, ", done.err, re.M), done.err
    assert "\r" not in done.err.partition("bert ")[2]


def test_another_rank_has_logs_of_its_own_and_no_bar(
    masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(masked_recipe)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    done, shown = on_a_terminal(monkeypatch, lambda: teacher_dump("run", recipe))
    assert done.code == 0
    assert "tokens/s" not in shown
    events = events_of(Path(masked_recipe["store"]), rank=1)
    assert of_kind(events, "start")[0]["world"]["ranks"] == 2
    assert of_kind(events, "end")[0]["rows"] == len(Store.open(Path(masked_recipe["store"])).rows)


@contextmanager
def stalled(store: Path, until: Callable[[], bool]) -> Iterator[None]:
    """Nothing can be committed to ``store``, whose rows are built, until something is so (or a minute is over)."""
    held = threading.Event()

    def hold() -> None:
        """Keep the lock that a commit takes."""
        with locks.turn(store, layout.turn_lock(store, 0)):
            held.set()
            stop = time.monotonic() + 60
            while time.monotonic() < stop and not until():
                time.sleep(0.05)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    try:
        yield
    finally:
        holder.join()


def happened(store: Path, kind: str) -> int:
    """How many events of a kind there are so far."""
    files = (store.parent / f"{store.name}.logs").rglob("*.jsonl")
    return sum(file.read_text().count(f'"kind": "{kind}"') for file in files)


def test_a_disk_that_stalls_is_told_of_while_it_is_waited_for(
    masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path = write(masked_recipe), Path(masked_recipe["store"])
    assert teacher_dump("rows", recipe).code == 0
    monkeypatch.setattr(watch, "STALL", 0.3)
    monkeypatch.setattr(watch, "TICK", 0.05)
    monkeypatch.setattr(watch, "LONG_WAIT", 0.2)
    with stalled(path, lambda: happened(path, "disk_stall") >= 2):
        done = teacher_dump("run", recipe)
    assert done.code == 0, done.err
    events = events_of(path)
    stalls, waits, (end,) = of_kind(events, "disk_stall"), of_kind(events, "disk_wait"), of_kind(events, "end")
    assert len(stalls) >= 2, "it is told of again"
    assert all(stall["path"] == str(path) and stall["seconds"] >= 0.3 for stall in stalls)
    assert 0.2 < sum(wait["seconds"] for wait in waits) <= end["disk_wait"] + 0.01
    told = rf"the disk has not taken shard {stalls[0]['shard']} for \d+ s \({path}\)"
    assert re.search(told, done.err)
    assert re.search(f"WARNING teacher_dump.watch: {told}", next(path.parent.rglob("*-rank0.log")).read_text())
    assert Store.open(path).complete("bert")


def test_a_run_that_is_asked_to_stop_says_so(masked_recipe: Tree, write: Write, teacher_dump: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, path = write(masked_recipe), Path(masked_recipe["store"])
    assert teacher_dump("rows", recipe).code == 0
    monkeypatch.setattr(watch, "TICK", 0.05)

    def asked() -> bool:
        if happened(path, "shard_begun") and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return happened(path, "stop_asked") > 0

    sent: list[None] = []
    with stalled(path, asked):
        done = teacher_dump("run", recipe)
    assert done.code == 143
    assert "asked to stop: finishing the shards that can be finished in time" in done.err
    events = events_of(path)
    assert [event["kind"] for event in events].count("stop_asked") == 1
    assert of_kind(events, "end")[0]["ended"] == "stopped"
    assert len(of_kind(events, "shard_committed")) == len(Store.open(path).committed("bert")) < Store.open(path).manifest.rows.slots


def test_a_run_that_fails_says_why_in_its_events(
    world: World, masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe = write(masked_recipe)
    assert teacher_dump("run", recipe, f"teacher.model={world.other}").code == 0
    done = teacher_dump("run", recipe)
    assert done.code == 2
    events = events_of(Path(masked_recipe["store"]))
    (error,), (end,) = of_kind(events, "error"), of_kind(events, "end")
    assert error["type"] == "FingerprintMismatch"
    assert f"error: {error['message']}\n" in done.err
    assert (end["ended"], end["rows"]) == ("failed", 0)
    logs = sorted((tmp_path / "store.logs" / "bert").glob("*.log"), key=lambda file: file.stat().st_mtime_ns)
    assert "Traceback" in logs[-1].read_text()
    assert "Traceback" not in done.err


def test_logs_go_where_the_recipe_says_and_are_never_the_end_of_a_run(
    masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe, store = write(masked_recipe), Path(masked_recipe["store"])
    assert teacher_dump("run", recipe, f"logs={tmp_path / 'elsewhere'}").code == 0
    assert not (tmp_path / "store.logs").exists()
    assert {file.suffix for file in (tmp_path / "elsewhere").iterdir()} == {".jsonl", ".log"}
    (tmp_path / "store.logs").write_text("in the way")
    refused = teacher_dump("run", recipe, f"logs={tmp_path / 'store.logs'}")
    assert refused.code == 2
    assert "give another folder, as in logs=FOLDER" in refused.err
    masked_recipe |= {"pass_name": "again"}
    done = teacher_dump("run", write(masked_recipe))
    assert done.code == 0
    assert "no logs: cannot write logs to" in done.err
    assert Store.open(store).complete("again")


def test_operations_of_a_batch_are_those_that_torch_counts(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    masked_recipe["features"] = ["lm_logits@masked:top8", "lm_logits@first:top2", "hidden.1@all"]
    masked_recipe["rows"]["slot_tokens"] = 4096  # fewer than 16 tokens are filled up for the head
    path = write(masked_recipe)
    assert teacher_dump("rows", path).code == 0
    recipe = load(path)
    _, requests = dump.requested(recipe)
    with StoreWriter.open(recipe.store) as writer, joined(1, False) as replica:
        teacher = load_pass(recipe, requests, writer.rows, provenance(()), replica)
    teacher.loaded.model.set_attn_implementation("eager")  # torch does not count the CPU's fused attention
    store = Store.open(recipe.store)
    work = counting(teacher, 1e12)
    for members in cut(store.rows, rows_of(store.rows, 0), 1024):
        assert min(len(members), int(collate(store, members).labelled.sum())) >= 16
        with FlopCounterMode(display=False) as counter:
            teacher.answer(collate(store, members))
        assert work.operations(store.rows, members) == counter.get_total_flops()


def test_speed_is_that_of_the_last_minutes_or_of_the_whole_run_while_shards_take_longer() -> None:
    now = 0.0
    speed = Speed(lambda: now)

    def after(seconds: int, per_second: Answered) -> tuple[float, float, float]:
        """What the speed is when an amount has grown for so long, looked at each second."""
        nonlocal now, amount
        for _ in range(seconds):
            now += 1
            amount = Answered(*(count + more for count, more in zip(amount, per_second, strict=True)))
            found = speed.per_second(amount)
        return found

    amount = Answered(100, 1000, 0)
    assert speed.per_second(amount) == (0, 0, 0)
    assert after(1000, Answered(1, 20, 0)) == pytest.approx((1, 20, 0))
    assert after(400, Answered(0, 0, 0)) == pytest.approx((1000 / 1400, 20000 / 1400, 0))
    assert after(301, Answered(3, 0, 0))[0] == pytest.approx(3)


def test_two_jobs_that_start_together_keep_their_logs_apart(masked_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe = write(masked_recipe)
    for _ in range(2):
        assert teacher_dump("run", recipe, f"logs={tmp_path / 'logs'}").code == 0
    assert len(list((tmp_path / "logs").glob("*.jsonl"))) == 2
