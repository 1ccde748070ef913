"""How large the teacher's batches are: found once, kept for the pass, halved where memory runs out."""

import contextlib
import json
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from tiny_dump import VOCAB, Outcome, Tree, make_tokenizer
from transformers import BertConfig, BertForMaskedLM

from store import FeatureKey, commits
from store.reader import Store
from teacher_dump.batch_size import SECONDS, Try, longest_row, search
from teacher_dump.memory import Peak, free_memory

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of address space are Linux's")
Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]
CPU = torch.device("cpu")


def grown(speeds: list[float], taken: Callable[[int], int] = lambda tokens: tokens, cost: float = 0.01) -> list[Try]:
    """Batches of 64 tokens and more, that answer so many tokens a second."""
    return [Try(64 << number, 1 / speed, cost, taken(64 << number)) for number, speed in enumerate(speeds)]


@pytest.mark.parametrize(
    ("tried", "limit", "chosen", "why"),
    [
        (grown([100, 190, 350, 600]), 10**9, 512, "no shard"),
        (grown([100, 190, 195, 197, 900]), 10**9, 128, "no faster"),  # two doublings in a row that do not pay
        (grown([100, 102, 180, 182]), 10**9, 256, "no shard"),  # one that does not, and then one that does
        (grown([100, 190, 350, 600]), 1024, 512, "no shard"),
        (grown([100, 190, 350, 600]), 511, 256, "511 B of memory"),  # not tried, since it might not fit
        (grown([100, 190, 350], lambda tokens: tokens**2), 20_000, 128, "20 kB of memory"),  # grew more than was to be expected
        (grown([100]), 10, 64, "10 B of memory"),  # the smallest there is
        ([*grown([100, 190]), None], 10**9, 128, "not fit into memory"),
        (grown([100, 190, 350], cost=SECONDS / 3 + 1), 10**9, 64, "30 s"),
    ],
)
def test_the_largest_batch_that_fits_and_pays_is_taken(tried: list[Try | None], limit: int, chosen: int, why: str) -> None:
    tokens, reason = search(tried, limit)
    assert tokens == chosen
    assert why in reason


def test_no_batch_is_run_that_might_not_fit() -> None:
    asked = []

    def trying() -> Iterator[Try]:
        for one in grown([100, 190, 350, 600, 1000]):
            asked.append(one.tokens)
            yield one

    search(trying(), 300)
    assert asked == [64, 128, 256]


def test_memory_that_is_taken_for_a_moment_is_measured() -> None:
    peak = Peak(CPU)
    kept, small = peak.of(lambda: torch.ones(1 << 20).sum().item())
    assert kept == 1 << 20
    sizes = [peak.of(lambda size=size: torch.ones(size << 20, dtype=torch.uint8).max().item())[1] for size in (64, 256)]  # type: ignore[misc]
    assert 60 << 20 < sizes[0] < 100 << 20
    assert 250 << 20 < sizes[1] < 300 << 20
    assert small < sizes[0]
    assert 0 < free_memory(CPU) < 1 << 50


