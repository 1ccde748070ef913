"""Word ids that the vocabulary lacks are refused where a chunk is first touched, though every checksum is right: readers index by them."""

from pathlib import Path

import forge
import numpy as np
import pytest
from small_store import GROUPS, SHAPE, answers, make_rows, make_store, pass_info, spec

from store import CorruptShard, FeatureSpec, Store, StoreError, StoreWriter
from store.codecs.ids import pack
from store.features import ArraySpec
from store.shards import numpy_dtype
from store.verify import repair, verify

SMALL, LARGE = 60, 70_000
CASES: dict[str, tuple[FeatureSpec, int]] = {
    "plain": (spec("lm_logits@all:top3", "float16", SMALL), SMALL),
    "compressed": (spec("lm_logits@all:top3p95", "float16", SMALL, compression="zstd"), SMALL),
    "packed": (spec("lm_logits@all:top3", "float16", LARGE), LARGE),
    "packed and compressed": (spec("lm_logits@all:draw5", "float16", LARGE, compression="zstd"), LARGE),
    "as schema 5 kept them": (
        (of := spec("lm_logits@all:top3", "float16", LARGE)).model_copy(
            update={"arrays": (ArraySpec(name="ids", dtype="int32", width=3), *of.arrays[1:])}
        ),
        LARGE,
    ),
}
"""Feature and size of the vocabulary."""


def write(path: Path, feature: FeatureSpec, vocab: int, last: int) -> Store:
    """Random words in every place, but for ``last`` in the very last one of slot 1."""
    made, array = make_rows(path, GROUPS), feature.arrays[0]
    info = pass_info((feature,)).model_copy(update={"shape": SHAPE.model_copy(update={"vocab": vocab})})
    with StoreWriter.open(path) as writer:
        writer.add_pass("bert", info, {})
        for shard in writer.pending("bert"):
            arrays = answers(made, shard, (feature,), writer.rows.columns.slot)
            units = len(arrays[feature.feature]["ids"])
            ids = np.random.default_rng(shard).integers(0, vocab, (units, array.numbers))
            if shard == 1:
                ids[-1, -1] = last
            arrays[feature.feature]["ids"] = pack(ids, array.bits) if array.bits else ids.astype(numpy_dtype(array))
            writer.commit("bert", shard, arrays)
    return Store.open(path)


@pytest.mark.parametrize("case", CASES)
def test_the_last_word_of_a_vocabulary_is_read_and_the_next_one_refused(case: str, tmp_path: Path) -> None:
    feature, vocab = CASES[case]
    key = feature.feature.of("bert")
    store = write(tmp_path / "good", feature, vocab, vocab - 1)
    assert verify(store.path) == []
    store.read(key, np.arange(len(store.rows)))

    store = write(tmp_path / "bad", feature, vocab, vocab)
    said = rf"holds the word {vocab}, expected ids below {vocab}, the teacher's vocabulary"
    for mapped in (True, False):
        reader = Store.open(store.path, mapped)
        reader.read(key, reader.rows.rows_of(0))
        for _ in range(2):  # what was refused is not taken for checked
            with pytest.raises(CorruptShard, match=rf"c.1.0: .*{said}; mend it with teacher-dump verify --repair"):
                reader.read(key, reader.rows.rows_of(1))
    (problem,) = verify(store.path)
    assert said.split(",")[0] in problem.what
    assert (problem.shard, problem.repairs) == (1, True)
    assert repair(store.path).dropped == 1


def test_a_word_below_zero_is_refused(tmp_path: Path) -> None:
    feature, vocab = CASES["as schema 5 kept them"]
    store = write(tmp_path / "bad", feature, vocab, -1)
    with pytest.raises(CorruptShard, match=f"holds the word -1, expected ids below {vocab}"):
        store.read(feature.feature.of("bert"), np.arange(len(store.rows)))


def test_chosen_words_that_the_vocabulary_lacks_are_refused(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", GROUPS, (spec("lm_logits@labels:select", "float32", 50, (1, 7)),))
    forge.manifest(made.path, lambda tree: tree["passes"]["bert"]["shape"].update(vocab=7))
    with pytest.raises(StoreError, match="lm_logits@labels:select: expected ids below 7, found 7"):
        Store.open(made.path)
