"""The ranks of a job, and how they are divided into replicas that hold one copy of a model each.

Each replica has a process group of its own, its default one: DeepSpeed, FSDP and tensor parallelism see nothing else, and a replica that
fails or lags holds no other up. What replicas share is the store.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from online.ranks import Ranks, talking

TIMEOUT = 1800.0
"""Seconds that the ranks of a replica wait for each other: the first may have a store's rows to build."""


@dataclass(frozen=True)
class Replica:
    """This process among the others of its job."""

    job_rank: int
    job_size: int
    number: int
    """Of this replica in the job."""
    rank: int
    """Of this process in its replica."""
    size: int
    """Ranks of each replica."""
    local_rank: int
    """Of this process on its machine: the number of its GPU."""
    ranks: Ranks
    """Those of this replica, talking to each other."""

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica."""
        return self.rank == 0

    def device(self, wanted: str | None) -> torch.device:
        """The device of this rank: what is wanted, or its own GPU if there is one."""
        if wanted is not None and not (wanted == "cuda" and self.job_size > 1):
            return torch.device(wanted)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device


@contextlib.contextmanager
def joined(size: int, grouped: bool) -> Iterator[Replica]:
    """Take this process's place in its job, as torchrun or another launcher has said it in the environment.

    Args:
        size: Ranks of a replica.
        grouped: Whether they are to have a process group; a single rank needs one for DeepSpeed and FSDP.

    Raises:
        ValueError: ``size`` does not divide the ranks of the job.
        RankLost: inside, another rank of the replica is gone or does not answer.
    """
    rank, count, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count % size:
        raise ValueError(
            f"sharding.size {size} does not divide the {count} ranks of this job; expected {' or '.join(map(str, _divisors(count)))}, "
            f"or start another number of ranks, as in `teacher-dump run RECIPE --nproc {size}`"
        )
    number, own = divmod(rank, size)
    if not grouped:
        yield Replica(rank, count, number, own, size, local, Ranks(TIMEOUT))
        return
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    timeout = timedelta(seconds=TIMEOUT)
    store: Store = HashStore()
    try:
        with talking():  # whatever the ranks of a replica do from here on they do together
            if size > 1:
                store = PrefixStore(f"replica{number}", next(iter(rendezvous("env://", rank, count, timeout=timeout)))[0])
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", count)))
            os.environ.update(RANK=str(own), WORLD_SIZE=str(size), LOCAL_RANK=str(local), LOCAL_SIZE=str(min(size, local_ranks)))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=timeout)
            yield Replica(rank, count, number, own, size, local, Ranks(TIMEOUT))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]
