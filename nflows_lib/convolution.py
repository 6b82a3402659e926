"""Mixing the channels at every pixel: a fixed permutation of them, or a learned invertible matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nflows_lib.bijection import ChannelBijection


class ChannelPermutation(ChannelBijection):
    """The channels in another order: z's channel i is x's channel order[i]. The log-determinant is 0.

    Args:
        order: a permutation of 0 to C - 1, (C,), integers.

    Raises:
        ValueError: order is none.
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__(len(order))
        if order.dtype != torch.long:  # bool and uint8 would select, not order
            raise ValueError(f"order: expected integers of type torch.int64, got {order.dtype}")
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(f"order: expected a permutation of 0 to {len(order) - 1}, got {order.tolist()}")
        self.register_buffer("order", order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_channels("x", x)
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        return z[:, self.order.argsort()]


class Invertible1x1Conv(ChannelBijection):
    """z = W x at every pixel, W a learned C x C matrix (Kingma and Dhariwal 2018, section 3.2).

    The log-determinant is H W log|det W|; H W is 1 for vectors. W starts as a random orthogonal matrix.

    Args:
        channels: C, of vectors (B, C) or images (B, C, H, W).
        lu: learn W = P L (U + diag(s)), P a fixed permutation, L lower triangular with ones on its diagonal, U strictly
            upper triangular, the signs of s fixed: log|det W| is then the sum of log|s|, in O(C), and det W never
            crosses 0. Without, W itself is learned, and its log-determinant costs O(C^3).
    """

    def __init__(self, channels: int, lu: bool = True) -> None:
        super().__init__(channels)
        self.lu = lu
        weight = torch.linalg.qr(torch.randn(channels, channels)).Q
        if lu:
            permutation, lower, upper = torch.linalg.lu(weight)
            scale = upper.diagonal()
            self.register_buffer("permutation", permutation)
            self.register_buffer("sign", scale.sign())
            # C^2 numbers, as many as W has: L below the diagonal, U above it, log|s| on it.
            self.factors = nn.Parameter(lower.tril(-1) + upper.triu(1) + scale.abs().log().diag())
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_channels("x", x)
        if self.lu:
            factors = self.lu_factors(context)
            lower, upper = self._lower_and_upper(factors)
            weight, log_det = self.permutation @ lower @ upper, factors.diagonal(dim1=-2, dim2=-1).sum(-1)
        else:
            weight, log_det = self.weight, torch.linalg.slogdet(self.weight).logabsdet
        return _mix(weight, x), (math.prod(x.shape[2:]) * log_det).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        if self.lu:
            lower, upper = self._lower_and_upper(self.lu_factors(context))
            solved = torch.linalg.solve_triangular(lower, self.permutation.T, upper=False, unitriangular=True)
            return _mix(torch.linalg.solve_triangular(upper, solved, upper=True), z)
        return _mix(torch.linalg.inv(self.weight), z)

    def lu_factors(self, context: Tensor | None) -> Tensor:
        """L below the diagonal, U above it, log|s| on it: (C, C), the same for all examples; or (B, C, C)."""
        return self.factors

    def _lower_and_upper(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.sign * factors.diagonal(dim1=-2, dim2=-1).exp()
        return factors.tril(-1) + torch.ones_like(self.sign).diag(), factors.triu(1) + scale.diag_embed()

    def extra_repr(self) -> str:
        return "LU" if self.lu else "plain"


def _mix(weight: Tensor, x: Tensor) -> Tensor:
    """W, (C, C) or one for each example, times the C channels at every pixel.

    On a CPU matrix products are several times as fast as a convolution.
    """
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    # One product an example; its gradient has a C x C matrix for each, which must be no burden.
    if weight.dim() == 3 or pixels >= channels:
        return torch.bmm(weight.expand(len(x), -1, -1), x.reshape(len(x), channels, pixels)).view(x.shape)
    return (weight @ x.transpose(0, 1).reshape(channels, -1)).view(channels, len(x), *x.shape[2:]).transpose(0, 1)
