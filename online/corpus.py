"""Text and labels as they lie on disk: a stream of records in a fixed order, larger than memory.

Files of a folder or glob are read sorted by path, records in file order; only the columns that are needed are read. What
rows depend on is a record's content and its place in the whole corpus, never how the corpus is cut into files or batches.
"""

import glob
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.fs
from pydantic import Field, field_validator

from store.strict import Strict, did_you_mean

Format = Literal["parquet", "json", "csv", "arrow", "text"]
FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
_BLOCK = 16 << 20  # bytes; a CSV line may be this long
_LOCAL = pyarrow.fs.LocalFileSystem()


class SourceSpec(Strict):
    """Files that are read one after the other."""

    files: tuple[str, ...] = Field(min_length=1)
    """Files, folders (with their subfolders) and globs."""
    split: Literal["train", "dev", "test"] = "train"
    format: Format | None = None
    """By suffix where not stated: .parquet; .jsonl, .ndjson, .json (one object a line); .csv (with a header); .arrow, .feather;
    .txt, whose only column is ``text``."""
    documents: Literal["line", "blank_line", "file"] = "line"
    """What is one record of plain text: a line, a stretch between blank lines, or a file."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many records."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the corpus."""

    source: int
    """Number of its source in the recipe."""
    file: str
    number: int
    """Its number in the file, counted from 0."""
    ordinal: int
    """Its number in the whole corpus: what masks and held-out splits are drawn from."""
    split: str
    values: dict[str, object]
    """Column -> value."""
    domain: int | None = None
    """Number of its domain, once row building has looked it up."""

    @property
    def where(self) -> str:
        return f"{self.file}, record {self.number} (counted from 0)"


def read_records(
    sources: Sequence[SourceSpec], columns: Sequence[str], *, digest: Callable[[bytes], object] | None = None, read_rows: int = 1024
) -> Iterator[Record]:
    """All records of ``sources`` in order, with the values of ``columns``.

    Args:
        digest: called with bytes that depend on content alone (splits, and the columns' values in order), for a fingerprint.
        read_rows: records read at once; the outcome does not depend on it.

    Raises:
        ValueError: a missing file or column, or a file that is not what its format says.
    """
    names = sorted(set(columns))
    ordinal = 0
    for source_number, source in enumerate(sources):
        if digest is not None:
            digest(f"source {source.split}\n".encode())
        left = source.limit
        for file, format_ in list_files(source):
            if left == 0:
                break
            number = 0
            rows = _read_file(file, format_, source.documents, names, min(read_rows, left or read_rows))
            for values in itertools.islice(rows, left):
                if digest is not None:
                    digest((json.dumps(values, ensure_ascii=False, default=str) + "\n").encode("utf-8", "surrogatepass"))
                yield Record(source_number, str(file), number, ordinal, source.split, dict(zip(names, values, strict=True)))
                number += 1
                ordinal += 1
            left = None if left is None else left - number


def column_names(sources: Sequence[SourceSpec]) -> tuple[str, ...]:
    """The columns of all files of ``sources``, in the order of the first; those of JSON lines are the keys of the first object.

    Raises:
        ValueError: a file is missing, is not what its format says, or has other columns than the first; or none has any.
    """
    first: tuple[Path, list[str]] | None = None
    for source in sources:
        for file, format_ in list_files(source):
            names = _names(file, format_)
            if first is None and names:
                first = file, names
            elif first is not None and names and set(names) != set(first[1]):
                raise ValueError(f"expected the columns {', '.join(first[1])} as in {first[0]}, found {', '.join(names)} in {file}")
    if first is None:
        raise ValueError(f"no records in {', '.join(file for source in sources for file in source.files)}")
    return tuple(first[1])


def list_files(source: SourceSpec) -> Iterator[tuple[Path, Format]]:
    """Every file of ``source`` in reading order, with its format."""
    for entry in source.files:
        path = Path(entry)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix_format(file) in _wanted(source.format))
            if not found:
                raise ValueError(f"{entry}: a folder without {source.format or 'corpus'} files; known suffixes: {', '.join(FORMATS)}")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(entry, recursive=True) if Path(file).is_file())  # noqa: PTH207 (absolute globs)
        if not found:
            near = did_you_mean(path.name, sorted(file.name for file in path.parent.iterdir())) if path.parent.is_dir() else ""
            raise ValueError(f"no such file, folder or glob: {entry}{near}")
        for file in found:
            format_ = source.format or _suffix_format(file)
            if format_ is None:
                raise ValueError(f"{file}: unknown suffix; state the format ({', '.join(dict.fromkeys(FORMATS.values()))})")
            yield file, format_


def _wanted(stated: Format | None) -> set[Format]:
    return {stated} if stated else set(FORMATS.values())


def _suffix_format(file: Path) -> Format | None:
    suffixes = [suffix for suffix in file.suffixes[-2:] if suffix not in _COMPRESSED]
    return FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _read_file(file: Path, format_: Format, documents: str, names: list[str], read_rows: int) -> Iterator[tuple[object, ...]]:
    """The values of columns ``names`` of each record."""
    try:
        if format_ == "text":
            _check_columns(file, names, ["text"])
            with _lines(file) as lines:
                yield from ((document,) for document in _documents(lines, documents))
            return
        if format_ == "json":
            with _lines(file) as lines:
                yield from _objects(file, lines, names)
            return
        for batch in _batches(file, format_, names, read_rows):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as {format_}: {error}") from None


def _names(file: Path, format_: Format) -> list[str]:
    """The columns of a file; none of a JSON file without objects."""
    try:
        if format_ == "text":
            return ["text"]
        if format_ == "json":
            with _lines(file) as lines:
                return next((list(found) for _, found in _parsed(file, lines)), [])
        if format_ == "arrow" and not _has_arrow_footer(file):
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                return list(stream.schema.names)
        return list(_dataset(file, format_, []).schema.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as {format_}: {error}") from None


def _lines(file: Path) -> io.TextIOWrapper:
    """UTF-8 text, decompressed by suffix."""
    return io.TextIOWrapper(pa.input_stream(str(file)), encoding="utf-8-sig")


def _objects(file: Path, lines: Iterable[str], names: list[str]) -> Iterator[tuple[object, ...]]:
    for number, found in _parsed(file, lines):
        _check_columns(f"{file}, line {number}", names, list(found))
        yield tuple(found[name] for name in names)


def _parsed(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Number of a line, and its JSON object. (Arrow guesses types from the first lines, and nulls a file of one line without line feed.)"""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: expected one JSON object on each line: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file}, line {number}: expected one JSON object on each line, found a {type(found).__name__}")
        yield number, found


def _documents(lines: io.TextIOWrapper, documents: str) -> Iterator[str]:
    if documents == "file":
        yield lines.read()
    elif documents == "line":
        yield from (line.removesuffix("\n") for line in lines)
    else:
        document: list[str] = []
        for line in lines:
            if line.strip():
                document.append(line)
            elif document:
                yield "".join(document).removesuffix("\n")
                document = []
        if document:
            yield "".join(document).removesuffix("\n")


def _batches(file: Path, format_: Format, names: list[str], read_rows: int) -> Iterator[pa.RecordBatch]:
    if format_ == "arrow" and not _has_arrow_footer(file):
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            _check_columns(file, names, stream.schema.names)
            for batch in stream:
                yield from (batch.select(names).slice(start, read_rows) for start in range(0, batch.num_rows, read_rows))
        return
    data = _dataset(file, format_, names)
    _check_columns(file, names, data.schema.names)
    yield from data.to_batches(columns=names, batch_size=read_rows, batch_readahead=2, fragment_readahead=1)


def _has_arrow_footer(file: Path) -> bool:
    """Whether an Arrow file has the random-access layout; ``datasets`` writes the streaming one."""
    with file.open("rb") as opened:
        return opened.read(6) == b"ARROW1"


def _dataset(file: Path, format_: Format, names: list[str]) -> ds.Dataset:
    """``file`` as Arrow reads it; columns of a CSV file are text."""
    if format_ == "csv":
        # "007" and "NA" are text; consumers parse what should be numbers
        convert = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
        read, parse = pyarrow.csv.ReadOptions(block_size=_BLOCK), pyarrow.csv.ParseOptions(newlines_in_values=True)
        layout = ds.CsvFileFormat(parse_options=parse, convert_options=convert, read_options=read)
        return ds.dataset([str(file)], format=layout, filesystem=_LOCAL)
    return ds.dataset([str(file)], format="ipc" if format_ == "arrow" else "parquet", filesystem=_LOCAL)


def _check_columns(where: Path | str, names: list[str], found: list[str]) -> None:
    for name in names:
        if name not in found:
            raise ValueError(f"{where} has no column {name!r}{did_you_mean(name, found)}")
