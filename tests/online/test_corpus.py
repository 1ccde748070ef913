"""Records come from every format in the same order with the same values."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from online.corpus import Record, SourceSpec, list_files, read_records

ROWS = [
    {"text": "One, two.", "label": 1},
    {"text": "007", "label": 0},
    {"text": "NA", "label": 1},
    {"text": 'She said "null"\nand left.', "label": 0},
    {"text": "2020-01-01", "label": 0},
    {"text": "café ☕", "label": 1},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """``rows`` in the format of the suffix; ``.stream.arrow`` is the streaming layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
    elif path.name.endswith(".stream.arrow"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    elif path.suffix in (".arrow", ".feather"):
        pyarrow.feather.write_feather(table, str(path))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, str(path))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(files: Path | str, columns: tuple[str, ...] = ("text",), read_rows: int = 1024, **options: object) -> list[Record]:
    source = SourceSpec.model_validate({"files": str(files), **options})
    return list(read_records([source], columns, read_rows=read_rows))


SUFFIXES = ["a.parquet", "a.jsonl", "a.ndjson", "a.json", "a.csv", "a.arrow", "a.stream.arrow", "a.feather", "a.jsonl.gz"]


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("read_rows", [1, 1024])
def test_every_format_yields_the_same_texts_and_record_numbers(tmp_path: Path, name: str, read_rows: int) -> None:
    file = write(tmp_path / name, ROWS)
    found = read(file, ("text", "label"), read_rows)
    assert [record.values["text"] for record in found] == [row["text"] for row in ROWS]
    assert [int(str(record.values["label"])) for record in found] == [row["label"] for row in ROWS]
    assert [(record.file, record.number, record.ordinal) for record in found] == [(str(file), n, n) for n in range(len(ROWS))]


def test_a_last_line_without_line_feed_and_blank_lines_are_read_right(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"label": 1, "text": "b"}')
    assert [(record.values["text"], record.number) for record in read(tmp_path / "a.jsonl")] == [("a", 0), ("b", 1)]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert [record.values["text"] for record in read(tmp_path / "a.jsonl")] == ["a"]


def test_dates_that_only_look_like_dates_at_first_stay_text(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "words": ["2021-01-01"]}] * 3 + [{"text": "no date", "words": ["x"]}]
    found = read(write(tmp_path / "a.jsonl", rows), ("text", "words"))
    assert [record.values for record in found] == rows


@pytest.mark.parametrize(
    ("documents", "expected"),
    [("line", ["one", "", "two", "three"]), ("blank_line", ["one", "two\nthree"]), ("file", ["one\n\ntwo\nthree"])],
)
def test_plain_text_is_cut_into_lines_stretches_or_files(tmp_path: Path, documents: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nthree")
    assert [record.values["text"] for record in read(tmp_path / "a.txt", documents=documents)] == expected


def test_folders_and_globs_are_read_sorted_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/10.jsonl", "a/1.parquet"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not text")
    assert [record.values["text"] for record in read(tmp_path)] == ["a/1.parquet", "a/10.jsonl", "b/2.jsonl"]
    assert [record.values["text"] for record in read(f"{tmp_path}/**/*.jsonl")] == ["a/10.jsonl", "b/2.jsonl"]
    assert [record.values["text"] for record in read(tmp_path, format="parquet")] == ["a/1.parquet"]
    files = [str(tmp_path / "b"), str(tmp_path / "a" / "1.parquet")]
    assert [file.name for file, _ in list_files(SourceSpec(files=tuple(files)))] == ["2.jsonl", "1.parquet"]


def test_a_stated_format_reads_a_file_of_any_suffix(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.data")
    assert len(read(tmp_path / "a.data", format="json")) == len(ROWS)
    with pytest.raises(ValueError, match=r"a\.data: unknown suffix; state the format \(parquet, json, csv, arrow, text\)"):
        read(tmp_path / "a.data")


def test_a_limit_counts_over_the_files_of_a_source_and_ordinals_over_sources(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(3)])
    sources = [SourceSpec(files=(str(tmp_path),), limit=4), SourceSpec(files=(str(tmp_path / "b.jsonl"),), split="dev")]
    found = list(read_records(sources, ["text"]))
    assert [record.values["text"] for record in found] == ["a0", "a1", "a2", "b0", "b0", "b1", "b2"]
    assert [record.ordinal for record in found] == list(range(7))
    assert [record.number for record in found] == [0, 1, 2, 0, 0, 1, 2]
    assert [(record.source, record.split) for record in found] == [(0, "train")] * 4 + [(1, "dev")] * 3


def test_the_digest_depends_on_content_alone(tmp_path: Path) -> None:
    def digest(folder: Path, split: str = "train", columns: tuple[str, ...] = ("text", "label")) -> bytes:
        seen: list[bytes] = []
        source = SourceSpec.model_validate({"files": str(folder), "split": split})
        for _ in read_records([source], columns, digest=seen.append, read_rows=len(folder.name)):
            pass
        return b"".join(seen)

    write(tmp_path / "one" / "a.parquet", ROWS)
    write(tmp_path / "three" / "a.jsonl", ROWS[:1])
    write(tmp_path / "three" / "b.arrow", ROWS[1:])
    write(tmp_path / "other" / "a.parquet", [*ROWS[:-1], {"text": "cafe ☕", "label": 1}])
    assert digest(tmp_path / "one") == digest(tmp_path / "three")
    different = {digest(tmp_path / "other"), digest(tmp_path / "one", "dev"), digest(tmp_path / "one", columns=("text",))}
    assert len(different | {digest(tmp_path / "one")}) == 4


@pytest.mark.parametrize(
    ("files", "columns", "message"),
    [
        ("b.jsonl", ("text",), r"no such file, folder or glob: .*b\.jsonl; did you mean 'a\.jsonl'\?"),
        ("*.feather", ("text",), r"no such file, folder or glob: .*\*\.feather"),
        ("empty", ("text",), r"empty: a folder without corpus files; known suffixes: \.parquet"),
        ("a.jsonl", ("txt",), r"a\.jsonl, line 1 has no column 'txt'; did you mean 'text'\?"),
        ("a.parquet", ("txt",), r"a\.parquet has no column 'txt'; did you mean 'text'\?"),
        ("a.txt", ("body",), r"a\.txt has no column 'body'; known: text"),
        ("list.json", ("text",), r"list\.json, line 1: expected one JSON object on each line, found a list"),
        ("broken.jsonl", ("text",), r"broken\.jsonl, line 2: expected one JSON object on each line: "),
        ("fake.parquet", ("text",), r"fake\.parquet: not readable as parquet: "),
        ("latin.txt", ("text",), r"latin\.txt: not readable as text: "),
        ("ragged.csv", ("text",), r"ragged\.csv: not readable as csv: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: str, columns: tuple[str, ...], message: str) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "list.json").write_text('[{"text": "a"}]')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "fake.parquet").write_text("text")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "ragged.csv").write_text("text,label\na,1\nb\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / files, columns)


@pytest.mark.parametrize("name", ["big.parquet", "big.stream.arrow", "big.txt"])
def test_a_large_file_is_streamed(tmp_path: Path, name: str) -> None:
    """Python's own memory stays far below the 20 MB of text that pass by."""
    text = "word " * 2000
    if name.endswith(".txt"):
        (tmp_path / name).write_text(f"{text}\n" * 2000)
    else:
        write(tmp_path / name, [{"text": text}] * 2000)
    source = SourceSpec(files=(str(tmp_path / name),))
    tracemalloc.start()
    count = sum(1 for _ in read_records([source], ["text"], read_rows=32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 4_000_000
