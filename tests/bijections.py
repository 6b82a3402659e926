"""One dictionary of all bijections, each with a named constructor; tests/test_bijections.py tests all of them.

A new public ``Bijection`` in nflows_lib needs an entry here; without an entry the suite fails. A base class, which has
no ``forward`` of its own, does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, Shape
from nflows_lib.checks import check_shape
from nflows_lib.conditional import Conditional1x1Conv, ConditionalActNorm, ConditionalNet, ConditioningNetwork
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    BoundedGlowCoupling,
    GlowCoupling,
    alternating_mask,
    channel_mask,
    checkerboard_mask,
)
from nflows_lib.dequantization import Logit, Rescale
from nflows_lib.experiments.ablations.grid import HaarSqueeze, ShiftedSquares
from nflows_lib.experiments.mixture import MixtureCoupling
from nflows_lib.multiscale import FactorOut, PhaseOrder, Squeeze
from nflows_lib.networks import MLP, BoundedPrior, ZeroConv
from nflows_lib.normalization import ActNorm, DiagonalScaling, FlowBatchNorm

BATCH = 4


class ConvNet(nn.Module):
    """The smallest network for a coupling of images; a context, which is a vector, shifts its output."""

    def __init__(self, inputs: int, outputs: int, context: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, outputs, 3, padding=1))
        self.shift = nn.Linear(context, outputs) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.shift is None:
            return self.layers(x)
        check_shape("context", context, (self.shift.in_features,))
        return self.layers(x) + self.shift(context)[..., None, None]


class Fixed(nn.Module):
    """A network that returns the same numbers for every example, and keeps its input."""

    def __init__(self, *output: float) -> None:
        super().__init__()
        self.output = torch.tensor(output)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = (x, context)
        return self.output.to(x.dtype).expand(len(x), -1)


def mlp(shape: Shape, depth: int, context: int = 0, outputs: int = 1, parity: int = 0) -> MLP:
    """A network from the numbers that an alternating mask leaves unchanged to ``outputs`` for each of the others.

    Its activation is tanh, which is smooth for finite differences and never dead for a whole example.
    """
    passes = (shape[0] + 1 - parity) // 2
    return MLP(passes, outputs * (shape[0] - passes), hidden=8, depth=depth, activation=nn.Tanh, context=context)


class Masked(Bijection):
    """A masked coupling of vectors, as earlier versions of the library had it and as a reader may write it.

    The network gets b x, which is as long as x, and its output is masked. With a gain the coupling is affine, without a
    gain it is additive.
    """

    def __init__(self, mask: Tensor, network: nn.Module, affine: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.network = network
        self.gain = nn.Parameter(torch.ones(())) if affine else None

    def log_scale(self, raw: Tensor) -> Tensor:
        return self.gain * raw.tanh()

    def parts(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift, which are 0 for the numbers that the mask leaves unchanged."""
        shift = self.network(x * self.mask, context)
        if self.gain is None:
            return torch.zeros_like(x), shift * ~self.mask
        raw, shift = shift.chunk(2, dim=1)
        return self.log_scale(raw) * ~self.mask, shift * ~self.mask

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.parts(x, context)
        return x * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        log_scale, shift = self.parts(z, context)
        return (z - shift) * (-log_scale).exp()


def used_batch_norm(shape: Shape) -> FlowBatchNorm:
    """A flow batch norm whose running averages have moved from 0 and 1."""
    layer = FlowBatchNorm(shape[0])
    layer.running_mean.normal_()
    layer.running_variance.uniform_(0.2, 3.0)
    return layer


def channel_couplings(shape: Shape, context: int = 0) -> list[Bijection]:
    """Two affine couplings, each of which changes one half of the channels."""
    return [AffineCoupling(channel_mask(shape, parity), ConvNet(shape[0], 2 * shape[0], context)) for parity in (0, 1)]


