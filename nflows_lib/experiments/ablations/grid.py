"""The grid in Glow's samples: what weakens it, one change at a time, and at the borders of which squares it lies."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib import data
from nflows_lib.bijection import Bijection, Layer, Shape, initialize_network
from nflows_lib.checks import check_tensor
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.coupling import AffineCoupling, BoundedGlowCoupling, checkerboard_mask
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.experiments.ablations.glow import finite_samples, grid_texture, replace, score_of
from nflows_lib.flow import Flow
from nflows_lib.multiscale import FactorOut, Squeeze
from nflows_lib.networks import ActNormConv, GlowNet, ZeroConv
from nflows_lib.normalization import ActNorm
from nflows_lib.training import fit

SHAPE = (3, 16, 16)
SHOWN = 4  # samples of each run that its record holds


class HaarSqueeze(Squeeze):
    """A squeeze whose four channels of a 2x2 square are the Haar wavelet's instead of the pixels.

    The values of a square, in the order of :class:`~nflows_lib.multiscale.Squeeze`, are multiplied by an orthogonal and
    symmetric matrix. So the first channel is twice the square's mean, and the others are its differences from left to
    right, from top to bottom, and along the diagonals. The log-determinant is 0.

    Raises:
        ValueError: if height or width is odd.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        squares, log_det = super().forward(x)
        a, b, c, d = squares.unflatten(1, (-1, 4)).unbind(2)  # each (B, C, H/2, W/2)
        z = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=2) / 2
        return z.flatten(1, 2), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        values, _ = self.forward(super().inverse(z))  # the wavelet's matrix is its own inverse
        return super().inverse(values)


