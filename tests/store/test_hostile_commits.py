"""Commits that make no sense are refused with a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import forge
import pytest
from forge import Tree, read_all
from harm import INSTEAD, limited, nested, refused

from store import StoreError, commits, layout
from store.verify import verify

LINES: dict[str, Callable[[Tree], object]] = {
    "a size below nothing": lambda record: record["files"].update({"final/first": [-1, 7]}),
    "a size of 10^18": lambda record: record["files"].update({"final/first": [10**18, 7]}),
    "a size of 10^30": lambda record: record["files"].update({"final/first": [10**30, 7]}),
    "a size that is a list": lambda record: record["files"].update({"final/first": [[1], 7]}),
    "a size that is a text": lambda record: record["files"].update({"final/first": ["12", 7]}),
    "a size that is a truth": lambda record: record["files"].update({"final/first": [True, 7]}),
    "a size of a compressed file below its index": lambda record: record["files"].update({"final/all": [3, 7]}),
    "a size of a compressed file of nothing": lambda record: record["files"].update({"final/all": [0, 0]}),
    "no size": lambda record: record["files"].update({"final/first": []}),
    "files that are a list": lambda record: record.update(files=[1, 2]),
    "files that are a number": lambda record: record.update(files=7),
    "a missing file": lambda record: record["files"].pop("final/first"),
    "a shard that is a text": lambda record: record.update(shard="../0"),
    "a shard below nothing": lambda record: record.update(shard=-1),
    "a shard of thirty digits": lambda record: record.update(shard=10**30),
    "a shard that is not there": lambda record: record.update(shard=99),
    "a pass that is a list": lambda record: record.update({"pass": []}),
    "a pass that is not there": lambda record: record.update({"pass": "../bert"}),
    "no shard": lambda record: record.pop("shard"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_commit_that_makes_no_sense_is_refused(path: Path, name: str) -> None:
    forge.log(path, lambda record: LINES[name](record) if record["shard"] == 0 else None)
    with limited():
        with pytest.raises(StoreError, match=r"mend it with|start its dump again"):
            read_all(path)
        verify(path)


@pytest.mark.parametrize("text", [b"[" * 10**5, b"7", b"null", b'{"pass": NaN}', b'{"a": 1, "a": 1}', b'{"a":' * 10**5, b"\xff\xfe", b""])
def test_a_line_of_the_log_that_is_no_commit_is_refused(path: Path, text: bytes) -> None:
    log = path / "commits" / "0.log"
    log.write_bytes(forge.line(text) + log.read_bytes())
    refused(path, r"0.log: .* fails? .* checksum; mend it with: teacher-dump verify --repair")


@pytest.mark.parametrize("instead", INSTEAD)
def test_a_table_of_commits_that_is_no_plain_file_is_refused(path: Path, instead: str) -> None:
    commits.compact(path)
    table = layout.commit_table(path)
    shutil.copyfile(table, table.with_name("moved"))
    table.unlink()
    INSTEAD[instead](table)
    refused(path, r"table.log: (expected a plain file|expected at most|the file|lines)")


TABLES: dict[str, Tree | list | int] = {
    "lists of another length": {"pass": "bert", "arrays": ["final/all"], "shards": [0, 1], "bytes": [[1]], "crc32c": [[1]]},
    "lists that are none": {"pass": "bert", "arrays": 7, "shards": 7, "bytes": 7, "crc32c": 7},
    "deep lists": {"pass": "bert", "arrays": ["final/all"], "shards": [nested(90)], "bytes": [[1]], "crc32c": [[1]]},
    "numbers beyond all": {"pass": "bert", "arrays": ["final/all"], "shards": [10**30], "bytes": [[1]], "crc32c": [[1]]},
    "no object": [1, 2, 3],
    "a number": 7,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_line_of_the_table_of_commits_that_is_no_commit_is_refused(path: Path, name: str) -> None:
    commits.compact(path)
    table = layout.commit_table(path)
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join([lines[0], forge.line(json.dumps(TABLES[name]).encode()), *lines[2:]]))
    refused(path, "table.log: .* fail their checksum; mend it with: teacher-dump verify --repair")
