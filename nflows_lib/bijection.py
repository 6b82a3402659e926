"""The contract that every part of a flow keeps: :class:`Layer`, :class:`Bijection`, and the :class:`Chain` of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from numbers import Integral

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Layer(nn.Module):
    """One step of a flow, from data towards latent.

    ``forward(x, context)`` returns ``(z, contribution)``: the transformed batch, and what this step adds to
    log p(x) for each example, shape (B,), in nats. ``inverse(z, context)`` goes back from latent towards data.
    A layer that does not use the context ignores it.

    A step that is not a deterministic bijection (dequantization, say) derives from this class and states in its
    docstring what its contribution stands for. Everything else is a :class:`Bijection`.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set parameters from a first batch, where a layer has such. By default there is nothing to do."""

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of one transformed example, given the shape of one example, both without the batch dimension.

        Raises:
            ValueError: the layer cannot take that shape.
        """
        return shape


class Bijection(Layer):
    r"""A deterministic, invertible :class:`Layer`: z = f(x).

    The contribution is :math:`\log|\det \partial f / \partial x|` of the *forward* direction (data to latent), in
    nats, shape (B,), summed over all dimensions of an example. With it, log p(x) = log p_base(f(x)) + contribution
    (the change of variables; Dinh et al. 2014, eq. 1).
    """


class ChannelBijection(Bijection):
    """Base of the bijections that know their number of channels, and take vectors (B, C) or images (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels

    def check_channels(self, name: str, x: Tensor) -> None:
        """Raise a ValueError unless x is a batch of vectors or images with that many channels."""
        if x.dim() not in (2, 4) or x.shape[1] != self.channels:
            expected = f"(B, {self.channels}) or (B, {self.channels}, H, W)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) not in (1, 3) or shape[0] != self.channels:
            expected = f"{self.channels}, as in ({self.channels},) or ({self.channels}, H, W)"
            raise ValueError(f"channels: expected {expected}, got {shape}")
        return shape


class AffineBijection(ChannelBijection):
    """Base of the bijections z = A x + b of the channels, alike at every pixel, that say what A and b are.

    A :class:`Chain` makes one product of those that stand side by side: W (S x + b) = (W S) x + W b. A subclass that
    has a ``forward`` of its own and no ``as_affine`` is called as any other layer.
    """

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A, b and log|det A|, for all examples or for each: (C, C) or (B, C, C), (C,) or (B, C), () or (B,)."""
        raise NotImplementedError


class Chain(Layer):
    """Layers applied one after the other; their contributions add up.

    Like an ``nn.Sequential`` it can be sliced, and joined with a list of layers: ``chain[1:]`` is the chain without its
    first layer, ``[layer] + chain[1:]`` has another first layer. The result shares the layers' parameters. Its state
    dict numbers the layers from 0 again, so a checkpoint is always written from the whole chain, never from a slice.

    >>> import torch
    >>> from nflows_lib.dequantization import Rescale
    >>> z, log_det = Chain([Rescale(2.0), Rescale(0.5)])(torch.ones(1, 3))
    >>> z.tolist(), log_det.tolist()
    ([[1.0, 1.0, 1.0]], [0.0])
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise ValueError(f"layers: expected Layer objects, got {type(layer).__name__} at position {i}")

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int | slice) -> Layer:
        return Chain(self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __add__(self, others: Iterable[Layer]) -> Chain:
        return Chain([*self, *others])

    def __radd__(self, others: Iterable[Layer]) -> Chain:
        return Chain([*others, *self])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), device=x.device)
        for layers in _grouped(self.layers):
            x, contribution = forward_as_one(layers, x, context) if len(layers) > 1 else layers[0](x, context)
            total = total + contribution
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z, context)
        return z

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        for layer in self.layers:
            layer.initialize(x, context)  # before its own forward, after everything in front of it
            x, _ = layer(x, context)

    def output_shape(self, shape: Shape) -> Shape:
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape


def forward_as_one(layers: list[AffineBijection], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the layers, one after the other, make of x, and what they contribute, by one product."""
    for layer in layers:
        layer.check_channels("x", x)
    matrix, bias, log_det = layers[0].as_affine(context)
    for layer in layers[1:]:
        weight, shift, contribution = layer.as_affine(context)
        matrix, bias = weight @ matrix, (weight @ bias[..., None]).squeeze(-1) + shift
        log_det = log_det + contribution
    return mix(matrix, x, bias), (math.prod(x.shape[2:]) * log_det).expand(len(x))


def mix(matrix: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """A x + b over the channels at every pixel: A is (C, C), or (B, C, C) with one for each example; b likewise.

    One matrix for all is one product for the whole batch, if the channels come first in memory; so they do in what
    comes out. On a CPU it is several times as fast as a convolution.
    """
    if matrix.dim() == 3:
        pixels = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
        return torch.baddbmm(bias[..., None].expand(len(x), -1, 1), matrix, pixels).view(x.shape)
    channels_first = x.transpose(0, 1)
    return torch.addmm(bias[:, None], matrix, channels_first.flatten(1)).view(channels_first.shape).transpose(0, 1)


def _grouped(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers in their order: affine maps that stand side by side in one list, every other layer in its own."""
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and _may_merge(groups[-1][-1]) and _may_merge(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _may_merge(layer: Layer) -> bool:
    """Whether as_affine says what the layer's forward does, and nobody waits to see that called."""
    watched = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    definer = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return "as_affine" in vars(definer) and not watched


def sum_per_example(values: Tensor) -> Tensor:
    """Sum over every dimension but the batch: (B, ...) to (B,)."""
    return values.sum(dim=tuple(range(1, values.dim())))


def initialize_network(network: nn.Module | None, x: Tensor, context: Tensor | None) -> None:
    """Let the network inside a layer set parameters from what it sees of a first batch, where it has such."""
    if hasattr(network, "initialize"):
        network.initialize(x, context)


def check_positive(**numbers: int) -> None:
    """Raise a ValueError, with the number's name, unless each is a whole number of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name}: expected a whole number, got {number!r}")
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


def check_shape(name: str, x: Tensor | None, shape: Shape) -> None:
    """Raise a ValueError unless x is there and a batch of examples of this shape, ``(B, *shape)``."""
    if x is None or x.dim() == 0 or tuple(x.shape[1:]) != tuple(shape):
        expected = ", ".join(["B", *map(str, shape)])
        raise ValueError(f"{name}: expected shape ({expected}), got {None if x is None else tuple(x.shape)}")
