"""Word ids of large vocabularies in as many bits as they need, one after the other, the lowest bit first.

Id i of a unit has the bits from i * b on, of ceil(K * b / 8) bytes; b is 17 to 24. Up to 65,536 words ids are plain uint16: packing 64 of
them into 15 bits would save 6 % of their bytes, and 0.3 million tokens a second read, not 15 million (a busy core). In 17 and
18 bits it saves 44 % of int32.

Shapes: n units, K ids of each, Y bytes of each, G groups of 8 ids, whose b bytes share nothing with others.
"""

import numpy as np
from numpy.typing import NDArray

from store.features import ArraySpec


def ids_array(count: int, words: int) -> ArraySpec:
    """The array ``ids`` of ``count`` ids of a vocabulary of so many words."""
    bits = (words - 1).bit_length()
    if bits <= 16:
        return ArraySpec(name="ids", dtype="uint16", width=count)
    return ArraySpec(name="ids", dtype="uint8", width=-(-count * bits // 8), bits=bits)


def pack(ids_nK: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """[n, Y] the bytes of ids of so many bits."""
    count = ids_nK.shape[1]
    groups = -(-count // 8)  # of 8 ids, whose bits end with a byte
    ids_nG8 = np.zeros((len(ids_nK), groups * 8), np.uint32)
    ids_nG8[:, :count] = ids_nK
    ids_nG8 = ids_nG8.reshape(len(ids_nK), groups, 8)
    bytes_nGb = np.empty((len(ids_nK), groups, bits), np.uint8)
    for byte in range(bits):
        first, shift = divmod(8 * byte, bits)
        part_nG = ids_nG8[..., first] >> np.uint32(shift)
        if shift > bits - 8:
            part_nG |= ids_nG8[..., first + 1] << np.uint32(bits - shift)
        bytes_nGb[..., byte] = part_nG  # its lowest 8 bits
    return np.ascontiguousarray(bytes_nGb.reshape(len(ids_nK), groups * bits)[:, : -(-count * bits // 8)])


def unpack(bytes_nY: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """[n, K] the ids in bytes."""
    width = bytes_nY.shape[1]
    count = width * 8 // bits
    groups = -(-count // 8)
    bytes_nGb = np.zeros((len(bytes_nY), groups * bits), np.uint8)
    bytes_nGb[:, :width] = bytes_nY
    bytes_nGb = bytes_nGb.reshape(len(bytes_nY), groups, bits)
    ids_nG8 = np.empty((len(bytes_nY), groups, 8), np.int64)
    for number in range(8):
        first, shift = divmod(number * bits, 8)
        window_nG = bytes_nGb[..., first].astype(np.uint32)
        for further in range(1, (shift + bits + 7) // 8):
            window_nG |= bytes_nGb[..., first + further].astype(np.uint32) << np.uint32(8 * further)
        ids_nG8[..., number] = (window_nG >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
    return ids_nG8.reshape(len(bytes_nY), groups * 8)[:, :count]