def test_the_size_that_the_first_start_finds_is_kept_for_the_pass(class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    del class_recipe["batch_tokens"]
    recipe = write(class_recipe)
    first = teacher_dump("run", recipe)
    assert first.code == 0, first.err
    path = Path(class_recipe["store"])
    found = Store.open(path).manifest.passes["classes"].batch_tokens
    assert found is not None
    assert found.bit_count() == 1
    assert f"batches of {found:,} tokens from now on" in first.err
    assert f"batches of {found:,} tokens" in teacher_dump("status", path).out
    assert all(commit.batch_tokens is None for commit in Store.open(path).committed("classes").values())

    def again(*overrides: str) -> str:
        commits.drop(path, Store.open(path).committed("classes")[1])
        outcome = teacher_dump("run", recipe, *overrides)
        assert outcome.code == 0, outcome.err
        return outcome.err

    assert "from now on" not in again()
    assert Store.open(path).committed("classes")[1].batch_tokens is None
    other = found // 2
    assert f"batches of {other:,} tokens; the pass began with {found:,}" in again(f"batch_tokens={other}")
    assert Store.open(path).manifest.passes["classes"].batch_tokens == found
    assert [commit.batch_tokens for _, commit in sorted(Store.open(path).committed("classes").items())][:3] == [None, other, None]
    assert f"batches of {found:,} tokens; 1 shard with {other:,}" in teacher_dump("status", path).out


def test_the_batch_that_is_tried_has_the_row_that_takes_most(masked_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("rows", write(masked_recipe)).code == 0
    rows = Store.open(Path(masked_recipe["store"])).rows
    length, labelled = rows.columns.length, rows.columns.labelled
    longest = np.flatnonzero(length > 16)
    assert longest_row(rows) in longest[labelled[longest] == labelled[longest].max()]


@pytest.mark.parametrize("memory", ["lots", 0, 1.5, "0.5"])
def test_a_limit_that_is_neither_a_share_nor_bytes_is_refused(memory: object, class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    outcome = teacher_dump("run", write({**class_recipe, "memory": memory}))
    assert outcome.code == 2
    assert "memory" in outcome.err


@pytest.mark.parametrize(("ranks", "replica"), [(3, 1), (2, 2)])
def test_all_ranks_of_a_job_take_the_batches_that_the_first_one_finds(
    ranks: int, replica: int, masked_recipe: Tree, write: Write, tmp_path: Path
) -> None:
    del masked_recipe["batch_tokens"]
    sharding = ["sharding.kind=fsdp", "sharding.size=2"] if replica == 2 else []
    job = jobs.start(write(masked_recipe), ranks, tmp_path / "said", sharding, replica=replica)
    assert job.codes() == [0] * ranks, job.said()
    assert job.said().count("tokens from now on") == 1
    store = Store.open(Path(masked_recipe["store"]))
    assert store.complete("bert")
    assert store.manifest.passes["bert"].batch_tokens is not None
    assert {commit.batch_tokens for commit in store.committed("bert").values()} == {None}


@contextlib.contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let this process have no more than so many bytes of address space on top of what it has."""
    now = int(re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def wide_recipe(tmp_path: Path) -> Tree:
    """A teacher whose block takes 128 KiB a token for a moment."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32_768,
        max_position_embeddings=1024,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    texts = [" ".join(["river"] * (10 if number % 100 else 20)) for number in range(200)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(["river"] * 1000)}) + "\n")
    return {
        "store": str(tmp_path / "store"),
        "pass_name": "wide",
        "teacher": {"model": str(tmp_path / "wide"), "head": "masked_lm"},
        "rows": {"sources": [{"files": str(tmp_path / "texts.jsonl")}], "max_length": 1024, "slot_tokens": 1280},
        "features": ["hidden.1@first"],
        "batch_tokens": 4096,
        "device": "cpu",
    }


@LINUX
def test_a_batch_that_does_not_fit_is_halved_and_the_shard_says_so(
    wide_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    recipe = write(wide_recipe)
    assert teacher_dump("run", recipe, f"store={tmp_path / 'whole'}", "batch_tokens=512").code == 0
    with at_most(256 << 20):
        outcome = teacher_dump("run", recipe)
    assert outcome.code == 0, outcome.err
    store, whole = Store.open(tmp_path / "store"), Store.open(tmp_path / "whole")
    halved = [commit.batch_tokens for commit in store.committed("wide").values() if commit.batch_tokens]
    assert store.manifest.passes["wide"].batch_tokens == 4096
    assert halved
    assert max(halved) < 4096
    assert f"batches of 4,096 tokens; {halved.count(max(halved))} shard" in teacher_dump("status", store.path).out
    key, rows = FeatureKey.parse("wide/hidden.1@first"), np.arange(len(store.rows))
    np.testing.assert_allclose(store.read(key, rows)[""], whole.read(key, rows)[""], rtol=0, atol=1e-5)


@LINUX
def test_a_row_that_does_not_fit_alone_is_named(wide_recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe = write(wide_recipe)
    assert teacher_dump("run", recipe, f"store={tmp_path / 'warm'}", "batch_tokens=512").code == 0
    long = f"rows.sources.0.files={tmp_path / 'long.jsonl'}"
    for tokens in ("auto", "4096"):
        with at_most(96 << 20):
            outcome = teacher_dump("run", recipe, long, f"batch_tokens={tokens}")
        assert outcome.code == 2
        assert "out of memory with row 0 of 1002 tokens alone; shard the teacher" in outcome.err


@LINUX
def test_ranks_that_share_a_teacher_say_which_batches_to_take(wide_recipe: Tree, write: Write, tmp_path: Path) -> None:
    def little(number: int) -> None:
        now = int(re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_AS, (now + (1200 << 20), resource.RLIM_INFINITY))

    # 2 GB a batch: far more than the limit, also where a process that ran other tests has freed memory to hand on
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps({"text": " ".join(["river"] * 10)}) + "\n") * 1000)
    sharding = ["sharding.kind=fsdp", "sharding.size=2", "batch_tokens=16384", "rows.slot_tokens=16384", f"rows.sources.0.files={many}"]
    job = jobs.start(write(wide_recipe), 2, tmp_path / "said", sharding, replica=2, prepare=little)
    assert 0 not in job.codes(), job.said()
    assert re.search(r"out of memory on cpu with \d+ rows of 16 tokens; lower batch_tokens, as in batch_tokens=\d+", job.said())
