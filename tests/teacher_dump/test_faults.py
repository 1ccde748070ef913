"""Whatever breaks while a teacher is run: the store stays valid, the message says what and where, and the next run completes it."""

import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from disks import Gate, Point, before, fill, injected, make_room, on_small_disk
from fault_drill import PASS, RARE, SHARDED, TOLERANCE, WHOLE, Drill, Files, Launch, largest_difference, make_recipe, slow_disk
from jobs import Job, start, until
from tiny_dump import VOCAB, make_tokenizer, stored_bytes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from store import building, commits, hierarchy, leases, publish, writer
from store.reader import Store
from store.verify import verify
from teacher_dump import answering, dump

ALONE = Launch(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    """The store that every dump of the recipe must end as."""
    store = recipe.with_name("undisturbed")
    job = run(recipe, store)
    assert job.codes() == [0], job.said()
    return store


def run(recipe: Path, store: Path, launch: Launch = ALONE, *overrides: str, prepare: Callable[[int], None] | None = None) -> Job:
    """Start a job; what it says lies beside its store."""
    said = store.with_name(f"{store.name}.said-{sum(1 for _ in store.parent.glob(f'{store.name}.said-*'))}")
    return start(recipe, launch.ranks, said, [f"store={store}", *launch.overrides, *overrides], replica=launch.size, prepare=prepare)


def fails(job: Job, *said: str) -> None:
    """Every rank ends with one message that holds all of ``said``."""
    assert set(job.codes()) == {2}, job.said()
    for rank in job.ranks:
        for word in said:
            assert word in rank.text, job.said()
        assert rank.text.count("error: ") == 1, job.said()
        assert "Traceback" not in rank.text, job.said()


def completes(recipe: Path, store: Path, undisturbed: Path) -> None:
    """What is there is sound, and the next run makes the undisturbed store of it."""
    if (store / "manifest.json").exists():
        assert verify(store) == []
    job = run(recipe, store)
    assert job.codes() == [0], job.said()
    assert verify(store) == []
    assert stored_bytes(store) == stored_bytes(undisturbed)
    assert not list(store.rglob("*.tmp"))


@pytest.mark.slow
def test_ranks_that_are_killed_at_random_leave_a_store_that_any_number_of_ranks_completes(recipe: Path, tmp_path: Path) -> None:
    drill = Drill(tmp_path, recipe, random.Random(11), WHOLE)
    drill.run(12)
    assert drill.seen["kills"] >= 12
    assert drill.seen["stores equal to the bit"] == drill.seen["stores"] >= 1


@pytest.mark.slow
def test_the_other_ranks_of_a_teacher_end_when_one_is_killed_and_ranks_sharded_in_another_way_go_on(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    drill, store = Drill(tmp_path, recipe, random.Random(0), SHARDED), tmp_path / "store"
    known: Files = {}
    for number, kind in enumerate(("zero3", "fsdp", "tp")):
        job = run(recipe, store, Launch(2, kind, 2), prepare=lambda rank: slow_disk(0.05))
        while job.alive and len(drill.check(store, known)) == len(known):
            time.sleep(0.01)
        killed, other = job.ranks[number % 2], job.ranks[1 - number % 2]
        assert killed.kill(), job.said()
        assert other.code(within=20) == 2, job.said()
        assert "another rank of this run is gone" in other.text, job.said()
        assert "Traceback" not in other.text, job.said()
        known = drill.check(store, known)
    job = run(recipe, store, Launch(3))
    assert job.codes() == [0, 0, 0], job.said()
    assert len(drill.check(store, known)) > len(known)
    assert largest_difference(store, undisturbed) <= TOLERANCE


FULL: dict[str, tuple[Point, ...]] = {
    "a slot of the rows": ((building, "write_slot", 7),),
    "the table of the rows": ((building.pq, "write_table", 0),),
    "the manifest of the rows": ((hierarchy, "write", 0),),
    "a weight": ((writer, "write_statics", 0),),
    "what ships": ((dump, "ship", 0),),
    "the tokenizer that ships": ((dump, "ship", 0), (PreTrainedTokenizerBase, "save_pretrained", 0)),
    "the manifest of the pass": ((hierarchy, "write", 1),),
    "a shard": ((writer, "write_slot", 9),),
    "a commit line": ((commits, "append", 0),),
}


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_stops_the_dump_and_harms_nothing(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    def body(disk: Path) -> None:
        for number, (what, points) in enumerate(FULL.items()):

            def prepare(rank: int, points: tuple[Point, ...] = points) -> None:
                dump.RESERVE = 0
                before(points, lambda: fill(disk))

            store = disk / f"store-{number}"
            job = start(recipe, 1, tmp_path / what, [f"store={store}"], prepare=prepare)
            fails(job, "No space left on device", str(store), "make room")
            make_room(disk)
            dump.RESERVE = 0
            completes(recipe, store, undisturbed)

    on_small_disk(tmp_path / "disk", 16 << 20, body)


BROKEN: dict[str, tuple[Point, str, str, str]] = {
    "rows": ((building, "write_slot", 3), "fsync", "error=EIO", "/c.1: Input/output error"),
    "data of a shard": ((writer, "write_slot", 9), "write", "error=EIO", "/c.3.0: Input/output error"),
    "data made durable": ((writer, "write_slot", 9), "fsync", "error=EIO", "/c.3.0: Input/output error"),
    "a file made": ((writer, "write_slot", 9), "openat", "error=EMFILE", "/c.3.0: Too many open files"),
    "a name": ((publish, "_name", 2), "link,linkat", "error=EIO", ".0: Input/output error"),
    "a commit line": ((commits, "append", 1), "write", "error=EIO", "/commits/0.log: Input/output error"),
    "a commit line made durable": ((commits, "append", 1), "fsync", "error=EIO", "/commits/0.log: Input/output error"),
    "a lock": ((writer, "write_slot", 9), "flock", "error=ENOLCK", ".lock: No locks available"),
    "the manifest": ((hierarchy, "write", 1), "rename,renameat,renameat2", "error=EROFS", ".json: Read-only file system"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_file_system_that_fails_stops_the_dump_and_harms_nothing(recipe: Path, undisturbed: Path, tmp_path: Path, what: str) -> None:
    point, calls, fault, message = BROKEN[what]
    store, gate = tmp_path / "store", Gate()
    job = run(recipe, store, prepare=lambda rank: before([point], gate.hold))
    gate.reached()
    paths = [store / "commits" / "0.log", *(store / PASS / f"hidden.{layer}" / "all" / ".c.3.0.0.tmp" for layer in range(3))]
    with injected(job.ranks[0].pid, calls, f"{fault}:when=1", paths if calls in ("write", "openat") else ()):
        gate.open()
        fails(job, str(store), message)
    completes(recipe, store, undisturbed)


def stop() -> None:
    """Stop this process until it is told to go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)  # the thread that asks for it goes on until the others have stopped


def first_meets(points: Sequence[Point], act: Callable[[], None], expires: float) -> Callable[[int], None]:
    """Prepares two ranks whose claims hold for so long: ``act`` befalls the first at ``points``, and only then the second begins."""
    met = multiprocessing.get_context("fork").Event()

    def meet() -> None:
        met.set()
        act()

    def prepare(rank: int) -> None:
        leases.EXPIRES, leases.RENEW = expires, expires / 10
        if rank == 0:
            before(points, meet)
        else:
            met.wait()

    return prepare


@pytest.mark.slow
def test_a_disk_that_stalls_longer_than_claims_hold_costs_time_alone(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    points, store, begun = [(writer, "write_slot", 4), (os, "fsync", 0)], tmp_path / "store", time.monotonic()
    job = run(recipe, store, Launch(2), prepare=first_meets(points, lambda: time.sleep(4), expires=1.5))
    assert job.codes() == [0, 0], job.said()
    assert time.monotonic() - begun > 4
    assert stored_bytes(store) == stored_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("publishing", [False, True])
def test_a_rank_that_was_stopped_for_too_long_cannot_overwrite(recipe: Path, undisturbed: Path, tmp_path: Path, publishing: bool) -> None:
    point, store = (commits, "append", 1) if publishing else (writer, "write_slot", 9), tmp_path / "store"
    job = run(recipe, store, Launch(2), prepare=first_meets([point], stop, expires=1))
    stopped, other = job.ranks
    assert until(lambda: stopped.state == "T"), job.said()
    if publishing:  # nobody can tell what it would still do
        time.sleep(3)
        assert other.alive, job.said()
        os.kill(stopped.pid, signal.SIGCONT)
        assert job.codes() == [0, 0], job.said()
    else:
        assert other.code() == 0, job.said()
        done = stored_bytes(store)
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.code() == 2, job.said()
        assert "was taken over by another process" in stopped.text, job.said()
        assert "Traceback" not in stopped.text, job.said()
        assert stored_bytes(store) == done
    completes(recipe, store, undisturbed)


@pytest.fixture(scope="module")
def spoilt(recipe: Path) -> Path:
    """The teacher, with a NaN in the embedding of a word that one row has."""
    folder = recipe.with_name("spoilt")
    teacher = LlamaForCausalLM.from_pretrained(recipe.with_name("teacher"))
    tokenizer = make_tokenizer()
    with torch.no_grad():
        teacher.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(RARE), 3] = torch.nan
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launch", [Launch(3), Launch(2, "fsdp", 2)], ids=str)
def test_a_nan_of_the_teacher_names_its_row_and_leaves_what_was_committed(
    recipe: Path, spoilt: Path, tmp_path: Path, launch: Launch
) -> None:
    store = tmp_path / "store"
    job = run(recipe, store, launch, f"teacher.model={spoilt}")
    assert set(job.codes()) == {2}, job.said()
    assert "Traceback" not in job.said()
    named = [rank for rank in job.ranks if "NaN or infinity" in rank.text]
    assert len(named) == (launch.ranks if launch.size == 1 else 1), job.said()
    for rank in named:
        for word in ("hidden.0@all of row 57", "texts.jsonl, record 57"):
            assert word in rank.text, job.said()
    for rank in set(job.ranks) - set(named):
        assert "another rank" in rank.text, job.said()
    there = Store.open(store)
    assert verify(store) == []
    assert int(there.rows.at(np.array([57])).slot[0]) not in there.committed(PASS)
    again = run(recipe, store, Launch(1))
    if there.committed(PASS):
        fails(again, f"pass {PASS} of {store} has another teacher", "give the pass another name, or another store")
    else:
        assert again.codes() == [0], again.said()


@pytest.fixture(scope="module")
def wide(recipe: Path) -> Path:
    """A recipe whose teacher takes some 3 MB of memory for each token of a batch, and whose rows fill one shard."""
    torch.manual_seed(8)
    folder = recipe.with_name("wide")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tree = yaml.safe_load(recipe.read_text())
    tree["teacher"]["model"] = str(folder)
    tree["rows"]["slot_tokens"] = tree["batch_tokens"] = 4096
    recipe.with_name("wide.yaml").write_text(yaml.safe_dump(tree))
    return recipe.with_name("wide.yaml")


def short_of_memory(rank: int) -> None:
    """Leave a rank, once its teacher answers, 96 MB more than it has then."""

    def limit() -> None:
        taken = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((taken << 10) + (96 << 20), resource.RLIM_INFINITY))

    before([(answering.Answering, "run", 0)], limit)


@pytest.mark.slow
def test_memory_that_does_not_suffice_splits_batches_and_is_recorded(wide: Path, tmp_path: Path) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    assert run(wide, whole).codes() == [0]
    job = run(wide, store, prepare=short_of_memory)
    assert job.codes() == [0], job.said()
    assert largest_difference(store, whole) <= TOLERANCE
    tokens = [commit.batch_tokens or 4096 for commit in Store.open(store).committed(PASS).values()]
    assert min(tokens) < 2048
    assert {commit.batch_tokens for commit in Store.open(whole).committed(PASS).values()} == {None}


@pytest.mark.slow
def test_memory_that_does_not_suffice_for_a_sharded_teacher_names_batch_and_setting(wide: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = run(wide, store, Launch(2, "fsdp", 2), prepare=short_of_memory)
    assert set(job.codes()) == {2}, job.said()
    assert "Traceback" not in job.said()
    assert re.search(r"out of memory on cpu with \d+ rows of 32 tokens.* batch_tokens=\d+", job.said()), job.said()
    lower = run(wide, store, Launch(2, "fsdp", 2), "batch_tokens=256", prepare=short_of_memory)
    assert lower.codes() == [0, 0], lower.said()
    assert verify(store) == []
