"""Base densities on the latent space, without trainable parameters.

Chapter 1 (F4) shows what goes wrong if both the base density and the flow's scaling layer have a trainable scale
factor.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_lib.bijection import sum_per_example


class Base(Protocol):
    """The interface of a base density of a :class:`~nflows_lib.flow.Flow`.

    Every dimension of the latent is independent of the others.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log p_Z(z)` in nats: ``(B, ...)`` to ``(B,)``."""
        ...

    def sample(self, like: Tensor) -> Tensor:
        """Return a draw with the shape, device and dtype of ``like``."""
        ...


class StandardNormal:
    r"""Independent standard normal densities, one per dimension.

    The density is at most :math:`(2\pi)^{-D/2}`, its value at :math:`z = 0`.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log p_Z(z)` in nats: ``(B, ...)`` to ``(B,)``."""
        return -0.5 * (sum_per_example(z.square()) + math.prod(z.shape[1:]) * math.log(2 * math.pi))

    def sample(self, like: Tensor) -> Tensor:
        """Return a draw with the shape, device and dtype of ``like``."""
        return torch.randn_like(like)


class StandardLogistic:
    r"""Independent standard logistic densities, one per dimension (Dinh et al. 2014, section 3.4).

    The density is at most :math:`4^{-D}`, its value at :math:`z = 0`. Each dimension has variance :math:`\pi^2 / 3`.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log p_Z(z)` in nats: ``(B, ...)`` to ``(B,)``."""
        return sum_per_example(-F.softplus(z) - F.softplus(-z))

    def sample(self, like: Tensor) -> Tensor:
        """Return a draw with the shape, device and dtype of ``like``."""
        # rand_like can return exactly 0, whose logit is -inf. On a CPU its values are multiples of half an epsilon, so
        # that the clamp changes no other value.
        tail = torch.finfo(like.dtype).eps / 2
        return torch.logit(torch.rand_like(like), eps=tail)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's global random state, on the CPU and on the device, when the block ends."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield
