"""The benchmarks' rows as other libraries keep them in Zarr: see peers.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from workload import CHUNK, LONGEST, SLOT_TOKENS, Ints, Read, Workload, gather

if TYPE_CHECKING:
    import tensorstore

CACHE_BYTES = 64 << 20
"""What tensorstore may keep: the indices of all shards, not the values."""

PADDED_SHARD = 4096
"""Rows."""


def sharding(chunk: list[int]) -> list[dict[str, Any]]:
    """Zarr codecs: shards of chunks with crc32c."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": chunk,
                "codecs": [little, {"name": "crc32c"}],
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
    ]


def tensorstore_array(
    folder: Path, name: str, shape: list[int], shard: list[int], chunk: list[int], array: NDArray[Any]
) -> "tensorstore.TensorStore":
    """A new Zarr array through tensorstore."""
    import tensorstore as ts

    return ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}},
        create=True, dtype=array.dtype.name, shape=shape, codec=ts.CodecSpec({"driver": "zarr3", "codecs": sharding(chunk)}),
        chunk_layout=ts.ChunkLayout(write_chunk_shape=shard, read_chunk_shape=chunk),
    ).result()  # fmt: skip


def tensorstore_opened(folder: Path, workload: Workload) -> list["tensorstore.TensorStore"]:
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    where = [{"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}} for name in workload.arrays]
    return [ts.open(spec, context=context, open=True, recheck_cached_data=False).result() for spec in where]


def write_tensorstore(folder: Path, workload: Workload) -> None:
    """Packed tokens in whole Zarr shards."""
    wide = {name: array.shape[1] for name, array in workload.arrays.items()}
    stores = {
        name: tensorstore_array(folder, name, list(array.shape), [SLOT_TOKENS, wide[name]], [CHUNK, wide[name]], array)
        for name, array in workload.arrays.items()
    }
    for start in range(0, workload.tokens, SLOT_TOKENS):
        tokens = slice(start, min(start + SLOT_TOKENS, workload.tokens))
        for future in [stores[name][tokens].write(array[tokens]) for name, array in workload.arrays.items()]:
            future.result()


def open_tensorstore(folder: Path, workload: Workload) -> Read:
    stored = tensorstore_opened(folder, workload)

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        places = list(map(slice, workload.first[rows].tolist(), workload.first[rows + 1].tolist()))
        futures = [[source[place].read() for place in places] for source in stored]
        packed = workload.packed(int(workload.lengths[rows].sum()))
        for parts, out in zip(futures, packed, strict=True):
            np.concatenate([part.result() for part in parts], out=out)
        return packed

    return read


def write_tensorstore_padded(folder: Path, workload: Workload) -> None:
    """Padded rows, a chunk for each: what suits this reader best."""
    count = len(workload.lengths)
    for name, array in workload.arrays.items():
        wide = [LONGEST, array.shape[1]]
        padded = np.zeros([count, *wide], array.dtype)
        for row, length in enumerate(workload.lengths.tolist()):
            padded[row, :length] = array[workload.first[row] : workload.first[row + 1]]
        store = tensorstore_array(folder, name, [count, *wide], [min(PADDED_SHARD, count), *wide], [1, *wide], array)
        store.write(padded).result()


def open_tensorstore_padded(folder: Path, workload: Workload) -> Read:
    stored = tensorstore_opened(folder, workload)

    def read(rows: Ints) -> Sequence[NDArray[Any]]:
        futures = [source[rows].read() for source in stored]
        return [future.result() for future in futures]

    return read


def write_zarr(folder: Path, workload: Workload) -> None:
    """Packed tokens in whole shards."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    stores = {
        name: zarr.create_array(
            folder / name, shape=array.shape, shards=(SLOT_TOKENS, array.shape[1]), chunks=(CHUNK, array.shape[1]), dtype=array.dtype,
            serializer=BytesCodec(), compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
        )
        for name, array in workload.arrays.items()
    }  # fmt: skip
    for start in range(0, workload.tokens, SLOT_TOKENS):
        tokens = slice(start, min(start + SLOT_TOKENS, workload.tokens))
        for name, array in workload.arrays.items():
            stores[name][tokens] = array[tokens]


def open_zarr(folder: Path, workload: Workload) -> Read:
    import zarr

    return gather([zarr.open_array(folder / name, mode="r") for name in workload.arrays], workload)
