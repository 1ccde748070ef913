"""The torch half of store.codecs.ids: word ids in few bits, packed and unpacked on their device.

Shapes: n units, K ids of each, Y bytes of each, G groups of 8 ids.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(ids_nK: Tensor, bits: int) -> Tensor:
    """[n, Y] uint8 bytes of ids of so many bits."""
    count = ids_nK.shape[1]
    ids_nG8 = F.pad(ids_nK.int(), (0, -count % 8)).unflatten(1, (-1, 8))
    bytes_nGb = ids_nG8.new_empty(*ids_nG8.shape[:2], bits, dtype=torch.uint8)
    for byte in range(bits):
        first, shift = divmod(8 * byte, bits)
        part_nG = ids_nG8[..., first] >> shift
        if shift > bits - 8:
            part_nG |= ids_nG8[..., first + 1] << (bits - shift)
        bytes_nGb[..., byte] = part_nG & 0xFF
    return bytes_nGb.flatten(1)[:, : -(-count * bits // 8)].contiguous()


def unpack(bytes_nY: Tensor, bits: int) -> Tensor:
    """[n, K] int64 ids in bytes."""
    width = bytes_nY.shape[1]
    count = width * 8 // bits
    bytes_nGb = F.pad(bytes_nY, (0, -(-count // 8) * bits - width)).unflatten(1, (-1, bits))
    ids_nG8 = bytes_nGb.new_empty(*bytes_nGb.shape[:2], 8, dtype=torch.int64)
    for number in range(8):
        first, shift = divmod(number * bits, 8)
        window_nG = bytes_nGb[..., first].int()
        for further in range(1, (shift + bits + 7) // 8):  # at most 31 bits, so that the sign is none of them
            window_nG |= bytes_nGb[..., first + further].int() << (8 * further)
        ids_nG8[..., number] = (window_nG >> shift) & ((1 << bits) - 1)
    return ids_nG8.flatten(1)[:, :count]
