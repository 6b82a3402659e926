"""Prediction of each pixel by itself: the classifier and the U-Net that a conditional flow is compared with."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Shape, check_positive, check_shape
from nflows_lib.flow import check_context, check_data, check_sampling
from nflows_lib.networks import channels_last, check_precision, computing_in, finished


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
            check_data(self, y, context)
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


class UNet(nn.Module):
    """From an image to one of the same height and width, by way of smaller ones (Ronneberger et al. 2015).

    Each level has two 3x3 convolutions; on the way down the next level has half the height and width and twice the
    channels; on the way up what comes from below joins what the same level gave on the way down.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        hidden: channels at the full size.
        levels: number of sizes; height and width can be halved levels - 1 times.
        precision: as of :class:`~nflows_lib.networks.ResNet`.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, levels: int, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_precision(precision)
        check_positive(inputs=inputs, outputs=outputs, hidden=hidden, levels=levels)
        self.precision = precision
        widths = [hidden * 2**i for i in range(levels)]
        self.down = nn.ModuleList(_two_convs(a, b) for a, b in itertools.pairwise([inputs, *widths]))
        self.up = nn.ModuleList(_two_convs(a + b, a) for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W).

        Raises:
            ValueError: height or width cannot be halved as often as there are levels but one.
        """
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
