"""Pixelwise prediction: the classifier and the U-Net that a conditional flow is compared with."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Shape
from nflows_lib.checks import check_at_least, check_shape, check_tensor, is_shape
from nflows_lib.flow import check_context, check_data, check_sampling
from nflows_lib.networks import channels_last, check_precision, computing_in, finished


class PixelClassifier(nn.Module):
    """A model P(y | x) whose pixels are independent given x: a network gives each pixel a probability for every level.

    This is the usual deterministic network for segmentation, trained by cross-entropy, written as a model of y. It has
    those methods of :class:`nflows_lib.flow.Flow` that training, evaluation and sampling use. Its likelihood is exact,
    needs no noise, and has the flow's units.

    Args:
        network: from contexts (B, K, H, W) to the logits (B, levels * C, H, W), level by level.
        shape: (C, H, W) of one y.
        levels: number of levels n of y; integers from 0 to n - 1.

    Raises:
        ValueError: if shape is not that of an image, or levels is below 2.
    """

    def __init__(self, network: nn.Module, shape: Shape, levels: int) -> None:
        super().__init__()
        check_at_least(2, levels=levels)
        if not is_shape(shape, 3):
            raise ValueError(f"shape: expected (C, H, W), got {shape}")
        self.network, self.shape, self.levels = network, tuple(shape), levels
        self.dims = math.prod(self.shape)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Do nothing: the model has no layer that is initialised from data."""

    def forward(self, y: Tensor, context: Tensor | None = None, validate: bool = True) -> Tensor:
        """log P(y | x) in nats, (B,), of integers y, ``(B, *shape)``; ``validate`` is that of a flow."""
        if validate:
            check_data(self, y, context)
        return -F.cross_entropy(self.logits(context), y.long(), reduction="none").flatten(1).sum(1)

    def logits(self, context: Tensor | None) -> Tensor:
        """The network's logits: contexts (B, K, H, W) to ``(B, levels, *shape)``."""
        if context is None:
            raise ValueError("context: expected one row per example, got None")
        output = self.network(context)
        check_shape("network's output", output, (self.levels * self.shape[0], *self.shape[1:]))
        return output.unflatten(1, (self.levels, self.shape[0]))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """n samples, ``(n, *shape)``, in which every pixel is drawn by itself; a context holds one row per sample.

        The logits are divided by the temperature. At temperature 0 each pixel has its likeliest level.
        """
        check_sampling(n, temperature)
        check_context(context, n)
        logits = self.logits(context)
        if temperature == 0:
            return logits.argmax(1)
        return torch.distributions.Categorical(logits=logits.movedim(1, -1) / temperature).sample()

    @torch.no_grad()
    def mean(self, context: Tensor) -> Tensor:
        """The expected y given contexts (B, K, H, W), as ``(B, *shape)``."""
        levels = torch.arange(self.levels, device=context.device, dtype=torch.float32)
        return torch.einsum("bl...,l->b...", self.logits(context).softmax(1), levels)


class UNet(nn.Module):
    """A network from an image to one of the same height and width, by way of smaller sizes (Ronneberger et al. 2015).

    Each size has two 3x3 convolutions. On the way down, the next size has half the height and width and twice the
    channels. On the way up, the enlarged output of the smaller size is joined with what the same size computed on the
    way down.

    Args:
        inputs: number of channels of the input.
        outputs: number of channels of the output.
        hidden: number of channels at the full size.
        levels: number of sizes; height and width are halved levels - 1 times.
        precision: as in :class:`~nflows_lib.networks.ResNet`.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, levels: int, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_precision(precision)
        check_at_least(1, inputs=inputs, outputs=outputs, hidden=hidden, levels=levels)
        self.precision = precision
        widths = [hidden * 2**i for i in range(levels)]
        self.down = nn.ModuleList(_two_convs(a, b) for a, b in itertools.pairwise([inputs, *widths]))
        self.up = nn.ModuleList(_two_convs(a + b, a) for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W).

        Raises:
            ValueError: if height or width cannot be halved levels - 1 times.
        """
        check_tensor("x", x)
        times = 2 ** (len(self.down) - 1)
        if x.shape[-2] % times or x.shape[-1] % times:
            raise ValueError(f"x: expected height and width that are multiples of {times}, got {tuple(x.shape[-2:])}")
        with computing_in(self.precision, x):
            h, kept = channels_last(x), []
            for i, block in enumerate(self.down):
                h = block(F.max_pool2d(h, 2) if i else h)
                kept.append(h)
            for block, beside in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
                h = block(torch.cat([beside, F.interpolate(h, scale_factor=2.0)], dim=1))
            return finished(self.last(h), x)


def _two_convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )
