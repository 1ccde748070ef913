"""What other libraries make of the benchmarks' rows: each writes a workload its own way and gives back batches of rows.

``write(folder, workload)`` takes the rows shard by shard, as a teacher answers them. ``opened(folder, workload)`` gives a
function from row numbers [n] to the arrays of these rows, in the order of ``workload.arrays``: packed [tokens, W], or padded
[n, LONGEST, W]. Each is used as its documentation advises for random reads, with the settings that measured best here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from workload import CHUNK, Ints, Read, Workload, gather
from zarr_peers import (
    open_tensorstore,
    open_tensorstore_padded,
    open_zarr,
    write_tensorstore,
    write_tensorstore_padded,
    write_zarr,
)


class Peer(NamedTuple):
    """One library, or one way to use it."""

    write: Callable[[Path, Workload], None]
    opened: Callable[[Path, Workload], Read]
    checks: bool
    """Whether it stores checksums, and compares what it reads with them."""


def write_raw(folder: Path, workload: Workload) -> None:
    """A file of nothing but values for each array."""
    for name, array in workload.arrays.items():
        array.tofile(folder / f"{name}.bin")


def open_raw(folder: Path, workload: Workload) -> Read:
    maps = [np.memmap(folder / f"{name}.bin", array.dtype, "r", shape=array.shape) for name, array in workload.arrays.items()]
    return gather([np.asarray(each) for each in maps], workload)


def write_safetensors(folder: Path, workload: Workload) -> None:
    """A file for each shard."""
    from safetensors.numpy import save_file

    for number, (start, stop) in enumerate(workload.shards):
        save_file(workload.of_rows(start, stop), folder / f"{number}.safetensors")


def open_safetensors(folder: Path, workload: Workload) -> Read:
    from safetensors import safe_open

    files = [safe_open(folder / f"{number}.safetensors", "numpy") for number in range(len(workload.shards))]
    slices = [[file.get_slice(name) for file in files] for name in workload.arrays]

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        places = list(zip(*workload.places(rows), strict=True))
        packed = workload.packed(int(workload.lengths[rows].sum()))
        for shards, out in zip(slices, packed, strict=True):
            np.concatenate([shards[shard][start:stop] for shard, start, stop in places], out=out)
        return packed

    return read


def arrow_table(workload: Workload, start: int, stop: int) -> pa.Table:
    """Consecutive rows with a binary column for each array, without a copy."""
    tokens = workload.first[start : stop + 1] - workload.first[start]
    columns = {}
    for name, array in workload.of_rows(start, stop).items():
        offsets = pa.py_buffer(tokens * (array.itemsize * array.shape[1]))
        columns[name] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), stop - start, [None, offsets, pa.py_buffer(array)])
    return pa.table(columns)


def write_arrow(folder: Path, workload: Workload) -> None:
    """An IPC file with a record batch for each shard."""
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink:
        writer = None
        for start, stop in workload.shards:
            table = arrow_table(workload, start, stop)
            writer = writer or pa.ipc.new_file(sink, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def open_arrow(folder: Path, workload: Workload) -> Read:
    file = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    columns = [[batch.column(name) for batch in batches] for name in workload.arrays]

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        shards = workload.shard_of[rows]
        places = list(zip(shards.tolist(), (rows - workload.shard_first[shards]).tolist(), strict=True))
        packed = workload.packed(int(workload.lengths[rows].sum()))
        for parts, out in zip(columns, packed, strict=True):
            values = [np.frombuffer(parts[shard][row].as_buffer(), np.uint8) for shard, row in places]
            np.concatenate(values, out=out.reshape(-1).view(np.uint8))
        return packed

    return read


def write_datasets(folder: Path, workload: Workload) -> None:
    """The Arrow stream that a Dataset is kept in."""
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(folder / "data.arrow")) as writer:
        for start, stop in workload.shards:
            writer.write_table(arrow_table(workload, start, stop))
        writer.finalize()


def open_datasets(folder: Path, workload: Workload) -> Read:
    from datasets import Dataset

    rows_of = Dataset.from_file(str(folder / "data.arrow")).with_format("arrow")

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        table = rows_of[rows]
        packed = workload.packed(int(workload.lengths[rows].sum()))
        for name, out in zip(workload.arrays, packed, strict=True):
            flat = out.reshape(-1).view(np.uint8)
            filled = 0
            for part in table.column(name).chunks:
                offsets = np.frombuffer(part.buffers()[1], np.int64)[part.offset : part.offset + len(part) + 1]
                size = int(offsets[-1] - offsets[0])
                flat[filled : filled + size] = np.frombuffer(part.buffers()[2], np.uint8, size, int(offsets[0]))
                filled += size
        return packed

    return read


def write_h5py(checked: bool) -> Callable[[Path, Workload], None]:
    """One file; datasets that lie in one piece, or in chunks with fletcher32 checksums."""

    def write(folder: Path, workload: Workload) -> None:
        import h5py

        with h5py.File(folder / "rows.h5", "w", libver="latest") as file:
            for name, array in workload.arrays.items():
                how: dict[str, Any] = {"chunks": (CHUNK, array.shape[1]), "fletcher32": True} if checked else {}
                file.create_dataset(name, array.shape, array.dtype, **how)
            for start, stop in workload.shards:
                for name, values in workload.of_rows(start, stop).items():
                    file[name].write_direct(values, dest_sel=np.s_[workload.first[start] : workload.first[stop]])

    return write


def open_h5py(folder: Path, workload: Workload) -> Read:
    import h5py

    file = h5py.File(folder / "rows.h5", "r")
    stored = [file[name] for name in workload.arrays]

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        length = workload.lengths[rows]
        first, start = workload.first[rows].tolist(), (np.cumsum(length) - length).tolist()
        packed = workload.packed(int(length.sum()))
        for source, out in zip(stored, packed, strict=True):
            for begin, at, count in zip(first, start, length.tolist(), strict=True):
                source.read_direct(out, np.s_[begin : begin + count], np.s_[at : at + count])
        return packed

    return read


def record(workload: Workload, row: int) -> bytes:
    """One row, its arrays one after another."""
    return b"".join(values.tobytes() for values in workload.of_rows(row, row + 1).values())


def unpacked(records: Sequence[bytes], workload: Workload, rows: Ints) -> Sequence[NDArray[Any]]:
    """Records as packed arrays."""
    data = [np.frombuffer(each, np.uint8) for each in records]
    lengths = workload.lengths[rows].tolist()
    packed, end = workload.packed(sum(lengths)), 0
    for out in packed:
        begin, end = end, end + out.itemsize * out.shape[1]
        parts = [each[length * begin : length * end] for each, length in zip(data, lengths, strict=True)]
        np.concatenate(parts, out=out.reshape(-1).view(np.uint8))
    return packed


def write_litdata(chunk_bytes: str) -> Callable[[Path, Workload], None]:
    """An item for each row, in files of so many bytes."""

    def write(folder: Path, workload: Workload) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes)
        for row in range(len(workload.lengths)):
            writer.add_item(row, record(workload, row))
        writer.done()
        writer.merge()

    return write


def open_litdata(folder: Path, workload: Workload) -> Read:
    from litdata import StreamingDataset

    items = StreamingDataset(str(folder), batch_decode=0)
    return lambda rows: unpacked([items[row] for row in rows.tolist()], workload, rows)


def write_array_record(folder: Path, workload: Workload) -> None:
    """A record for each row."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "rows.array_record"), "group_size:1,uncompressed")
    for row in range(len(workload.lengths)):
        writer.write(record(workload, row))
    writer.close()


def open_array_record(folder: Path, workload: Workload) -> Read:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(folder / "rows.array_record"), "readahead_buffer_size:0,max_parallelism:0")
    return lambda rows: unpacked(reader.read(rows.tolist()), workload, rows)


PEERS: dict[str, Peer] = {
    "raw memmap": Peer(write_raw, open_raw, False),
    "safetensors": Peer(write_safetensors, open_safetensors, False),
    "Arrow IPC": Peer(write_arrow, open_arrow, False),
    "HF datasets": Peer(write_datasets, open_datasets, False),
    "h5py": Peer(write_h5py(False), open_h5py, False),
    "h5py fletcher32": Peer(write_h5py(True), open_h5py, True),
    "tensorstore": Peer(write_tensorstore, open_tensorstore, True),
    "tensorstore padded": Peer(write_tensorstore_padded, open_tensorstore_padded, True),
    "zarr-python": Peer(write_zarr, open_zarr, True),
    "litdata": Peer(write_litdata("64MB"), open_litdata, False),
    "litdata one file": Peer(write_litdata("4GB"), open_litdata, False),
    "ArrayRecord": Peer(write_array_record, open_array_record, True),
}
