"""How many tokens the teacher's batches had: said once for a pass, and for each shard that was answered in others."""

from pathlib import Path

import pytest
from small_store import GROUPS, MADE, SPECS, Made, answers, make_rows, pass_info

from store import Store, StoreWriter, commits
from store.copies import Wanted, copy
from store.drop import drop
from store.merge import merge

KEPT_AS_IT_IS = Wanted()


def dumped(path: Path, corpus: str, batch_tokens: int | None, others: dict[int, int]) -> Made:
    """A store whose pass has batches of ``batch_tokens``; ``others``: shard -> tokens."""
    made = make_rows(path, GROUPS, corpus=corpus)
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", pass_info().model_copy(update={"batch_tokens": batch_tokens}), {})
        for shard in writer.pending("bert"):
            tokens = others.get(shard, batch_tokens)
            writer.commit("bert", shard, answers(made, shard, SPECS, writer.rows.columns.slot), tokens)
    return made


def recorded(path: Path) -> tuple[int | None, dict[int, int | None]]:
    store = Store.open(path)
    return store.manifest.passes["bert"].batch_tokens, {shard: it.batch_tokens for shard, it in sorted(store.committed("bert").items())}


def test_only_shards_with_other_batches_say_so_and_folding_keeps_it(tmp_path: Path) -> None:
    dumped(tmp_path / "store", "c", 64, {1: 32, 3: 16})
    said = 64, {0: None, 1: 32, 2: None, 3: 16}
    assert recorded(tmp_path / "store") == said
    assert commits.compact(tmp_path / "store")
    assert recorded(tmp_path / "store") == said


def test_the_first_start_decides_and_a_later_one_goes_on_with_other_batches(tmp_path: Path) -> None:
    dumped(tmp_path / "store", "c", 64, {})
    with StoreWriter.open(tmp_path / "store") as writer:
        writer.add_pass("bert", pass_info().model_copy(update={"batch_tokens": 4096}), {})
        assert writer.manifest.passes["bert"].batch_tokens == 64
    assert recorded(tmp_path / "store")[0] == 64


def test_a_drop_keeps_what_is_said_of_the_shards_that_stay(tmp_path: Path) -> None:
    dumped(tmp_path / "store", "c", 64, {2: 32})
    drop(tmp_path / "store", ["bert/final@first"], MADE, lambda name, info: info)
    assert recorded(tmp_path / "store") == (64, {0: None, 1: None, 2: 32, 3: None})


def test_a_copy_keeps_what_is_said_of_its_shards(tmp_path: Path) -> None:
    dumped(tmp_path / "store", "c", 64, {1: 16, 3: 32})
    for name, wanted in (("all", KEPT_AS_IT_IS), ("some", Wanted(rows=(0, 6)))):
        copy(tmp_path / "store", tmp_path / name, wanted, MADE, lambda name, info: info, lambda done, total: None)
    assert recorded(tmp_path / "all") == (64, {0: None, 1: 16, 2: None, 3: 32})
    assert recorded(tmp_path / "some")[0] == 64
    assert 16 in recorded(tmp_path / "some")[1].values()


@pytest.mark.parametrize(
    ("first", "second", "whole", "said"),
    [
        (64, 64, 64, [None, 8, 8, None]),
        (64, 32, 64, [None, 8, 8, 32]),
        (None, 32, None, [None, 8, 8, 32]),
        (64, None, None, [64, 8, 8, None]),
    ],
)
def test_merged_passes_say_of_each_shard_what_was_said_before(
    tmp_path: Path, first: int | None, second: int | None, whole: int | None, said: list[int | None]
) -> None:
    dumped(tmp_path / "one", "c", first, {3: 8})
    dumped(tmp_path / "other", "d", second, {0: 8})
    merge(tmp_path / "both", [tmp_path / "one", tmp_path / "other"], MADE, lambda done, total: None)
    tokens, shards = recorded(tmp_path / "both")
    assert (tokens, [shards[shard] for shard in (0, 3, 4, 7)]) == (whole, said)