def glow_coupling(shape: Shape, context: int = 0, kind: type[GlowCoupling] = GlowCoupling) -> GlowCoupling:
    """A Glow coupling on images or on vectors; if the number of channels is odd, the larger half changes."""
    passes, outputs = shape[0] // 2, 2 * (shape[0] - shape[0] // 2)
    if len(shape) == 3:
        return kind(shape[0], ConvNet(passes, outputs, context))
    return kind(shape[0], MLP(passes, outputs, hidden=8, depth=2, activation=nn.Tanh, context=context))


def mixture_coupling(shape: Shape, components: int, context: int = 0) -> MixtureCoupling:
    """A mixture coupling on images or on vectors; if the number of channels is odd, the larger half changes."""
    passes, outputs = shape[0] // 2, (2 + 3 * components) * (shape[0] - shape[0] // 2)
    if len(shape) == 3:
        return MixtureCoupling(shape[0], ConvNet(passes, outputs, context), components)
    network = MLP(passes, outputs, hidden=8, depth=2, activation=nn.Tanh, context=context)
    return MixtureCoupling(shape[0], network, components)


def learned_prior(shape: Shape, context: int = 0) -> ConvNet:
    """A network from the half of (C, H, W) that goes on to mean and log-scale of the half that is factored out."""
    return ConvNet(shape[0] // 2, shape[0], context)


def conditional_act_norm(shape: Shape, context: Shape) -> ConditionalActNorm:
    return ConditionalActNorm(shape[0], ConditioningNetwork(context, 2 * shape[0], hidden=8))


def conditional_conv(shape: Shape, context: Shape) -> Conditional1x1Conv:
    return Conditional1x1Conv(shape[0], ConditioningNetwork(context, shape[0] ** 2, hidden=8))


def seeing(network: nn.Module, shape: Shape) -> ConditionalNet:
    """The network with features of a context as additional input: an image of 2 channels, twice as high and wide."""
    return ConditionalNet(network, (2, 2 * shape[1], 2 * shape[2]), shape[1:], features=4)


def image_coupling(shape: Shape) -> BoundedGlowCoupling:
    passes, outputs = shape[0] // 2, 2 * (shape[0] - shape[0] // 2)
    return BoundedGlowCoupling(shape[0], seeing(ZeroConv(passes, outputs, context=4), shape))


def image_prior(shape: Shape) -> BoundedPrior:
    return BoundedPrior(seeing(ZeroConv(shape[0] // 2, shape[0], context=4), shape))


def nested_factor_out(shape: Shape) -> FactorOut:
    """A factor-out inside another one: (C/2, H, W) goes on, is squeezed to (2 C, H/2, W/2), and half of it goes on."""
    channels, height, width = shape
    half, squeezed = (channels // 2, height, width), (2 * channels, height // 2, width // 2)
    inner = FactorOut(squeezed, channel_couplings((channels, *squeezed[1:])), learned_prior(squeezed))
    coupling = AffineCoupling(checkerboard_mask(half, 0), ConvNet(half[0], 2 * half[0]))
    layers = [coupling, Squeeze(), *channel_couplings(squeezed), PhaseOrder(squeezed[0]), inner]
    return FactorOut(shape, layers, learned_prior(shape))


@dataclass(frozen=True)
class Example:
    """A function that makes a bijection for one example's shape, and the shapes to try.

    context: the shape of one example's context, if the layer needs a context.
    any_shape: whether the layer takes more shapes than one; other tests cover its wrong shapes, if there are any.
    to_domain: a function that maps normal draws to the layer's domain.
    only_moves: whether the layer only moves values, so that all layers of its kind do the same.
    """

    make: Callable[[Shape], Bijection]
    shapes: tuple[Shape, ...]
    context: Shape | None = None
    any_shape: bool = False
    to_domain: Callable[[Tensor], Tensor] = lambda x: x
    only_moves: bool = False


VECTORS: tuple[Shape, ...] = ((2,), (5,), (8,))
IMAGES: tuple[Shape, ...] = ((1, 4, 4), (2, 3, 3))
RECTANGLES: tuple[Shape, ...] = ((1, 3, 4), (3, 2, 3))
EVEN_CHANNELS: tuple[Shape, ...] = ((2, 2, 3), (6, 3, 1), (4, 1, 1))
CHANNELS: tuple[Shape, ...] = ((1,), (2,), (5,), (1, 3, 4), (2, 3, 1), (3, 2, 4), (4, 1, 1))

BIJECTIONS: dict[str, Example] = {
    "rescale": Example(lambda shape: Rescale(1 / 17), ((1,), (5,), (2, 3, 4)), any_shape=True),
    "rescale_negative": Example(lambda shape: Rescale(-3.0), ((1,), (4,), (1, 2, 2)), any_shape=True),
    "diagonal_scaling": Example(lambda shape: DiagonalScaling(*shape), ((1,), (2,), (7,))),
    "additive_coupling_even": Example(
        lambda shape: AdditiveCoupling(alternating_mask(*shape, 0), mlp(shape, depth=2)), VECTORS
    ),
    "additive_coupling_odd": Example(
        lambda shape: AdditiveCoupling(alternating_mask(*shape, 1), mlp(shape, depth=1, parity=1)), VECTORS
    ),
    "additive_coupling_image": Example(
        lambda shape: AdditiveCoupling(checkerboard_mask(shape, 0), ConvNet(shape[0], shape[0])), IMAGES
    ),
    "additive_coupling_conditional": Example(
        lambda shape: AdditiveCoupling(alternating_mask(*shape, 0), mlp(shape, depth=2, context=3)),
        VECTORS,
        context=(3,),
    ),
    "affine_coupling_even": Example(
        lambda shape: AffineCoupling(alternating_mask(*shape, 0), mlp(shape, depth=2, outputs=2)), VECTORS
    ),
    "affine_coupling_odd": Example(
        lambda shape: AffineCoupling(alternating_mask(*shape, 1), mlp(shape, depth=1, outputs=2, parity=1)), VECTORS
    ),
    "affine_coupling_image_even": Example(
        lambda shape: AffineCoupling(checkerboard_mask(shape, 0), ConvNet(shape[0], 2 * shape[0])), RECTANGLES
    ),
    "affine_coupling_image_odd": Example(
        lambda shape: AffineCoupling(checkerboard_mask(shape, 1), ConvNet(shape[0], 2 * shape[0])), RECTANGLES
    ),
    "affine_coupling_conditional": Example(
        lambda shape: AffineCoupling(alternating_mask(*shape, 0), mlp(shape, depth=2, context=3, outputs=2)),
        VECTORS,
        context=(3,),
    ),
    "batch_norm": Example(used_batch_norm, ((1,), (5,), (1, 3, 4), (3, 2, 2)), any_shape=True),
    "act_norm": Example(lambda shape: ActNorm(shape[0]), CHANNELS, any_shape=True),
    "permutation_of_channels": Example(
        lambda shape: ChannelPermutation(torch.arange(shape[0]).roll(1)),
        ((2,), (5,), (3, 2, 4), (4, 1, 1)),
        any_shape=True,
        only_moves=True,
    ),
    "act_norm_conditional": Example(
        lambda shape: conditional_act_norm(shape, (3,)), CHANNELS, context=(3,), any_shape=True
    ),
    "act_norm_conditional_image": Example(
        lambda shape: conditional_act_norm(shape, (2, 5, 9)), ((2,), (3, 2, 4), (4, 1, 1)), (2, 5, 9), any_shape=True
    ),
    "conv1x1_lu": Example(lambda shape: Invertible1x1Conv(shape[0]), CHANNELS, any_shape=True),
    "conv1x1_plain": Example(lambda shape: Invertible1x1Conv(shape[0], lu=False), CHANNELS, any_shape=True),
    "conv1x1_conditional": Example(lambda shape: conditional_conv(shape, (3,)), CHANNELS, context=(3,), any_shape=True),
    "conv1x1_conditional_image": Example(
        lambda shape: conditional_conv(shape, (2, 5, 9)), ((2,), (3, 2, 4), (4, 1, 1)), (2, 5, 9), any_shape=True
    ),
    "glow_coupling": Example(glow_coupling, tuple(shape for shape in CHANNELS if shape[0] > 1), any_shape=True),
    "glow_coupling_bounded": Example(
        lambda shape: glow_coupling(shape, kind=BoundedGlowCoupling), ((5,), (2, 3, 1), (3, 2, 4)), any_shape=True
    ),
    "glow_coupling_conditional": Example(
        lambda shape: glow_coupling(shape, context=3), ((2,), (5,), (4, 1, 3), (3, 3, 2)), context=(3,), any_shape=True
    ),
    "glow_coupling_conditional_image": Example(
        image_coupling, ((2, 2, 3), (3, 2, 3)), context=(2, 4, 6), any_shape=True
    ),
    "mixture_coupling": Example(
        lambda shape: mixture_coupling(shape, 3), ((2,), (5,), (2, 3, 1), (3, 2, 3)), any_shape=True
    ),
    "mixture_coupling_single": Example(lambda shape: mixture_coupling(shape, 1), ((4,), (2, 2, 1)), any_shape=True),
    "mixture_coupling_conditional": Example(
        lambda shape: mixture_coupling(shape, 2, context=3), ((5,), (4, 1, 3)), context=(3,), any_shape=True
    ),
    "logit": Example(lambda shape: Logit(), ((1,), (5,), (3, 2, 4)), any_shape=True, to_domain=torch.sigmoid),
    "logit_narrow": Example(lambda shape: Logit(0.3), ((2,), (1, 2, 2)), any_shape=True, to_domain=torch.sigmoid),
    "squeeze": Example(lambda shape: Squeeze(), ((1, 4, 6), (3, 2, 4), (2, 6, 2)), any_shape=True, only_moves=True),
    "haar_squeeze": Example(lambda shape: HaarSqueeze(), ((1, 4, 6), (3, 2, 4)), any_shape=True),
    "shifted_squares": Example(
        lambda shape: ShiftedSquares(1), ((4, 2, 3), (12, 1, 2)), any_shape=True, only_moves=True
    ),
    "phase_order": Example(
        lambda shape: PhaseOrder(shape[0]), ((4, 2, 3), (12, 1, 2)), any_shape=True, only_moves=True
    ),
    "channel_coupling": Example(lambda shape: channel_couplings(shape)[1], ((2, 1, 1), (3, 2, 3))),
    "factor_out": Example(lambda shape: FactorOut(shape, []), EVEN_CHANNELS, only_moves=True),
    "factor_out_prior": Example(lambda shape: FactorOut(shape, [Rescale(0.7)], learned_prior(shape)), EVEN_CHANNELS),
    "factor_out_nested": Example(nested_factor_out, ((2, 2, 4), (6, 4, 2))),
    "factor_out_conditional": Example(
        lambda shape: FactorOut(
            shape, channel_couplings((shape[0] // 2, *shape[1:]), context=3), learned_prior(shape, context=3)
        ),
        ((4, 1, 2), (6, 2, 1)),
        context=(3,),
    ),
    "factor_out_conditional_image": Example(
        lambda shape: FactorOut(shape, [Rescale(0.7)], image_prior(shape)),
        ((2, 2, 3), (4, 2, 3)),
        context=(2, 4, 6),
    ),
}


@torch.no_grad()
def randomize(module: nn.Module, scale: float = 0.5) -> None:
    """Move every parameter by random numbers, since layers and log-scales that start at 0 would hide errors."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def build(
    name: str, shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Bijection, Tensor, Tensor | None]:
    """A bijection with random parameters in evaluation mode, a batch (BATCH, *shape), and a context or None."""
    example = BIJECTIONS[name]
    torch.manual_seed(seed)
    layer = example.make(shape).to(dtype)
    x = example.to_domain(torch.randn(BATCH, *shape, dtype=dtype))
    context = None if example.context is None else torch.randn(BATCH, *example.context, dtype=dtype)
    with torch.no_grad():
        layer.initialize(x, context)
    randomize(layer)
    return layer.eval(), x, context
