"""Coupling layers: half of the vector passes unchanged and decides what happens to the other half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, check_shape


def alternating_mask(dims: int, parity: int) -> Tensor:
    """Boolean mask of shape (dims,), True at even positions for parity 0, at odd ones for parity 1.

    True marks what passes unchanged and feeds the network; a coupling changes the rest (Dinh et al. 2014,
    section 3.2: one half of the components is taken as the even, the other as the odd ones).

    >>> alternating_mask(4, 0).tolist()
    [True, False, True, False]
    """
    if dims < 2:
        raise ValueError(f"dims: expected at least 2, one for each half, got {dims}")
    if parity not in (0, 1):
        raise ValueError(f"parity: expected 0 or 1, got {parity}")
    return torch.arange(dims) % 2 == parity


class AdditiveCoupling(Bijection):
    """z = x + (1 - b) t(b x): shift one half by a function of the other (Dinh et al. 2014, section 3.2).

    The Jacobian is triangular with ones on its diagonal, so the log-determinant is 0 whatever the network does, and
    the inverse subtracts the same shift: the network itself is never inverted.

    Args:
        mask: b, boolean, of the shape of one example; True passes unchanged.
        network: t, called as ``network(x, context)``; maps (B, *shape) to (B, *shape).

    Raises:
        ValueError: the mask is not boolean, or passes everything or nothing.
    """

    def __init__(self, mask: Tensor, network: nn.Module) -> None:
        super().__init__()
        check_mask(mask)
        self.register_buffer("mask", mask)
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("x", x, self.mask.shape)
        return x + self._shift(x, context), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape("z", z, self.mask.shape)
        return z - self._shift(z, context)

    def _shift(self, x: Tensor, context: Tensor | None) -> Tensor:
        # b x is the same before and after the coupling, so both directions compute the same shift.
        shift = self.network(x * self.mask, context)
        check_shape("network's output", shift, self.mask.shape)
        return shift * ~self.mask

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(shape) != tuple(self.mask.shape):
            raise ValueError(f"mask: expected shape {tuple(shape)}, that of one example, got {tuple(self.mask.shape)}")
        return tuple(shape)

    def extra_repr(self) -> str:
        return f"passes {int(self.mask.sum())} of {self.mask.numel()}"


def check_mask(mask: Tensor) -> None:
    """Raise a ValueError unless the mask is boolean and splits an example into two parts, neither empty."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected a boolean tensor, got {mask.dtype}")
    if mask.all() or not mask.any():
        raise ValueError(f"mask: expected both True and False, got only {bool(mask.all())}")
