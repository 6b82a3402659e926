"""Mixing the channels at every pixel: a fixed permutation of them, or a learned invertible matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflows_lib.bijection import AffineBijection, ChannelBijection, forward_as_one, mix


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


class Invertible1x1Conv(AffineBijection):
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
        return forward_as_one([self], x, context)

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lu:
            return self.weight, self.weight.new_zeros(self.channels), torch.linalg.slogdet(self.weight).logabsdet
        factors = self.lu_factors(context)
        log_scale = factors.diagonal(dim1=-2, dim2=-1)
        # P L (U + diag(s)), the strict triangles and the diagonals one by one
        lower = self.permutation @ factors.tril(-1) + self.permutation
        weight = lower @ factors.triu(1) + lower * (self.sign * log_scale.exp())[..., None, :]
        return weight, factors.new_zeros(self.channels), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        if not self.lu:
            return mix(torch.linalg.inv(self.weight), z, z.new_zeros(self.channels))
        factors = self.lu_factors(context)
        scale = self.sign * factors.diagonal(dim1=-2, dim2=-1).exp()
        # solve_triangular reads one triangle alone, and with unitriangular no diagonal.
        solved = torch.linalg.solve_triangular(factors, self.permutation.T, upper=False, unitriangular=True)
        upper = factors.triu(1) + scale.diag_embed()
        return mix(torch.linalg.solve_triangular(upper, solved, upper=True), z, z.new_zeros(self.channels))

    def lu_factors(self, context: Tensor | None) -> Tensor:
        """L below the diagonal, U above it, log|s| on it: (C, C), the same for all examples; or (B, C, C)."""
        return self.factors

    def extra_repr(self) -> str:
        return "LU" if self.lu else "plain"
