"""Prediction one pixel at a time: what a conditional flow is held against, and by which measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Shape, check_shape
from nflows_lib.flow import check_context, check_data, check_sampling


class PixelClassifier(nn.Module):
    """P(y | x) with the pixels of y independent given x: a network gives each pixel a probability for every level.

    The usual deterministic network for segmentation, trained by cross-entropy, seen as a density: the parts of
    :class:`nflows_lib.flow.Flow` that training, evaluation and sampling use. Its likelihood is exact, without noise,
    and in the flow's units.

    Args:
        network: from contexts (B, K, H, W) to (B, levels * C, H, W), the logits, level by level.
        shape: (C, H, W) of one y.
        levels: number of levels n of y; integers from 0 to n - 1.
    """

    def __init__(self, network: nn.Module, shape: Shape, levels: int) -> None:
        super().__init__()
        self.network, self.shape, self.levels = network, tuple(shape), levels
        self.dims = math.prod(self.shape)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """There is nothing to do."""

    def forward(self, y: Tensor, context: Tensor | None = None, validate: bool = True) -> Tensor:
        """log P(y | x) in nats: ``(B, *shape)``, integers, and contexts, to (B,). ``validate``: as of a flow."""
        if validate:
            check_data(y, context, self.shape, self.levels)
        return -F.cross_entropy(self.logits(context), y.long(), reduction="none").flatten(1).sum(1)

    def logits(self, context: Tensor | None) -> Tensor:
        """(B, K, H, W) to ``(B, levels, *shape)``."""
        if context is None:
            raise ValueError("context: expected one row for each example, got None")
        output = self.network(context)
        check_shape("network's output", output, (self.levels * self.shape[0], *self.shape[1:]))
        return output.unflatten(1, (self.levels, self.shape[0]))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """n draws, ``(n, *shape)``, each pixel for itself; a context holds one row for each.

        The logits are divided by the temperature; at 0 each pixel has its likeliest level.
        """
        check_sampling(n, temperature)
        check_context(context, n)
        logits = self.logits(context)
        if temperature == 0:
            return logits.argmax(1)
        return torch.distributions.Categorical(logits=logits.movedim(1, -1) / temperature).sample()

    @torch.no_grad()
    def mean(self, context: Tensor) -> Tensor:
        """The expected y: contexts (B, K, H, W) to ``(B, *shape)``."""
        levels = torch.arange(self.levels, device=context.device, dtype=torch.float32)
        return torch.einsum("bl...,l->b...", self.logits(context).softmax(1), levels)
