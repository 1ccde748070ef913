"""Whole dumps whose ranks are killed, stopped and slowed down at random, and what must hold of their store all the while."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from disks import injected
from jobs import Job, Rank, start, until
from tiny_dump import VOCAB, WORDS, make_tokenizer, stored_bytes
from torch.distributed import distributed_c10d
from transformers import LlamaConfig, LlamaForCausalLM

from online import replica
from store import leases
from store.reader import Store
from store.verify import verify

PASS = "llama"
RARE = "##ing"
"""A word that one row has, that of record 57."""
TOLERANCE = 1e-5
"""Between teachers that are sharded in different ways, in float32."""
SLOW = 0.02
"""Seconds that a slow disk needs for an fsync on top."""
PATIENCE = 10.0
"""Seconds, in place of half an hour, that ranks of a replica wait for one that was killed before it had joined them."""
STOPPED = 1.0
"""Seconds without renewal after which claims are free, where ranks are stopped."""


Files = dict[str, tuple[int, int, bytes]]
"""Path in the store -> inode, time of change and content."""


@dataclass(frozen=True)
class Launch:
    """How a job is started."""

    ranks: int
    kind: str = "none"
    size: int = 1

    def __str__(self) -> str:
        ranks = f"{self.ranks} ranks" if self.ranks > 1 else "1 rank"
        return ranks if self.kind == "none" else f"{ranks}, {self.kind} over {self.size}"

    @property
    def overrides(self) -> list[str]:
        return [] if self.kind == "none" else [f"sharding.kind={self.kind}", f"sharding.size={self.size}"]


WHOLE = ((Launch(1),), (Launch(2),), (Launch(3),), (Launch(2), Launch(1)))
"""Jobs that run at once over one store: each rank with a teacher of its own."""

SHARDED = (
    (Launch(2, "zero3", 2),),
    (Launch(2, "fsdp", 2),),
    (Launch(2, "tp", 2),),
    (Launch(4, "fsdp", 2),),
    (Launch(2, "zero3", 2), Launch(1)),
)
"""The same with teachers that lie over several ranks."""


def make_recipe(folder: Path) -> Path:
    """A random Llama, a few texts, and a recipe of some 20 shards with two batches or more each."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    draw = random.Random(6)
    words = [word for word in WORDS if not word.startswith("#")]
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 28))) for _ in range(120)]
    texts[57] += f" river{RARE.removeprefix('##')}"
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "store": str(folder / "store"),
        "pass_name": PASS,
        "teacher": {"model": str(folder / "teacher"), "head": "causal_lm"},
        "rows": {"sources": [{"files": str(folder / "texts.jsonl")}], "objective": "causal", "max_length": 32, "slot_tokens": 128},
        "features": ["hidden.*@all", "lm_logits@labels:top8"],
        "batch_tokens": 32,
        "device": "cpu",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def largest_difference(one: Path, other: Path) -> float:
    """Between the numbers that two stores hold for the same rows; an AssertionError where anything else differs."""
    first, second = Store.open(one), Store.open(other)
    assert first.complete(PASS)
    assert second.complete(PASS)
    assert first.rows.table.equals(second.rows.table)
    assert first.manifest.passes[PASS].teacher == second.manifest.passes[PASS].teacher
    rows, most = np.arange(len(first.rows)), 0.0
    assert first.tokens("input_ids", rows).tobytes() == second.tokens("input_ids", rows).tobytes()
    for spec in first.manifest.passes[PASS].features:
        key = spec.feature.of(PASS)
        mine, its = first.read(key, rows), second.read(key, rows)
        for name, values in mine.items():
            if values.dtype.kind == "f":
                most = max(most, float(np.abs(values - its[name]).max()))
            else:
                assert values.tobytes() == its[name].tobytes(), f"{key} {name} differs"
    return most


