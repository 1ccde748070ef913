"""The columns of a corpus are told without reading it, in every format."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from online.corpus import SourceSpec, column_names

TABLE = pa.table({"text": ["one", "two"], "label": [1, 0], "a": ["x", None]})


def names(*files: Path, **options: object) -> tuple[str, ...]:
    return column_names([SourceSpec.model_validate({"files": str(file), **options}) for file in files])


def test_every_format_names_its_columns_in_their_order(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(TABLE, str(tmp_path / "a.csv"))
    pyarrow.feather.write_feather(TABLE, str(tmp_path / "a.feather"))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as stream:
        stream.write_table(TABLE)
    (tmp_path / "a.jsonl").write_text('\n{"text": "one", "label": 1, "a": null}\n')
    for name in ("a.parquet", "a.csv", "a.feather", "a.arrow", "a.jsonl"):
        assert names(tmp_path / name) == ("text", "label", "a")
    (tmp_path / "a.txt").write_text("one\n")
    assert names(tmp_path / "a.txt") == ("text",)


def test_files_have_the_same_columns_in_any_order_or_are_empty(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text('{"a": "x", "label": 1, "text": "one"}')
    assert names(tmp_path) == ("text", "label", "a")
    (tmp_path / "d.jsonl").write_text('{"a": "x", "text": "one"}')
    with pytest.raises(ValueError, match=r"expected the columns text, label, a as in .*b\.parquet, found a, text in .*d\.jsonl"):
        names(tmp_path / "b.parquet", tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"no records in .*a\.jsonl"):
        names(tmp_path / "a.jsonl")


def test_a_file_that_is_not_what_its_suffix_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet"):
        names(tmp_path / "a.parquet")
