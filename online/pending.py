"""What a batch's features become, on its way from the device to the host."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.batch import Batch
from online.encoded import Encoded
from store.features import FeatureKey


class Pending:
    """Encoded features of one batch, whose copies to the host have been started.

    On a GPU the copies run on a stream of their own into pinned memory, behind what computes the features and beside what is
    computed next. Any thread may ask for :meth:`arrays`.

    Args:
        batch: On the host: where the message of a NaN looks the row up.
        sources: Where each row of it comes from, likewise.
    """

    def __init__(self, encoded: Sequence[Encoded], batch: Batch, sources: Sequence[str] = ()) -> None:
        self._batch, self._sources = batch, sources
        self._copied: torch.cuda.Event | None = None
        tensors = [tensor for one in encoded for tensor in one.tensors]
        if tensors[0].is_cuda:
            tensors, self._copied = _fetched(tensors)
        hosts = iter(tensor.cpu() for tensor in tensors)
        self._encoded = [one.on(hosts) for one in encoded]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        """Bytes on the host."""

    def arrays(self) -> dict[FeatureKey, dict[str, NDArray[np.generic]]]:
        """Feature -> array name -> [U, width] as it is stored, once the device has answered.

        Raises:
            ValueError: a number is not finite as stored; names row and feature.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return {one.key: one.finished(self._batch, self._sources) for one in self._encoded}


def _fetched(tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
    """Pinned tensors that the GPU fills as soon as it has computed ``tensors``, and what happens once they are full."""
    device = tensors[0].device
    stream, copied = _copies(device), torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
    stream.wait_stream(torch.cuda.current_stream(device))
    hosts = []
    with torch.cuda.stream(stream):
        for tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            hosts.append(host.copy_(tensor, non_blocking=True))
            tensor.record_stream(stream)  # its memory is not used again before it is copied
        copied.record(stream)
    return hosts, copied


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
