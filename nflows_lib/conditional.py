"""Layers and networks whose parameters depend on a context, as in conditional Glow (Lu and Huang 2020)."""

import math

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Shape, initialize_network
from nflows_lib.checks import check_at_least, check_shape, is_shape
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.networks import channels_last, check_precision, computing_in, zeroed
from nflows_lib.normalization import ActNorm


class ConditioningNetwork(nn.Module):
    """A network from a context to the numbers that a layer needs, one vector per example.

    An image goes through 3x3 convolutions that halve it until at most 16 pixels are left, then through two linear
    layers. A vector goes through the two linear layers only. There is a ReLU after every layer but the last. Only the
    *last* layer starts at zero: if all layers did, only the bias of the last would ever get a gradient (chapter 6,
    F24).

    Args:
        context_shape: shape of one example's context: ``(K, H, W)``, or ``(K,)``.
        outputs: size of the vector that comes out.
        hidden: channels of the convolutions, and size of the vector between the linear layers.
        precision: type that the network computes in, as in :class:`~nflows_lib.networks.ResNet`.

    Raises:
        ValueError: if context_shape is that of neither a vector nor an image, outputs or hidden is below 1, or
            precision is neither float32 nor bfloat16.
    """

    def __init__(self, context_shape: Shape, outputs: int, hidden: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_context_shape(context_shape)
        check_at_least(1, outputs=outputs, hidden=hidden)
        check_precision(precision)
        self.context_shape, self.precision = tuple(context_shape), precision
        channels, *size = context_shape
        layers: list[nn.Module] = []
        while math.prod(size) > 16:
            layers += [nn.Conv2d(channels, hidden, 3, stride=2, padding=1), nn.ReLU()]
            channels, size = hidden, [-(-side // 2) for side in size]
        layers += [nn.Flatten(), nn.Linear(channels * math.prod(size), hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(hidden, outputs)))

    def forward(self, context: Tensor | None) -> Tensor:
        """Map contexts ``(B, K, H, W)`` or ``(B, K)`` to vectors ``(B, outputs)``.

        Raises:
            ValueError: if the context is None or has another shape.
        """
        check_shape("context", context, self.context_shape)
        with computing_in(self.precision, context):
            return self.layers(channels_last(context)).to(context.dtype)


class ConditionalActNorm(ActNorm):
    r"""An :class:`~nflows_lib.normalization.ActNorm` whose scale factor and shift also depend on a context x.

    .. math::

        z = e^{s + \tanh s(x)} \odot y + b + b(x)

    The shared :math:`s` and :math:`b` are initialised from a first batch, as in an ActNorm. The parts that depend on x
    start at 0, and the tanh keeps the log-scale's part within [-1, 1] whatever x is.

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``.
        network: called as ``network(context)``; gives ``(B, 2 C)``, first :math:`s(x)`, then :math:`b(x)`. Its output
            starts at 0.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels)
        self.network = network

    def log_scale_and_bias(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        output = self.network(context)
        check_shape("network's output", output, (2 * self.channels,))
        log_scale, bias = output.chunk(2, dim=1)
        return self.log_scale + log_scale.tanh(), self.bias + bias


class Conditional1x1Conv(Invertible1x1Conv):
    r"""A 1x1 convolution with its own matrix for each context x, invertible by construction.

    .. math::

        \mathbf{W}(x) = \mathbf{P}\, \mathbf{L}(x)\, (\mathbf{U}(x) + \operatorname{diag} \omega(x))

    The factors are those of :class:`~nflows_lib.convolution.Invertible1x1Conv`. To each learned number in
    :math:`\mathbf{L}`, :math:`\mathbf{U}` and :math:`\log|\omega|`, the layer adds the tanh of one output of the
    network, so no determinant is 0, whatever x is. (The code of Lu and Huang 2020 takes the network's output as
    :math:`\mathbf{W}` itself, which may be singular.)

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``.
        network: called as ``network(context)``; gives ``(B, C * C)``, row by row. Its output starts at 0.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels)
        self.network = network

    def lu_factors(self, context: Tensor | None) -> Tensor:
        output = self.network(context)
        check_shape("network's output", output, (self.channels**2,))
        return self.factors + output.tanh().unflatten(1, self.factors.shape)


class ConditionalNet(nn.Module):
    """The network of a conditional coupling or prior, which also sees features of the context.

    A second network computes the features: 3x3 convolutions bring a context that is an image to the input's height and
    width. Each of them halves the size, except the last, which keeps it.

    Args:
        network: called as ``network(x, features)``; takes a context of as many channels as ``features`` says.
        context_shape: shape of one example's context, ``(K, H, W)``.
        size: height and width of the input: those of the context, or those halved any number of times.
        features: number of channels of the features.
        precision: type that the convolutions to the features compute in, as in :class:`~nflows_lib.networks.ResNet`.

    Raises:
        ValueError: if the context is not an image, or its size is not the input's times a power of 2.
    """

    def __init__(
        self,
        network: nn.Module,
        context_shape: Shape,
        size: Shape,
        features: int,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_context_shape(context_shape)
        check_precision(precision)
        self.context_shape, self.network, self.precision = tuple(context_shape), network, precision
        channels, *full = context_shape
        halvings = max((full[0] // size[0]).bit_length() - 1, 0) if full else 0
        if full != [side * 2**halvings for side in size]:
            expected = f"(K, H, W), with (H, W) = {tuple(size)} times a power of 2"
            raise ValueError(f"context_shape: expected {expected}, got {self.context_shape}")
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, features, 3, stride=2, padding=1), nn.ReLU()]
            channels = features
        self.features = nn.Sequential(*layers, nn.Conv2d(channels, features, 3, padding=1), nn.ReLU())

    def initialize(self, x: Tensor, context: Tensor | None) -> None:
        """Initialise the inner network from a first batch and the features of its context."""
        initialize_network(self.network, x, self._features_of(context))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Map ``(B, inputs, H, W)`` and a context ``(B, K, ...)`` to the output of the inner network.

        Raises:
            ValueError: if the context is None or has another shape.
        """
        return self.network(x, self._features_of(context))

    def _features_of(self, context: Tensor | None) -> Tensor:
        check_shape("context", context, self.context_shape)
        with computing_in(self.precision, context):
            return self.features(channels_last(context)).to(context.dtype)


def check_context_shape(shape: Shape) -> None:
    """Raise a ValueError unless the shape is that of a vector, ``(K,)``, or of an image, ``(K, H, W)``."""
    if not is_shape(shape, 1, 3):
        raise ValueError(f"context_shape: expected (K,) or (K, H, W), got {shape}")
