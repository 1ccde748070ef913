"""Row tables and addresses that are others are refused with a sentence."""

from collections.abc import Callable
from pathlib import Path

import forge
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harm import refused

from store import Store
from store.publish import file_crc32c


def parquet(path: Path, change: Callable[[pa.Table], pa.Table], **options: object) -> None:
    """Put another row part, with its checksum."""
    file = path / "rows" / "part-00000.parquet"
    pq.write_table(change(pq.read_table(file)), file, **options)
    crc = file_crc32c(file)
    forge.manifest(path, lambda tree: tree["rows"]["parts"][0].update(crc32c=crc))


def with_column(name: str, values: list) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change


def repeated(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.zeros(5_000_000, np.int64)))


PARQUETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other columns": (lambda path: parquet(path, lambda table: table.drop_columns(["spans"])), "other columns"),
    "a column more": (lambda path: parquet(path, lambda table: table.append_column("x", table["copy"])), "other columns"),
    "columns of another type": (
        lambda path: parquet(path, lambda table: table.set_column(1, "copy", table["copy"].cast(pa.int64()))),
        "other columns",
    ),
    "fewer rows": (lambda path: parquet(path, lambda table: table.slice(1)), "expected 5 rows, found 4"),
    "five million rows": (lambda path: parquet(path, repeated), "expected 5 rows, found 5000000"),
    "a text of a megabyte in every row": (
        lambda path: parquet(path, with_column("source", ["x" * 10**6] * 5)),
        "too many for 5 rows|do not need",
    ),
    "no text": (lambda path: parquet(path, with_column("split", [None] * 5)), "rows without a split"),
    "spans without end": (
        lambda path: parquet(path, with_column("spans", [[{"start": 0, "end": 1}] * 10**6] + [[]] * 4)),
        "asks for more memory",
    ),
    "another compression": (lambda path: parquet(path, lambda table: table, compression="zstd"), "asks for more memory"),
    "text": (lambda path: (path / "rows" / "part-00000.parquet").write_text("mine"), "expected crc32c"),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_a_row_part_that_is_another_is_refused(path: Path, name: str) -> None:
    harm, said = PARQUETS[name]
    harm(path)
    refused(path, said)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" * 3, b"PAR1" + b"\xff" * 1000 + b"\xe8\x03\0\0PAR1", b"PAR1" + b"\0" * 64 + b"\x40\0\0\0PAR1"]
)
def test_a_row_part_that_is_no_parquet_is_refused(path: Path, data: bytes) -> None:
    (path / "rows" / "part-00000.parquet").write_bytes(data)
    forge.manifest(path, lambda tree: tree["rows"]["parts"][0].update(crc32c=file_crc32c(path / "rows" / "part-00000.parquet")))
    refused(path, "has a damaged part-00000.parquet: it cannot be decoded")


NUMBERS: dict[str, tuple[int, int, int]] = {
    "a row before its slot": (0, 0, -5),
    "a row beyond its slot": (1, 0, 10**6),
    "rows that overlap": (1, 0, 7),
    "a row without tokens": (0, 1, 0),
    "a row of two billion tokens": (0, 1, 2**31 - 1),
    "more labelled tokens than tokens": (0, 2, 31),
    "labelled tokens that overlap": (1, 3, 0),
    "a group that does not begin at nothing": (0, 4, 1),
    "a group that jumps": (1, 4, 5),
    "a copy that is not there": (0, 5, 1),
    "a copy below nothing": (0, 5, -1),
    "a split that is not there": (0, 6, 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_addresses_that_rows_cannot_have_are_refused(path: Path, name: str) -> None:
    row, column, value = NUMBERS[name]
    numbers = Store.open(path).rows.in_slot(0).copy()
    numbers[row, column] = value
    forge.row_slot(path, "numbers", 0, numbers)
    refused(path, "holds addresses in slot 0 that rows cannot have; rows cannot be mended: remove the folder")
