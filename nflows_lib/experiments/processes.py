"""What several processes that train one flow together, one per GPU, must agree on.

``torchrun --standalone --nproc-per-node 4 -m nflows_lib train RUN`` starts four processes on one machine. Each process
holds the whole flow and takes its share of every batch. A process that was started alone has rank 0 in a world of size
1, and every function here then returns what it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nflows_lib import settings


@contextmanager
def process_group() -> Iterator[torch.device]:
    """A context that gives this process's device: a GPU if there is one, unless ``NFLOWS_DEVICE`` names another device.

    Within the context, a process that torchrun started belongs to the group of processes.

    Raises:
        ValueError: if there are GPUs but fewer than processes, or if torchrun is to train on mps.
    """
    device = settings.device(prefer_gpu=True)
    if not torchrun():
        yield device
        return
    if device.type == "mps":
        raise ValueError(
            "NFLOWS_DEVICE: expected cuda or cpu under torchrun, which cannot connect processes on mps, got mps"
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"nproc-per-node: expected at most {gpus}, the number of GPUs, got at least {local + 1}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield device
    # This line is skipped after an error: the other processes may not have met the error, and waiting for them here
    # would hide it from torchrun.
    dist.destroy_process_group()


def torchrun() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def world_size() -> int:
    """The number of processes that train together; 1 outside :func:`process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0 on. Rank 0 decides, evaluates, writes and prints."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if torchrun() else 0


def launcher() -> str:
    """The program that starts this number of processes, for a command in a message or a record."""
    count = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun() else 1
    return f"torchrun --standalone --nproc-per-node {count}" if count > 1 else "python"


def shard(rows: Tensor) -> Tensor:
    """This process's share of the rows."""
    return rows.chunk(world_size())[rank()] if world_size() > 1 else rows


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is True in any process."""
    if world_size() == 1:
        return flags
    counts = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(counts)
    return tuple((counts > 0).tolist())


def broadcast(value: Any) -> Any:
    """The value of rank 0, returned in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, returned in every process."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found