class ShiftedSquares(Bijection):
    """Other squares for a squeezed image: they begin elsewhere in the unsqueezed image, further down and to the right.

    Images ``(B, 4 C, H, W)`` keep their shape. Each 2x2 square at the border is completed by pixels from the opposite
    border. The values only change places, so the log-determinant is 0.

    Args:
        pixels: by how many positions of the unsqueezed image; half a square is 1.

    Raises:
        ValueError: if the number of channels is not a multiple of 4.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._rolled("x", x, -self.pixels), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._rolled("z", z, self.pixels)

    def _rolled(self, name: str, x: Tensor, pixels: int) -> Tensor:
        check_tensor(name, x)
        self.output_shape(tuple(x.shape[1:]))
        return F.pixel_unshuffle(F.pixel_shuffle(x, 2).roll((pixels, pixels), (2, 3)), 2)

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[0] % 4:
            raise ValueError(f"shape: expected (4 C, H, W), got {shape}")
        return tuple(shape)


class Reflected(nn.Module):
    """A 3x3 convolution that continues the image beyond its border by reflection, not by zeros.

    Args:
        layer: the convolution, which pads its input with one row of zeros at each side.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        return self.layer(_continued(x))[..., 1:-1, 1:-1]

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialise the convolution from a first batch of images."""
        initialize_network(self.layer, _continued(x), context)


def _continued(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def grid_glow(
    *,
    haar: bool = False,
    shifted: bool = False,
    before: int = 0,
    reflected: bool = False,
    deep_prior: bool = False,
    steps: int = 4,
    hidden: int = 32,
) -> Flow:
    """A bounded Glow with two scales for 16x16 colour patches, with at most one change.

    Args:
        haar: whether both squeezes are :class:`HaarSqueeze`.
        shifted: whether every second step of a scale works on :class:`ShiftedSquares`, half a square off.
        before: number of checkerboard couplings in front of the first squeeze.
        reflected: whether the networks' 3x3 convolutions are :class:`Reflected`.
        deep_prior: whether the finished half has a prior with a network like the couplings', instead of a single
            convolution.
        steps: number of steps at each scale, even if the squares are shifted.
        hidden: channels inside the networks.
    """
    squeeze = HaarSqueeze if haar else Squeeze

    def scale(channels: int) -> list[Layer]:
        layers: list[Layer] = [squeeze()]
        for i in range(steps):
            coupling = BoundedGlowCoupling(channels, GlowNet(channels // 2, channels, hidden))
            layers += [ActNorm(channels), Invertible1x1Conv(channels), coupling]
            if shifted:
                layers.append(ShiftedSquares(-1 if i % 2 else 1))
        return layers

    start: list[Layer] = [UniformDequantize(256), Rescale(1 / 256)]
    start += [AffineCoupling(checkerboard_mask(SHAPE, i % 2), GlowNet(3, 6, hidden)) for i in range(before)]
    first, second = scale(12), scale(24)
    prior = GlowNet(6, 12, hidden) if deep_prior else ZeroConv(6, 12)
    flow = Flow([*start, *first, FactorOut((12, 8, 8), second, prior)], StandardNormal(), SHAPE)
    if reflected:
        replace(flow, ActNormConv, lambda layer: Reflected(layer) if layer.weight.shape[2] == 3 else layer)
        replace(flow, nn.Conv2d, Reflected)
    return flow


def steps_by_place(images: Tensor) -> list[float]:
    """The mean step from each row and column to the next, averaged over both directions: ``H - 1`` values."""
    values = images.double()
    rows, columns = values.diff(dim=2).abs().mean((0, 1, 3)), values.diff(dim=3).abs().mean((0, 1, 2))
    return ((rows + columns) / 2).tolist()


def border_ratios(steps: list[float], squeezes: int = 2) -> list[float]:
    """The steps where the squares of each squeeze meet, finest first, divided by the steps inside the 2x2 squares.

    A border of 4x4 squares is a border of 2x2 squares as well. It counts as a border of the largest squares only.
    """
    inside = sum(steps[0::2]) / len(steps[0::2])
    ratios = []
    for size in (2**i for i in range(1, squeezes + 1)):
        largest = size == 2**squeezes
        borders = [step for k, step in enumerate(steps, start=1) if k % size == 0 and (largest or k % (2 * size))]
        ratios.append(sum(borders) / len(borders) / inside)
    return ratios


def glow_grid(seed: int, *, updates: int = 400, **change: Any) -> dict[str, Any]:
    """Train a Glow on 16x16 colour patches, in batches of 64.

    Args:
        seed: seed of the run.
        updates: number of updates.
        change: options of :func:`grid_glow`.

    Returns:
        ``test``, bits/dim on the test patches; ``grid`` and ``cold``, the :func:`grid_texture` of 500 samples at
        temperatures 1 and 0.7; ``fine`` and ``coarse``, the :func:`border_ratios` at temperature 1; ``steps``, the
        :func:`steps_by_place`; ``kept``, the number of finite samples at temperature 1; ``samples``, the levels of
        SHOWN of them in base64; and ``parameters``.
    """
    torch.manual_seed(80 + seed)
    train, test = (data.patches(part).images for part in ("train", "test"))
    flow = grid_glow(**change)
    fit(flow, train, updates, batch_size=64, lr=5e-3, clip=100.0, warmup=min(10, updates), cosine=True)
    samples = finite_samples(flow)
    steps = steps_by_place(samples)
    fine, coarse = border_ratios(steps)
    return {
        "test": score_of(flow, test),
        "grid": grid_texture(samples),
        "cold": grid_texture(finite_samples(flow, temperature=0.7)),
        "fine": fine,
        "coarse": coarse,
        "steps": steps,
        "kept": len(samples),
        "samples": base64.b64encode(samples[:SHOWN].byte().numpy().tobytes()).decode(),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }


ABLATIONS = {
    "glow-grid": Ablation(
        "Q5: where does the grid in Glow's samples come from? Which change weakens it?",
        (0, 1, 2),
        {
            "Glow": glow_grid,
            "deep prior": partial(glow_grid, deep_prior=True),
            "Haar": partial(glow_grid, haar=True),
            "reflected": partial(glow_grid, reflected=True),
            "couplings before": partial(glow_grid, before=2),
            "shifted": partial(glow_grid, shifted=True),
            "shifted, 800 updates": partial(glow_grid, shifted=True, updates=800),
        },
    ),
}