@dataclass
class Drill:
    """One store after the other, filled by jobs that are met by faults."""

    folder: Path
    recipe: Path
    chance: random.Random
    launches: Sequence[Sequence[Launch]]
    stops: bool = False
    """Whether ranks are also stopped for longer than their claims hold."""
    errors: bool = False
    """Whether the file system also answers with errors."""
    seen: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    """Way to start a job -> kills."""
    ended: list[float] = field(default_factory=list)
    """Seconds that the other ranks of a replica needed to end after one was killed."""
    difference: float = 0.0
    _turn: int = 0

    def __post_init__(self) -> None:
        self.undisturbed = self.folder / "undisturbed"
        job = self._start(Launch(1), self.undisturbed)
        assert job.codes() == [0], job.said()

    def run(self, kills: int) -> None:
        """At least so many kills of ranks; every store is finished in peace at last, and is the undisturbed one."""
        while self.seen["kills"] < kills:
            store = self.folder / f"store-{self.seen['stores']}"
            kinds, known = set[str](), Files()
            while self.seen["kills"] < kills and not _complete(store):
                launches = self.launches[self._turn % len(self.launches)]
                self._turn += 1
                known = self._disturb(store, launches, known)
                kinds |= {launch.kind for launch in launches}
            self._finish(store, kinds, known)
            self.seen["stores"] += 1

    def _disturb(self, store: Path, launches: Sequence[Launch], known: Files) -> Files:
        """Jobs at once, met by faults until none of their ranks is left; the committed files as they are then."""
        slow = self.chance.random() < 0.3
        jobs = [self._start(launch, store, slow=slow, expires=STOPPED if self.stops else None) for launch in launches]
        self.seen["jobs"] += len(jobs)
        self.seen["jobs on a slow disk"] += slow * len(jobs)
        try:
            while alive := [(job, rank) for job in jobs for rank in job.alive]:
                self._wait(store, [rank for _, rank in alive])
                job, rank = self.chance.choice(alive)
                if self.stops and self.chance.random() < 0.6:
                    self._stop(rank)
                elif self.errors and self.chance.random() < 0.5:
                    self._fail(rank)
                elif self.chance.random() < 0.2:
                    killed = job.kill()
                    self._count(str(launches[jobs.index(job)]), killed, store)
                    self.seen["nodes gone"] += killed > 1
                else:
                    killed = rank.kill()
                    self._count(str(launches[jobs.index(job)]), killed, store)
                    if killed:
                        self._others_end(job, rank)
                known = self.check(store, known)
        finally:
            for job in jobs:
                job.kill()
        for job in jobs:
            for rank in job.ranks:
                assert rank.process.exitcode in (0, 2, -signal.SIGKILL), job.said()
                assert "Traceback" not in rank.text, job.said()
                failed = rank.process.exitcode == 2
                taken = failed and "was taken over by another process" in rank.text
                broken = failed and "Input/output error" in rank.text
                left = job.replica > 1 and "another rank" in rank.text
                assert not failed or taken or broken or left, job.said()
                self.seen["ranks that had lost their shard"] += taken
                self.seen["ranks that named an error of the file system"] += broken
        return known

    def _wait(self, store: Path, alive: Sequence[Rank]) -> None:
        """For a moment at random: soon, when rows or pass are there, or at a commit."""
        early = (_stage, 0.3) if _stage(store) < 2 else (_logged, 0.02)
        moment, longest = self.chance.choice([(None, 0.4), early, (_logged, 0.02)])
        if moment is not None:
            now = moment(store)
            until(lambda: moment(store) != now or not any(rank.alive for rank in alive))
        time.sleep(self.chance.uniform(0, longest))

    def _stop(self, rank: Rank) -> None:
        if rank.alive:
            os.kill(rank.pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(STOPPED, 2.5 * STOPPED))
            os.kill(rank.pid, signal.SIGCONT)
            self.seen["stops"] += 1

    def _fail(self, rank: Rank) -> None:
        """Let the next of some system call fail, whatever it is about."""
        calls = self.chance.choice(["fsync", "link,linkat", "rename,renameat,renameat2", "unlink,unlinkat", "mkdir", "flock"])
        if rank.alive:
            with injected(rank.pid, calls, "error=EIO:when=1"):
                rank.process.join(0.5)
            self.seen["spells of a failing file system"] += 1

    def _others_end(self, job: Job, killed: Rank) -> None:
        """The ranks that held a part of the same teacher end by themselves."""
        start = time.monotonic()
        for other in job.beside(killed):
            assert other.code() in (0, 2, -signal.SIGKILL), job.said()
            self.ended.append(time.monotonic() - start)

    def _count(self, launch: str, killed: int, store: Path) -> None:
        self.seen["kills"] += killed
        self.met[launch] += killed
        if not (store / "manifest.json").exists():
            self.seen["kills while rows were built"] += killed
        elif not _announced(store):
            self.seen["kills before the pass was announced"] += killed
        elif any((store / PASS).rglob("*.tmp")):
            self.seen["kills in the middle of a commit"] += killed

    def check(self, store: Path, known: Files) -> Files:
        """Nothing committed is lost or changed; the committed files as they are now."""
        if not _announced(store):
            assert not known
            return {}
        assert verify(store, full=False) == []
        commits = Store.open(store).committed(PASS).values()
        files = [store / PASS / array / f"c.{commit.shard}.0" for commit in commits for array in commit.files]
        now = {str(file.relative_to(store)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in files}
        assert {name: now.get(name) for name in known} == known, "what was committed was lost or changed"
        return now

    def _finish(self, store: Path, kinds: set[str], known: Files) -> None:
        """Nobody disturbs the last job."""
        launches = self.launches[self._turn % len(self.launches)]
        for launch in launches:
            job = self._start(launch, store)
            assert set(job.codes()) == {0}, job.said()
            kinds.add(launch.kind)
        self.check(store, known)
        assert verify(store) == []
        left = [*store.rglob("*.tmp"), *(store / "claims" / PASS).iterdir()]
        assert not left or self.stops, f"clutter is left: {left}"
        if kinds == {"none"}:
            assert stored_bytes(store) == stored_bytes(self.undisturbed)
            self.seen["stores equal to the bit"] += 1
        self.difference = max(self.difference, largest_difference(store, self.undisturbed))
        assert self.difference <= TOLERANCE

    def _start(self, launch: Launch, store: Path, *, slow: bool = False, expires: float | None = None) -> Job:
        self.seen["launches"] += 1

        def prepare(rank: int) -> None:
            replica.TIMEOUT, distributed_c10d.default_pg_timeout = PATIENCE, timedelta(seconds=PATIENCE)  # DeepSpeed's groups take that
            if slow:
                slow_disk(SLOW)
            if expires is not None:
                leases.EXPIRES, leases.RENEW = expires, expires / 10

        said = self.folder / "said" / str(self.seen["launches"])
        return start(self.recipe, launch.ranks, said, [f"store={store}", *launch.overrides], replica=launch.size, prepare=prepare)


def slow_disk(seconds: float) -> None:
    """Let every fsync of this process take so much longer."""
    fsync = os.fsync

    def slowly(handle: int) -> None:
        time.sleep(seconds)
        fsync(handle)

    os.fsync = slowly


def _announced(store: Path) -> bool:
    return (store / "manifest.json").exists() and PASS in Store.open(store).manifest.passes


def _stage(store: Path) -> int:
    """How many of the things that come before the first shard are there."""
    return (store / "manifest.json").exists() + _announced(store)


def _complete(store: Path) -> bool:
    return _announced(store) and Store.open(store).complete(PASS)


def _logged(store: Path) -> int:
    """Bytes of commit lines."""
    return sum(log.stat().st_size for log in (store / "commits").glob("*.log"))
