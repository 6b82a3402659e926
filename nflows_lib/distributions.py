"""Base densities on the latent space. None has a trainable parameter: chapter 1 (F4) shows what goes wrong with one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_lib.bijection import sum_per_example


class Base(Protocol):
    """What a :class:`~nflows_lib.flow.Flow` asks of its base density; every dimension is independent of the others."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: (B, ...) to (B,)."""
        ...

    def sample(self, like: Tensor) -> Tensor:
        """A draw of the shape, device and dtype of ``like``."""
        ...


class StandardNormal:
    """Independent N(0, 1) in every dimension. Its density is at most (2 pi)^(-D/2), at z = 0."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: (B, ...) to (B,)."""
        return -0.5 * (sum_per_example(z.square()) + math.prod(z.shape[1:]) * math.log(2 * math.pi))

    def sample(self, like: Tensor) -> Tensor:
        """A draw of the shape, device and dtype of ``like``."""
        return torch.randn_like(like)


class StandardLogistic:
    """Independent standard logistic in every dimension (Dinh et al. 2014, section 3.4).

    Its density is at most 4^(-D), at z = 0; its variance is pi^2 / 3.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats: (B, ...) to (B,)."""
        return sum_per_example(-F.softplus(z) - F.softplus(-z))

    def sample(self, like: Tensor) -> Tensor:
        """A draw of the shape, device and dtype of ``like``."""
        # rand_like can return exactly 0, whose logit is -inf; half an epsilon is half the step between its values.
        tail = torch.finfo(like.dtype).eps / 2
        return torch.logit(torch.rand_like(like), eps=tail)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """torch's global random state is the same before and after, on the CPU and on the device."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield
