"""Several processes that train one flow together, one for each GPU: what they must agree on.

``torchrun --standalone --nproc-per-node 4 -m nflows_lib train RUN`` starts them, on one machine. Each holds the whole
flow and takes its share of every batch. A process that was started alone is number 0 of 1, and everything here gives
back what it got.
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

_alone = False


@contextmanager
def joined() -> Iterator[torch.device]:
    """This process's device: a GPU if there is one, unless ``NFLOWS_DEVICE`` names another device.

    A process that torchrun started is in the group as long as this lasts.

    Raises:
        ValueError: there are GPUs, but fewer than processes.
    """
    device = settings.device(prefer_gpu=True)
    if not torchrun():
        yield device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"nproc-per-node: expected at most {gpus}, the number of GPUs, got more than {local}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield device
    # Not after an error, which the others may not have met: waiting for them would keep torchrun from seeing it.
    dist.destroy_process_group()


def torchrun() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


@contextmanager
def alone() -> Iterator[None]:
    """What a process does without the others: as long as this lasts, it is number 0 of 1."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def processes() -> int:
    """How many train together; 1 outside :func:`joined`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def number() -> int:
    """Which one this is, from 0 on. Number 0 decides, evaluates, writes and speaks."""
    if _alone:
        return 0
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if torchrun() else 0


def launcher() -> str:
    """What starts as many processes as there are, for the command that a message or a record names."""
    count = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun() else 1
    return f"torchrun --standalone --nproc-per-node {count}" if count > 1 else "python"


def share(rows: Tensor) -> Tensor:
    """This process's part of the rows."""
    return rows.chunk(processes())[number()] if processes() > 1 else rows


def mean(values: Tensor) -> Tensor:
    """The mean over the processes of tensors of one shape. A gradient comes back to each through it."""
    return _Sum.apply(values) / processes() if processes() > 1 else values


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is up in any process."""
    if processes() == 1:
        return flags
    counts = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(counts)
    return tuple((counts > 0).tolist())


def shared(value: Any) -> Any:
    """What number 0 gives, in every process."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What each process gives, in the order of their numbers, in every process."""
    found = [value] * processes()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


class _Sum(torch.autograd.Function):
    """The sum over the processes. What one of them holds acts on the losses of all, whose gradients add up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
