"""Layers that scale and shift each dimension by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, Shape, check_shape


class DiagonalScaling(Bijection):
    """z_i = exp(s_i) x_i with one learned log-scale s_i a dimension (Dinh et al. 2014, section 3.3).

    The log-determinant is the sum of the s_i. They start at 0, the identity.

    Args:
        dims: number of dimensions D of one example, which is a vector.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("x", x, self.log_scale.shape)
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape("z", z, self.log_scale.shape)
        return z * (-self.log_scale).exp()

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != tuple(self.log_scale.shape):
            raise ValueError(f"dims: expected {shape}, that of one example, got {tuple(self.log_scale.shape)}")
        return shape
