"""`teacher-dump augment`: one corpus file, whole or not there, the same bytes each time, which rows are built from."""

import fcntl
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_dump import Outcome, Tree, World

from store.reader import Store
from teacher_dump.cli import main

Run = Callable[..., Outcome]
Write = Callable[[Tree], Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Tree:
    return {
        "output": str(tmp_path / "made" / "augmented.parquet"),
        "sources": [{"files": str(world.corpus)}],
        "augment": {"columns": ["text"], "copies": 4, "max_length": 32},
        "language_model": {"model": str(world.masked), "head": "masked_lm"},
        "device": "cpu",
    }


def rows_of(world: World) -> list[Tree]:
    return [json.loads(line) for line in world.corpus.read_text().splitlines()]


def test_records_stand_before_their_copies_with_all_their_columns(world: World, recipe: Tree, write: Write, teacher_dump: Run) -> None:
    done = teacher_dump("augment", write(recipe))
    assert done.code == 0, done.err
    assert done.out.startswith(f"{recipe['output']}: 450 records, 90 of them originals\n")
    assert "100%" in done.err, "a progress bar"
    found = pq.read_table(recipe["output"])
    assert found.schema.names == ["text", "label", "number", "original", "copy"]
    assert pq.read_metadata(recipe["output"]).row_group(0).column(0).compression == "ZSTD"
    records = rows_of(world)
    changed = 0
    for place, row in enumerate(found.to_pylist()):
        original, copy = divmod(place, 5)
        assert (row["original"], row["copy"]) == (original, copy)
        assert (row["label"], row["number"]) == (records[original]["label"], records[original]["number"])
        before, after = records[original]["text"].split(), row["text"].split()
        assert len(before) == len(after)
        assert copy or before == after
        for one, other in zip(before, after, strict=True):
            assert one == other or (one.isalpha() and one not in ("the", "a"))
            changed += one != other
    assert changed > 500
    assert sorted(path.name for path in Path(recipe["output"]).parent.iterdir()) == ["augmented.parquet"]


def test_the_file_is_the_same_however_the_corpus_is_cut(
    world: World, recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    assert teacher_dump("augment", write(recipe)).code == 0
    records = rows_of(world)
    (tmp_path / "cut").mkdir()
    pq.write_table(pa.Table.from_pylist(records[:33]), tmp_path / "cut" / "a.parquet", row_group_size=7)
    (tmp_path / "cut" / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[33:]))
    files, again = f"sources.0.files={tmp_path / 'cut'}", tmp_path / "again.parquet"
    assert teacher_dump("augment", write(recipe), files, f"output={again}").code == 0
    assert again.read_bytes() == Path(recipe["output"]).read_bytes()


def test_a_finished_file_is_left_alone_and_one_of_another_recipe_is_refused(
    world: World, recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    output = Path(recipe["output"])
    assert teacher_dump("augment", write(recipe)).code == 0
    before = output.stat().st_ino, output.stat().st_mtime_ns
    again = teacher_dump("augment", write(recipe))
    assert again.out == f"{output}: 450 records, nothing was left to do\n"
    (tmp_path / "vectors.txt").write_text("river 1 0\ncity 0 1\n")
    for change, said in (
        ("augment.probability=0.5", "augment.probability: expected 0.4 as it says, found 0.5"),
        ("augment.seed=1", "augment.seed: expected 0"),
        ("sources.0.limit=89", "another corpus: expected "),
        (f"language_model.model={world.other}", "another language model: expected "),
        (f"word_vectors.file={tmp_path / 'vectors.txt'}", "another word vectors: expected None as it says, found "),
    ):
        refused = teacher_dump("augment", write(recipe), change)
        assert refused.code == 2
        assert f"error: {output} was made with " in refused.err
        assert said in refused.err
        assert "augment RECIPE output=" in refused.err
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == before


def test_rows_are_built_from_it_and_frozen_with_the_store(recipe: Tree, class_recipe: Tree, write: Write, teacher_dump: Run) -> None:
    assert teacher_dump("augment", write(recipe)).code == 0
    class_recipe["rows"]["sources"] = [{"files": recipe["output"]}]
    built = teacher_dump("rows", write(class_recipe))
    assert built.code == 0, built.err
    store = Store.open(Path(class_recipe["store"]))
    assert store.manifest.rows.rows == 450
    assert store.rows.about(7)["record"] == 7
    assert teacher_dump("augment", write(recipe), "augment.seed=5", f"output={recipe['output']}.parquet").code == 0
    class_recipe["rows"]["sources"] = [{"files": f"{recipe['output']}.parquet"}]
    other = teacher_dump("rows", write(class_recipe))
    assert other.code == 2
    assert "was made with another corpus" in other.err


def _augment(recipe: Path, errors: Path) -> None:
    sys.stderr = errors.open("w", buffering=1)
    torch.set_num_threads(1)
    main(["augment", str(recipe)])


@pytest.mark.slow
def test_a_killed_one_has_no_name_and_is_begun_anew(recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    recipe["augment"]["copies"] = 400  # 36,090 records: more than one row group
    output, path = Path(recipe["output"]), write(recipe)
    temporary = output.with_name(f".{output.name}.0.tmp")
    process = multiprocessing.get_context("fork").Process(target=_augment, args=(path, tmp_path / "err"))
    process.start()
    while process.is_alive() and not (temporary.exists() and temporary.stat().st_size > 10_000):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert temporary.exists(), "the kill came in the middle"
    assert not output.exists()
    assert teacher_dump("augment", path).code == 0
    assert not temporary.exists()
    killed = output.read_bytes()
    assert teacher_dump("augment", path, f"output={tmp_path / 'whole.parquet'}").code == 0
    assert (tmp_path / "whole.parquet").read_bytes() == killed


def test_an_error_in_the_middle_leaves_nothing(recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    texts = pa.array([["river", "city"]] * 3)
    pq.write_table(pa.table({"text": texts}), tmp_path / "lists.parquet")
    refused = teacher_dump("augment", write(recipe), f"sources.0.files={tmp_path / 'lists.parquet'}")
    assert refused.code == 2
    assert "lists.parquet, record 0 (counted from 0): column 'text' holds a list; expected text" in refused.err
    assert list(Path(recipe["output"]).parent.iterdir()) == []


def test_two_processes_do_not_write_one_file(recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    output = Path(recipe["output"])
    output.parent.mkdir()
    with output.with_name(f".{output.name}.0.tmp").open("wb") as held:
        held.write(b"left by a kill" * 10_000)
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = teacher_dump("augment", write(recipe))
        assert refused.code == 2
        assert f"error: another process is writing {output}; wait for it to end" in refused.err
    assert teacher_dump("augment", write(recipe)).code == 0
    assert teacher_dump("augment", write(recipe), f"output={tmp_path / 'alone.parquet'}").code == 0
    assert output.read_bytes() == (tmp_path / "alone.parquet").read_bytes()


def test_values_of_any_type_come_through_and_nulls_too(recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    records = [{"text": None, "score": 1, "words": None, "map": {"x": 1}, "none": None} for _ in range(1500)]
    records[1200] |= {"text": "river", "score": 2.5, "words": ["a", None], "map": {"x": None}}
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = teacher_dump(
        "augment", write(recipe), f"sources.0.files={tmp_path / 'mixed.jsonl'}", "augment.copies=1", "augment.probability=1"
    )
    assert done.code == 0, done.err
    found = pq.read_table(recipe["output"])
    assert [str(found.schema.field(name).type) for name in ("text", "score", "none")] == ["string", "double", "null"]
    rows = found.to_pylist()
    assert [{name: row[name] for name in records[0]} for row in rows[::2]] == records
    assert rows[2401] == {**records[1200], "text": rows[2401]["text"], "original": 1200, "copy": 1}


BAD = {
    "unknown key": ({"augment.copys": 3}, "unknown key 'augment.copys'; did you mean 'copies'?"),
    "unknown column": ({"augment.columns": ["txt"]}, "has no column 'txt'; did you mean 'text'?"),
    "no columns": ({"augment.columns": []}, "augment.columns"),
    "probability": ({"augment.probability": 0}, "augment.probability"),
    "missing corpus": ({"sources.0.files": "nowhere.jsonl"}, "no such file, folder or glob: nowhere.jsonl"),
    "texts to evaluate with": ({"sources.0.split": "dev"}, "sources: expected texts to train with, found split dev"),
    "head": ({"language_model.head": "causal_lm"}, "language_model.head: expected masked_lm, found causal_lm"),
    "missing model": ({"language_model.model": "nowhere"}, "expected a Hugging Face model folder, found nothing at nowhere"),
    "length": ({"augment.max_length": 65}, "max_length: bert takes rows of up to 64 tokens, found 65"),
    "missing vectors": ({"word_vectors.file": "nowhere.txt"}, "word vectors nowhere.txt cannot be read"),
    "device": ({"device": "gpu0"}, "expected a device such as cpu, cuda or cuda:1"),
    "suffix": ({"output": "augmented.csv"}, "output: expected a file on this machine that ends in .parquet"),
    "address": ({"output": "s3://bucket/augmented.parquet"}, "output: expected a file on this machine that ends in .parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_said(name: str, recipe: Tree, write: Write, teacher_dump: Run) -> None:
    changes, said = BAD[name]
    refused = teacher_dump("augment", write(recipe), *(f"{path}={json.dumps(value)}" for path, value in changes.items()))
    assert refused.code == 2
    assert said in refused.err
    assert "Traceback" not in refused.err
    assert not Path(recipe["output"]).parent.exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "river", "copy": 1}'], "the corpus has a column 'copy', which augmented records have already; rename it"),
        (['{"text": "river", "n": 1}', '{"text": "river", "n": "x"}'], "column 'n' has values of several types, in records 0 to 1"),
        ([""], "no records in "),
    ],
)
def test_a_corpus_that_makes_no_table_is_refused(
    lines: list[str], said: str, recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    refused = teacher_dump("augment", write(recipe), f"sources.0.files={tmp_path / 'bad.jsonl'}")
    assert refused.code == 2
    assert said in refused.err


def test_files_of_other_columns_and_an_output_among_its_own_sources_are_refused(
    recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "river"}\n')
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "river", "label": 1}\n')
    refused = teacher_dump("augment", write(recipe), f"sources.0.files={tmp_path / 'in'}")
    assert f"expected the columns text as in {tmp_path}/in/a.jsonl, found text, label in {tmp_path}/in/b.jsonl" in refused.err
    (tmp_path / "in" / "b.jsonl").unlink()
    inside = f"output={tmp_path}/in/made.parquet"
    assert teacher_dump("augment", write(recipe), f"sources.0.files={tmp_path / 'in'}", inside).code == 0
    refused = teacher_dump("augment", write(recipe), f"sources.0.files={tmp_path / 'in'}", inside)
    assert refused.code == 2
    assert "made.parquet is among the files that it is to be made of; give another output" in refused.err


def test_another_file_of_that_name_is_not_touched(recipe: Tree, write: Write, teacher_dump: Run, tmp_path: Path) -> None:
    for number, content in enumerate((b"PAR1 nothing", None)):
        other = tmp_path / f"other{number}.parquet"
        pq.write_table(pa.table({"text": ["river"]}), other) if content is None else other.write_bytes(content)
        before = other.read_bytes()
        refused = teacher_dump("augment", write(recipe), f"output={other}")
        assert refused.code == 2
        assert f"{other} is no file that `teacher-dump augment` made; give another output, or remove it" in refused.err
        assert other.read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_the_shipped_recipe_augments_real_sentences(beside_shared: Path, run_program: Callable[..., str]) -> None:
    run_program(beside_shared, "teacher_dump", "augment", str(ROOT / "recipes/tinybert/augment.yaml"), "sources.0.limit=40")
    found = pq.read_table(beside_shared / "out/tinybert/sst2_augmented.parquet").to_pylist()
    records = pq.read_table(beside_shared / "data/tasks/sst2_train.parquet").slice(0, 40).to_pylist()
    originals = [row for row in found if row["copy"] == 0]
    assert [{name: row[name] for name in records[0]} for row in originals] == records
    assert 10 * len(originals) < len(found) < 21 * len(originals)
    for row in found:
        assert len(row["sentence1"].split()) == len(records[row["original"]]["sentence1"].split())
        assert row["label"] == records[row["original"]]["label"]
    assert len({(row["original"], row["sentence1"]) for row in found}) == len(found), "repeats are dropped"

    rows = yaml.safe_load((ROOT / "recipes/sst2/dump.yaml").read_text())
    rows["rows"]["sources"][0] = {"files": ["out/tinybert/sst2_augmented.parquet"]}
    (beside_shared / "rows.yaml").write_text(yaml.safe_dump(rows))
    run_program(beside_shared, "teacher_dump", "rows", "rows.yaml", "rows.sources.1.limit=5")
    assert Store.open(beside_shared / rows["store"]).manifest.rows.splits == {"train": len(found), "dev": 5}
