"""Layers of multi-scale flows: trade resolution for channels, and factor out half of the channels."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Bijection, Chain, Layer, Shape, initialize_network, sum_per_example
from nflows_lib.checks import check_shape, check_tensor, is_shape
from nflows_lib.convolution import ChannelPermutation


class Squeeze(Bijection):
    """A squeeze: each 2x2 square of pixels becomes four channels (Dinh et al. 2016, section 3.6).

    Images ``(B, C, H, W)`` become ``(B, 4 C, H/2, W/2)``. The pixel in row :math:`d_y` and column :math:`d_x` of a
    square of channel c goes to channel :math:`4 c + 2 d_y + d_x`. The values only change places, so the log-determinant
    is 0.

    Raises:
        ValueError: if height or width is odd.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_tensor("x", x)
        self.output_shape(tuple(x.shape[1:]))
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_tensor("z", z)
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z: expected shape (B, 4 C, H, W), got {tuple(z.shape)}")
        return F.pixel_shuffle(z, 2)

    def output_shape(self, shape: Shape) -> Shape:
        if not is_shape(shape, 3) or shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"shape: expected (C, H, W) with even height and width, got {shape}")
        return 4 * shape[0], shape[1] // 2, shape[2] // 2


class PhaseOrder(ChannelPermutation):
    r"""A permutation that sorts the channels of a :class:`Squeeze` by their place in the 2x2 square.

    The places come in the order top left, bottom right, top right, bottom left, as in RealNVP's reference code. So the
    first half of the channels holds one colour of a checkerboard of the pixels, and the second half the other colour.
    Let C be the number of channels before the squeeze: the place that is number k in this order goes from channel
    :math:`4 c + \text{place}` to channel :math:`C k + c`.

    Args:
        channels: number of channels 4 C of the squeezed image.

    Raises:
        ValueError: if channels is not a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        if not isinstance(channels, int) or channels < 4 or channels % 4:
            raise ValueError(f"channels: expected a multiple of 4, got {channels}")
        phases = torch.tensor([0, 3, 1, 2])  # 2 d_y + d_x of each place
        super().__init__((4 * torch.arange(channels // 4) + phases[:, None]).flatten())


class FactorOut(Bijection):
    r"""Factoring out: half of the channels is finished, the other half goes on (Dinh et al. 2016, section 3.6).

    The input :math:`x = (x_1, x_2)` becomes the flat vector of :math:`\eta` and then :math:`f(x_1)`, where :math:`f` is
    the inner layers: the finest scale comes first. The finished half is standardised given the half that goes on:

    .. math::

        \eta = (x_2 - \mu(x_1)) \odot e^{-s(x_1)}

    So the base density stays :math:`\mathcal{N}(0, \mathbf{I})` for every piece of the latent, and a temperature
    multiplies all pieces alike. The network of :math:`\mu` and :math:`s` is the learned prior of Kingma and Dhariwal
    2018; without a network, :math:`\eta = x_2`. The log-determinant is :math:`-\sum s`, plus that of the inner layers.

    A FactorOut is the last in a list of layers, because a layer after it would see a flat vector. The list of inner
    layers may end in another FactorOut.

    Args:
        shape: ``(C, H, W)`` of one example that comes in; C is even.
        layers: the inner layers, which the first half of the channels goes through.
        prior: network from ``(B, C/2, H, W)`` to ``(B, C, H, W)``, called as ``prior(x1, context)``; it gives first
            :math:`\mu`, then :math:`s`. None: both are 0.

    Raises:
        ValueError: if C is odd, or an inner layer cannot take the shape that reaches it.
    """

    def __init__(self, shape: Shape, layers: Iterable[Layer], prior: nn.Module | None = None) -> None:
        super().__init__()
        if not is_shape(shape, 3) or shape[0] % 2:
            raise ValueError(f"shape: expected (C, H, W) with an even number of channels, got {shape}")
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
    """Split a latent into its pieces, finest scale first: ``(B, D)`` to images ``(B, C_i, H_i, W_i)``.

    ``torch.cat([piece.flatten(1) for piece in pieces], 1)`` joins them again. Without a :class:`FactorOut` there is one
    piece, z itself.

    Args:
        layers: the ``chain`` of the flow.
        z: a latent, as :meth:`~nflows_lib.flow.Flow.encode` gives it.

    Raises:
        ValueError: if z has another shape than the flow's latent.
    """
    last = layers[-1] if len(layers) else None
    if not isinstance(last, FactorOut):
        return [z]
    check_shape("z", z, (math.prod(last.shape),))
    piece, rest = z.chunk(2, dim=1)
    return [piece.unflatten(1, last.half), *split_latent(last.inner, rest.unflatten(1, last.inner_shape))]
