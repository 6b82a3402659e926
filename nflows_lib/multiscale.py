"""Reaching images: trade resolution for channels, and let half of the vector go early."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Bijection, Chain, Layer, Shape, check_shape, initialize_network, sum_per_example
from nflows_lib.convolution import ChannelPermutation


class Squeeze(Bijection):
    """Each 2x2 square of pixels becomes four channels: (C, H, W) to (4 C, H/2, W/2) (Dinh et al. 2016, section 3.6).

    The pixel in row dy and column dx of a square of channel c goes to channel 4 c + 2 dy + dx. Only places change: the
    log-determinant is 0.

    Raises:
        ValueError: height or width is odd.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.output_shape(tuple(x.shape[1:]))
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z: expected shape (B, 4 C, H, W), got {tuple(z.shape)}")
        return F.pixel_shuffle(z, 2)

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"shape: expected (C, H, W) with even height and width, got {tuple(shape)}")
        return 4 * shape[0], shape[1] // 2, shape[2] // 2


class PhaseOrder(ChannelPermutation):
    """Sort the channels of a :class:`Squeeze` by their place in the square: channel 4 c + phase to C k + c.

    The places come in the order top left, bottom right, top right, bottom left, as in RealNVP's reference code: so the
    first half of the channels is a checkerboard of the pixels, and the second half the other colour.

    Args:
        channels: 4 C, of the squeezed image.

    Raises:
        ValueError: channels is no multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        if channels < 4 or channels % 4:
            raise ValueError(f"channels: expected a multiple of 4, got {channels}")
        phases = torch.tensor([0, 3, 1, 2])  # 2 dy + dx
        super().__init__((4 * torch.arange(channels // 4) + phases[:, None]).flatten())


class FactorOut(Bijection):
    """Half of the channels is finished; the other half goes on through further layers (Dinh et al. 2016, section 3.6).

    x = (x1, x2) becomes the flat vector (eps, inner(x1)), finest scale first. The finished half is standardised given
    the one that goes on, eps = (x2 - mu(x1)) exp(-s(x1)), so that the base density stays N(0, I) for every piece and a
    temperature scales all of them alike (the learned prior of Kingma and Dhariwal 2018; without one eps = x2). The
    log-determinant is -sum s, plus that of the inner layers.

    It comes last in a list of layers: what follows would see a flat vector. Inner lists may end in a FactorOut again.

    Args:
        shape: (C, H, W) of one example that comes in; C is even.
        layers: what the first half of the channels goes through.
        prior: network from (B, C/2, H, W) to (B, C, H, W), first mu, then s, called as ``prior(x1, context)``; None:
            mu = 0 and s = 0.

    Raises:
        ValueError: C is odd, or an inner layer cannot take what reaches it.
    """

    def __init__(self, shape: Shape, layers: Iterable[Layer], prior: nn.Module | None = None) -> None:
        super().__init__()
        if len(shape) != 3 or shape[0] < 2 or shape[0] % 2:
            raise ValueError(f"shape: expected (C, H, W) with an even number of channels, got {tuple(shape)}")
        self.shape = tuple(shape)
        self.half = (shape[0] // 2, *shape[1:])
        self.inner, self.prior = Chain(layers), prior
        self.inner_shape = self.inner.output_shape(self.half)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("x", x, self.shape)
        x1, x2 = x.chunk(2, dim=1)
        mean, log_scale = self._prior(x1, context)
        inside, log_det = self.inner(x1, context)
        eps = (x2 - mean) * (-log_scale).exp()
        return torch.cat([eps.flatten(1), inside.flatten(1)], dim=1), log_det - sum_per_example(log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape("z", z, (math.prod(self.shape),))
        eps, inside = z.chunk(2, dim=1)
        x1 = self.inner.inverse(inside.unflatten(1, self.inner_shape), context)
        mean, log_scale = self._prior(x1, context)
        return torch.cat([x1, mean + eps.unflatten(1, self.half) * log_scale.exp()], dim=1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        x1, _ = x.chunk(2, dim=1)
        initialize_network(self.prior, x1, context)
        self.inner.initialize(x1, context)

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != self.shape:
            raise ValueError(f"shape: expected {self.shape}, that of one example, got {tuple(shape)}")
        return (math.prod(shape),)

    def _prior(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            zero = x1.new_zeros(1, 1, 1, 1)
            return zero, zero
        output = self.prior(x1, context)
        check_shape("prior's output", output, self.shape)
        return output.chunk(2, dim=1)

    def extra_repr(self) -> str:
        return f"finishes {math.prod(self.half)} of {math.prod(self.shape)}"


def split_latent(layers: Chain, z: Tensor) -> list[Tensor]:
    """The latent's pieces, finest scale first, coarsest last: (B, D) to images (B, C_i, H_i, W_i).

    ``torch.cat([piece.flatten(1) for piece in pieces], 1)`` puts them together again. A flow without a
    :class:`FactorOut` has one piece, z itself.

    Args:
        layers: the flow's ``chain``.
        z: a latent, as :meth:`Flow.encode` gives it.
    """
    last = layers[-1] if len(layers) else None
    if not isinstance(last, FactorOut):
        return [z]
    check_shape("z", z, (math.prod(last.shape),))
    piece, rest = z.chunk(2, dim=1)
    return [piece.unflatten(1, last.half), *split_latent(last.inner, rest.unflatten(1, last.inner_shape))]
