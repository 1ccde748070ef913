"""Lines of the commit logs: eight hexadecimal digits, the crc32c of the rest, a space, and a JSON object.

``{"pass", "shard", "files": {array: [bytes, crc32c]}}`` commits a shard of a pass, ``{"pass", "shard", "drop": true}``
takes it back. In the table, ``{"pass", "arrays", "shards", "bytes", "crc32c"}`` commits many shards that have the same
arrays, with a list of numbers for each; its first line is ``{"generation", "lines"}``. Either kind of commit has
``"batch_tokens"`` where that is not the number of the pass.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from store import layout
from store.errors import CorruptShard
from store.plain import open_plain, why
from store.publish import crc32c
from store.shards import Seal
from store.strict import load_json

MOST_BYTES = 1 << 30
"""A log may be so long: that of a million shards of ten features."""

T = TypeVar("T")

_MANY = 256
"""Shards of one line of the table: what is lost with it."""


@dataclass(frozen=True)
class Commit:
    """One shard of one pass, and what each of its files must be."""

    pass_name: str
    shard: int
    files: dict[str, Seal]
    """Array (store.layout.array_name) -> length and checksum of the shard's file. A shard without any is taken back."""
    writer: int = 0
    """Whose log says so; where the table does, whose log takes it back."""
    batch_tokens: int | None = None
    """Padded tokens of the teacher's batches where they were not those of the pass."""


class Table(NamedTuple):
    """What the logs of earlier generations said."""

    generation: int
    commits: list[Commit]
    whole: bool
    """Whether no line is missing or damaged."""


def read_lines(path: Path, start: int = 0) -> list[bytes]:
    """The lines of a log from byte ``start`` on, none where there is no log; a last one may lack its end.

    Raises:
        CorruptShard: it is not a plain file that can be read.
    """
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
                raise OSError(f"expected at most {MOST_BYTES:,} bytes, found {size:,}")
            file.seek(start)
            return re.findall(rb"[^\n]*\n|[^\n]+", file.read())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CorruptShard(f"{path}: {why(error)}; put back a copy of it, or remove it to make its shards again") from None


def line(record: object) -> bytes:
    """``record`` as a line."""
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (crc32c(text), text)


def commit_line(commit: Commit) -> bytes:
    """The line that commits one shard, or takes it back."""
    where = {"pass": commit.pass_name, "shard": commit.shard}
    if not commit.files:
        return line({**where, "drop": True})
    return line({**where, **_batches(commit), "files": {name: list(seal) for name, seal in commit.files.items()}})


def commits_of(of_line: bytes, writer: int = 0) -> list[Commit] | None:
    """What a line says; None where it is damaged."""
    try:
        record = parsed(of_line)
        pass_name = _of_type(str, record["pass"])
        tokens = _number(record.get("batch_tokens", 0)) or None
        if "shards" in record:
            names = [_of_type(str, name) for name in record["arrays"]]
            rows = zip(_numbers(record["shards"]), record["bytes"], record["crc32c"], strict=True)
            return [Commit(pass_name, shard, _files(names, sizes, crcs), writer, tokens) for shard, sizes, crcs in rows]
        if record.get("drop"):
            return [Commit(pass_name, _number(record["shard"]), {}, writer)]
        named = _of_type(dict, record["files"])
        files = _files(list(named), *zip(*named.values(), strict=True))
        return [Commit(pass_name, _number(record["shard"]), files, writer, tokens)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def table_bytes(generation: int, commits: Iterable[Commit]) -> bytes:
    """The table that says ``commits``."""
    ordered = sorted(commits, key=lambda commit: (*_kind(commit), commit.shard))
    lines = []
    for (pass_name, arrays, _), group in groupby(ordered, key=_kind):
        alike = list(group)
        for some in (alike[start : start + _MANY] for start in range(0, len(alike), _MANY)):
            record = {
                "pass": pass_name,
                **_batches(alike[0]),
                "arrays": arrays,
                "shards": [commit.shard for commit in some],
                "bytes": [[seal.size for seal in commit.files.values()] for commit in some],
                "crc32c": [[seal.crc32c for seal in commit.files.values()] for commit in some],
            }
            lines.append(line(record))
    return b"".join([line({"generation": generation, "lines": len(lines)}), *lines])


def read_table(store: Path) -> Table:
    """The table of a store; generation 0 has none."""
    path = layout.commit_table(store)
    there = path.exists()  # asked first: a writer may put one there while this reads nothing
    lines = read_lines(path)
    said = [commits_of(of_line) for of_line in lines[1:]]
    commits = [commit for of_line in said if of_line for commit in of_line]
    try:
        header = parsed(lines[0])
        return Table(_number(header["generation"]), commits, None not in said and len(said) == _number(header["lines"]))
    except IndexError:
        return Table(0, [], not (there and path.exists()))
    except (ValueError, KeyError, TypeError):
        return Table(_newest(store), commits, False)


def generation(store: Path) -> int:
    """Which generation of logs is now."""
    try:
        with os.fdopen(open_plain(layout.commit_table(store)), "rb") as file:
            return _number(parsed(file.readline(1 << 10))["generation"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError):
        return read_table(store).generation


def logs(store: Path) -> Iterator[tuple[Path, int]]:
    """All commit logs that lie in a store, with their generations."""
    for path in (store / "commits").glob("*.log"):
        if match := re.fullmatch(r"\d+(?:\.(\d+))?\.log", path.name):
            yield path, int(match[1] or 0)


def _newest(store: Path) -> int:
    """The generation of a table whose first line is damaged: that of the newest logs, if there are any yet."""
    return max((number for _, number in logs(store)), default=0)


def parsed(of_line: bytes) -> dict[str, Any]:
    """The checked object of a line; a ValueError where there is none."""
    digits, _, text = of_line.removesuffix(b"\n").partition(b" ")
    if not of_line.endswith(b"\n") or digits != b"%08x" % crc32c(text):
        raise ValueError("the line fails its checksum")
    return _of_type(dict, load_json(text))


def _kind(commit: Commit) -> tuple[str, tuple[str, ...], int]:
    """What commits of one line of the table have in common."""
    return commit.pass_name, tuple(commit.files), commit.batch_tokens or 0


def _batches(commit: Commit) -> dict[str, int]:
    return {} if commit.batch_tokens is None else {"batch_tokens": commit.batch_tokens}


def _files(names: Sequence[str], sizes: Sequence[Any], crcs: Sequence[Any]) -> dict[str, Seal]:
    return dict(zip(names, map(Seal, _numbers(sizes), _numbers(crcs)), strict=True))


def _numbers(values: Sequence[Any]) -> Sequence[int]:
    if values and (set(map(type, values)) != {int} or min(values) < 0 or max(values) >= 1 << 63):
        raise ValueError("not numbers that count")
    return values


def _number(value: object) -> int:
    return _numbers([value])[0]


def _of_type(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}")
    return value
