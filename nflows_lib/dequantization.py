"""From the raw integers of an image to real numbers on a scale: the first layers of a flow on discrete data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nflows_lib.bijection import Bijection, Layer


class UniformDequantize(Layer):
    """k -> k + eps with eps ~ U[0, 1), drawn afresh for every value at every call (Theis et al. 2016, section 3.1).

    Integers in, floats in [k, k + 1) out; the inverse takes the floor and clamps it to the levels. The noise has
    density 1, so the contribution is 0, and log p(x) becomes a one-draw lower bound of log P(k).

    Args:
        levels: number of levels n; the data are integers from 0 to n - 1.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels: expected at least 2, got {levels}")
        self.levels = levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = x.to(torch.get_default_dtype())
        # In float32, 255 + .999999 rounds up to 256, another level; stay below.
        y = torch.minimum(k + torch.rand_like(k), torch.nextafter(k + 1, k))
        return y, k.new_zeros(len(k))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z.floor().clamp(0, self.levels - 1).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Rescale(Bijection):
    """x -> scale * x. The log-determinant is D log|scale|: -D log n for n levels brought to the unit interval."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number other than 0, got {scale}")
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = math.prod(x.shape[1:]) * math.log(abs(self.scale))
        return self.scale * x, x.new_full((len(x),), log_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z / self.scale

    def extra_repr(self) -> str:
        return f"{self.scale:.4g}"
