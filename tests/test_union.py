"""One store for all methods with one teacher is at most as large as the stores of three of them, whatever the length of the rows."""

from pathlib import Path

import pytest
from transformers import BertConfig

from online.planner import plan, uncovered
from student_train.method_reads import Pair, Reads, pair_of, reads
from student_train.methods import METHODS
from teacher_dump.estimate import Wanted, stored
from teacher_dump.recipe import DumpRecipe
from teacher_dump.selection import resolve

LAYERS, WIDTH = 6, 384
"""Those of the SST-2 teacher."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's configuration, without weights or tokenizer."""
    made = tmp_path_factory.mktemp("teacher")
    config = BertConfig(
        architectures=["BertForSequenceClassification"], num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=12, vocab_size=300
    )
    config.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return pair_of(folder)


@pytest.fixture(scope="module")
def wanted(pair: Pair) -> dict[str, Reads]:
    """What each task method with one teacher reads by default."""
    found = {}
    for name, cls in METHODS.items():
        if cls.needs_teacher and not cls.several and not cls.live:
            try:
                found[name] = reads(name, pair)
            except ValueError:
                continue  # of language models; match has no default
    assert {"kd", "pkd", "alp_kd", "att_kl", "minilmv2", "tinybert", "ckd"} <= found.keys()
    return found


def dump(folder: Path, features: list[str]) -> DumpRecipe:
    rows = {"sources": [{"files": "absent.jsonl"}], "label": {"column": "label", "classes": ["a", "b"]}, "max_length": 128}
    teacher = {"model": folder, "head": "classification"}
    tree = {"store": folder / "store", "pass_name": "paper", "teacher": teacher, "rows": rows, "features": features, "dtype": "float16"}
    return DumpRecipe.model_validate(tree)


def planned(folder: Path, features: list[str], length: int) -> int:
    """Bytes of all files of features that `teacher-dump plan --tokens 1e6 --length LENGTH --json` says."""
    report = stored(dump(folder, features), Wanted("", 1e6, length), ("test",))
    files = report["stored"]
    assert isinstance(files, dict)
    return sum(feature["bytes"] for feature in files.values())


@pytest.mark.parametrize("length", [14, 128])  # that of SST-2 is 14
def test_the_union_is_at_most_the_three_largest(length: int, folder: Path, wanted: dict[str, Reads]) -> None:
    different = {read.keys for read in wanted.values()}
    sizes = {keys: planned(folder, sorted(map(str, keys)), length) for keys in different}
    of_methods = sorted((sizes[read.keys] for read in wanted.values()), reverse=True)
    union = planned(folder, sorted({str(key) for keys in different for key in keys}), length)
    assert of_methods[0] <= union <= sum(of_methods[:3])
    # By hand: every hidden state for every token covers all, and two logits a row; the rest is checksums and shard indexes.
    exact = 1e6 * (LAYERS + 1) * WIDTH * 2 + 1e6 / length * 2 * 2
    assert union == pytest.approx(exact, rel=0.01)


def test_every_method_reads_from_the_union(folder: Path, pair: Pair, wanted: dict[str, Reads]) -> None:
    recipe = dump(folder, sorted({str(key) for read in wanted.values() for key in read.keys}))
    requests = resolve(recipe, pair.teacher, None)
    union = plan({request.key: request.dtype for request in requests}, pair.teacher, pair.wiring)
    for name, read in wanted.items():
        assert not uncovered(read.keys, union.stored, union.statics, pair.teacher, pair.wiring), name
