"""The papers' models, each built as a readable list of layers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Layer, Shape
from nflows_lib.checks import check_at_least
from nflows_lib.conditional import (
    Conditional1x1Conv,
    ConditionalActNorm,
    ConditionalNet,
    ConditioningNetwork,
    check_context_shape,
)
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    BoundedGlowCoupling,
    GlowCoupling,
    alternating_mask,
    channel_mask,
    checkerboard_mask,
)
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import Base, StandardLogistic, StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.multiscale import FactorOut, PhaseOrder, Squeeze
from nflows_lib.networks import MLP, BoundedPrior, GlowNet, ResNet, ZeroConv
from nflows_lib.normalization import ActNorm, DiagonalScaling, FlowBatchNorm


def nice(
    dims: int,
    *,
    levels: int | None = None,
    couplings: int = 4,
    hidden: int = 1000,
    depth: int = 5,
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Base | None = None,
) -> Flow:
    """NICE (Dinh et al. 2014): additive couplings with alternating halves, then one diagonal scaling.

    The defaults are the paper's for MNIST: 4 couplings, 5 hidden layers of 1000 rectified units, logistic prior.

    Args:
        dims: D, the size of one example, a vector (images are flattened).
        levels: number of levels if the data are integers, which are then dequantized and brought to [0, 1); None if the
            data are real numbers.
        couplings: number of additive couplings, at least 2; with one, half of the vector would never change.
        hidden: width of the networks' hidden layers.
        depth: number of hidden layers in each network.
        activation: builds the networks' nonlinearity.
        base: prior of the latent; None: the standard logistic.

    Raises:
        ValueError: if couplings or dims is below 2, or hidden or depth below 1.
    """
    check_at_least(2, ", so that each half is changed", couplings=couplings)
    layers: list[Layer] = [] if levels is None else [UniformDequantize(levels), Rescale(1 / levels)]
    for i in range(couplings):
        mask = alternating_mask(dims, i % 2)
        layers.append(AdditiveCoupling(mask, MLP(int(mask.sum()), int((~mask).sum()), hidden, depth, activation)))
    return Flow([*layers, DiagonalScaling(dims)], base or StandardLogistic(), (dims,))


def realnvp_points(
    dims: int, *, couplings: int = 6, hidden: int = 64, depth: int = 2, activation: Callable[[], nn.Module] = nn.ReLU
) -> Flow:
    """RealNVP (Dinh et al. 2016) on points: affine couplings with alternating halves, normal prior.

    Args:
        dims: D, the size of one example, a vector of real numbers.
        couplings: number of affine couplings, at least 2.
        hidden: width of the networks' hidden layers.
        depth: number of hidden layers in each network.
        activation: builds the networks' nonlinearity.

    Raises:
        ValueError: if couplings or dims is below 2, or hidden or depth below 1.
    """
    check_at_least(2, ", so that each half is changed", couplings=couplings)
    layers: list[Layer] = []
    for i in range(couplings):
        mask = alternating_mask(dims, i % 2)
        layers.append(AffineCoupling(mask, MLP(int(mask.sum()), 2 * int((~mask).sum()), hidden, depth, activation)))
    return Flow(layers, StandardNormal(), (dims,))


def realnvp(
    shape: Shape,
    *,
    levels: int = 256,
    alpha: float = 0.05,
    scales: int = 1,
    couplings: int = 6,
    hidden: int = 64,
    blocks: int = 8,
    precision: torch.dtype = torch.float32,
) -> Flow:
    """RealNVP (Dinh et al. 2016) on images: affine couplings on logits, with a batch norm after each coupling.

    Every scale but the last has three couplings with checkerboard masks, a squeeze, and three couplings with channel
    masks. Then half of the channels is finished, and the other half goes on to the next scale. The networks of each
    scale are twice as wide as those of the scale before. (In the reference code they are twice as wide from the squeeze
    on.)

    The defaults of hidden and blocks are the paper's for CIFAR-10, where it has two scales.

    Args:
        shape: ``(C, H, W)`` of one image of integers.
        levels: number of levels n; the integers are from 0 to n - 1.
        alpha: margin of the logit.
        scales: number of scales; height and width are halved scales - 1 times.
        couplings: number of couplings at the last scale, at least 2.
        hidden: channels inside the residual networks of the first scale.
        blocks: number of residual blocks in each network.
        precision: type that the networks' convolutions compute in.

    Raises:
        ValueError: if couplings is below 2, scales or hidden is below 1, blocks is negative, or a squeeze meets an odd
            height or width.
    """
    check_at_least(2, ", so that each half is changed", couplings=couplings)
    check_at_least(1, scales=scales)

    def coupled(masks: Iterable[Tensor], width: int) -> list[Layer]:
        layers: list[Layer] = []
        for mask in masks:
            channels = len(mask)
            network = ResNet(channels, 2 * channels, width, blocks, precision=precision)
            layers += [AffineCoupling(mask, network), FlowBatchNorm(channels)]
        return layers

    def from_scale_on(shape: Shape, left: int, width: int) -> list[Layer]:
        if left == 1:
            return coupled((checkerboard_mask(shape, i % 2) for i in range(couplings)), width)
        layers = coupled((checkerboard_mask(shape, i % 2) for i in range(3)), width)
        layers.append(Squeeze())
        shape = layers[-1].output_shape(shape)
        layers += coupled((channel_mask(shape, i % 2) for i in range(3)), width)
        half = (shape[0] // 2, *shape[1:])
        return [*layers, PhaseOrder(shape[0]), FactorOut(shape, from_scale_on(half, left - 1, 2 * width))]

    start: list[Layer] = [UniformDequantize(levels), Rescale(1 / levels), Logit(alpha)]
    return Flow(start + from_scale_on(shape, scales, hidden), StandardNormal(), shape)


def glow(
    shape: Shape,
    *,
    levels: int = 256,
    scales: int = 3,
    steps: int = 32,
    hidden: int = 512,
    classes: int = 0,
    lu: bool = True,
    bounded: bool = False,
    bounded_priors: bool = False,
    alpha: float | None = None,
    noise: int = 0,
    precision: torch.dtype = torch.float32,
) -> Flow:
    """Glow (Kingma and Dhariwal 2018) on images: steps of ActNorm, 1x1 convolution and coupling, at several scales.

    Each scale has a squeeze, then the steps. At every scale but the last, half of the channels is then finished under a
    prior that is learned from the other half, and the other half goes on to the next scale. The defaults are the
    paper's for CIFAR-10.

    Args:
        shape: ``(C, H, W)`` of one image of integers; height and width can be halved as often as there are scales.
        levels: number of levels n; the integers are from 0 to n - 1.
        scales: number of scales, L in the paper.
        steps: number of steps at each scale, K in the paper.
        hidden: channels inside the couplings' networks.
        classes: number of classes if the flow is conditional on a label, which the context gives one-hot,
            ``(B, classes)``. It joins the input of every network, including those of the priors. 0: unconditional.
        lu: how the 1x1 convolutions are parametrised, as in :class:`~nflows_lib.convolution.Invertible1x1Conv`.
        bounded: whether the couplings are :class:`~nflows_lib.coupling.BoundedGlowCoupling`, instead of those of the
            released code.
        bounded_priors: whether the scale factors of the priors are bounded, too
            (:class:`~nflows_lib.networks.BoundedPrior`).
        alpha: margin of a logit in front of the first scale, which Glow does not have. None: pixels are only scaled.
        noise: channels inside the networks of two couplings that draw the dequantization noise given the image, not the
            label (:class:`~nflows_lib.dequantization.VariationalDequantize`). 0: the noise is uniform, as in Glow.
        precision: type that the couplings' networks compute in.

    Raises:
        ValueError: if scales, steps or hidden is below 1, classes is 1 or negative, noise is negative, alpha is not
            between 0 and 1/2, or a squeeze meets an odd height or width.
    """
    if not isinstance(classes, int) or classes < 0 or classes == 1:
        raise ValueError(f"classes: expected 0 or at least 2, got {classes}")
    check_at_least(0, " channels", noise=noise)
    coupling = BoundedGlowCoupling if bounded else GlowCoupling

    def step(channels: int, size: Shape) -> list[Layer]:
        network = GlowNet(channels // 2, channels, hidden, classes, precision)
        return [ActNorm(channels), Invertible1x1Conv(channels, lu), coupling(channels, network)]

    def prior(channels: int, size: Shape) -> nn.Module:
        network = ZeroConv(channels // 2, channels, classes)
        return BoundedPrior(network) if bounded_priors else network

    def noise_coupling(parity: int) -> Layer:
        network = ResNet(shape[0], 2 * shape[0], noise, 1, shape[0], precision)
        return AffineCoupling(checkerboard_mask(shape, parity), network)

    start: list[Layer] = [UniformDequantize(levels), Rescale(1 / levels)]
    if noise:
        start[0] = VariationalDequantize([noise_coupling(0), noise_coupling(1)], levels)
    if alpha is not None:
        start.append(Logit(alpha))
    return _glow_of(start, step, prior, shape, scales, steps, hidden)


def cglow(
    shape: Shape,
    context_shape: Shape,
    *,
    levels: int = 256,
    scales: int = 3,
    steps: int = 8,
    hidden: int = 256,
    conditioning: int = 64,
    precision: torch.dtype = torch.float32,
) -> Flow:
    """Conditional Glow (Lu and Huang 2020): the density of an image y given a context x, an image or a vector.

    It has Glow's steps, and each of their layers has a conditioning network of its own. ActNorm and 1x1 convolution add
    the output of this network to their parameters. The network of a coupling or of a prior gets, in addition to its
    input, features of the context, or the context itself if it is a vector. Scale factors are bounded
    (:class:`~nflows_lib.coupling.BoundedGlowCoupling`). The defaults are those of the released code for photographs of
    horses.

    Args:
        shape: ``(C, H, W)`` of y, integers; height and width can be halved as often as there are scales.
        context_shape: shape of x, floats: ``(K,)``, or ``(K, H', W')``. H' and W' are those of y, or those of y all
            halved or doubled the same number of times, as long as they are no smaller than y's after the first squeeze.
        levels: number of levels n of y; the integers are from 0 to n - 1.
        scales: number of scales.
        steps: number of steps at each scale.
        hidden: channels inside the couplings' networks.
        conditioning: channels inside the conditioning networks, and of the features that couplings and priors see.
        precision: type that all these networks compute in.

    Raises:
        ValueError: if scales, steps, hidden or conditioning is below 1, a squeeze meets an odd height or width, or
            context_shape does not fit shape.
    """
    check_at_least(1, conditioning=conditioning)
    check_context_shape(context_shape)
    is_image = len(context_shape) == 3

    def seeing(network: nn.Module, size: Shape) -> nn.Module:
        return ConditionalNet(network, context_shape, size, conditioning, precision) if is_image else network

    def generator(outputs: int) -> nn.Module:
        return ConditioningNetwork(context_shape, outputs, conditioning, precision)

    width = conditioning if is_image else context_shape[0]

    def step(channels: int, size: Shape) -> list[Layer]:
        return [
            ConditionalActNorm(channels, generator(2 * channels)),
            Conditional1x1Conv(channels, generator(channels**2)),
            BoundedGlowCoupling(channels, seeing(GlowNet(channels // 2, channels, hidden, width, precision), size)),
        ]

    def prior(channels: int, size: Shape) -> nn.Module:
        return BoundedPrior(seeing(ZeroConv(channels // 2, channels, width), size))

    start = [UniformDequantize(levels), Rescale(1 / levels)]
    return _glow_of(start, step, prior, shape, scales, steps, hidden)


def _glow_of(
    start: list[Layer],
    step: Callable[[int, Shape], list[Layer]],
    prior: Callable[[int, Shape], nn.Module],
    shape: Shape,
    scales: int,
    steps: int,
    hidden: int,
) -> Flow:
    """Glow's arrangement of steps and priors after a start; each is built for its channels and (height, width)."""
    check_at_least(1, scales=scales, steps=steps, hidden=hidden)

    def from_scale_on(shape: Shape, left: int) -> list[Layer]:
        layers: list[Layer] = [Squeeze()]
        channels, *size = layers[0].output_shape(shape)
        for _ in range(steps):
            layers += step(channels, size)
        if left == 1:
            return layers
        # The prior is built before the inner layers: in this order, a seed gives the weights of earlier versions.
        conditioned = prior(channels, size)
        return [*layers, FactorOut((channels, *size), from_scale_on((channels // 2, *size), left - 1), conditioned)]

    return Flow([*start, *from_scale_on(shape, scales)], StandardNormal(), shape)
