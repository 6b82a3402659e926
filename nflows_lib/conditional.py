"""Layers whose parameters come from a context: conditional Glow (Lu and Huang 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Shape, check_shape, initialize_network
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.networks import channels_last, check_precision, computing_in, zeroed
from nflows_lib.normalization import ActNorm


class ConditioningNetwork(nn.Module):
    """From a context to the numbers that a layer needs, one vector for each example.

    An image is halved by 3x3 convolutions until at most 16 pixels are left; then, as for a vector at once, two linear
    layers. ReLUs between them all. Only the *last* layer starts at zero: with all of them at zero, none but its bias
    would ever get a gradient (chapter 6, F24).

    Args:
        context_shape: of one example's context: (K, H, W), or (K,).
        outputs: how many numbers come out.
        hidden: channels of the convolutions, and size of the vector between the linear layers.
        precision: as of :class:`nflows_lib.networks.ResNet`.
    """

    def __init__(self, context_shape: Shape, outputs: int, hidden: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_context_shape(context_shape)
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
        """(B, K, H, W), or (B, K), to (B, outputs).

        Raises:
            ValueError: there is no context, or one of another shape.
        """
        check_shape("context", context, self.context_shape)
        with computing_in(self.precision, context):
            return self.layers(_laid_out(context)).to(context.dtype)


class ConditionalActNorm(ActNorm):
    """z = exp(s + tanh s(x)) y + b + b(x): an :class:`ActNorm` with a part for each context x beside what is for all.

    s and b are initialised from a first batch as those of an ActNorm. The part that depends on x starts at 0, and its
    log-scale stays within [-1, 1], whatever x is.

    Args:
        channels: C, of vectors (B, C) or images (B, C, H, W).
        network: called as ``network(context)``; gives (B, 2 C), first what becomes s(x), then b(x). It starts at 0.
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
    """:class:`Invertible1x1Conv` with another matrix W(x) for each context x, invertible by construction.

    W(x) = P L(x) (U(x) + diag(s(x))): to each number in L, U and log|s| that is learned for all, tanh of one from the
    network is added, so that no determinant is 0, whatever x is. (The code of Lu and Huang 2020 takes the network's
    output as W itself, which may be singular.)

    Args:
        channels: C, of vectors (B, C) or images (B, C, H, W).
        network: called as ``network(context)``; gives (B, C^2), row by row. It starts at 0.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels)
        self.network = network

    def lu_factors(self, context: Tensor | None) -> Tensor:
        output = self.network(context)
        check_shape("network's output", output, (self.channels**2,))
        return self.factors + output.tanh().unflatten(1, self.factors.shape)


class ConditionalNet(nn.Module):
    """The network of a conditional coupling or prior: beside its input, another network sees features of the context.

    A context that is an image is brought to the input's height and width by 3x3 convolutions, the last of which keeps
    the size, those before it halve it.

    Args:
        network: called as ``network(x, features)``; its context has ``features`` channels.
        context_shape: of one example's context, (K, H, W).
        size: height and width of the input: the context's, halved any number of times.
        features: channels of the features.
        precision: what the convolutions to the features compute in, as of :class:`nflows_lib.networks.ResNet`.

    Raises:
        ValueError: the context is no image, or its size is another.
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
            expected = f"(K, H, W), with H and W {tuple(size)} or twice, four times ... that"
            raise ValueError(f"context_shape: expected {expected}, got {self.context_shape}")
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, features, 3, stride=2, padding=1), nn.ReLU()]
            channels = features
        self.features = nn.Sequential(*layers, nn.Conv2d(channels, features, 3, padding=1), nn.ReLU())

    def initialize(self, x: Tensor, context: Tensor | None) -> None:
        """Initialise the network from a first batch."""
        initialize_network(self.network, x, self._features_of(context))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(B, inputs, H, W), and a context (B, K, ...), to what the network gives."""
        return self.network(x, self._features_of(context))

    def _features_of(self, context: Tensor | None) -> Tensor:
        check_shape("context", context, self.context_shape)
        with computing_in(self.precision, context):
            return self.features(_laid_out(context)).to(context.dtype)


def _laid_out(context: Tensor) -> Tensor:
    """In the layout that convolutions are fastest in, if it is an image."""
    return channels_last(context) if context.dim() == 4 else context


def check_context_shape(shape: Shape) -> None:
    """Raise a ValueError unless it is that of a vector or of an image."""
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"context_shape: expected (K,) or (K, H, W), got {tuple(shape)}")
