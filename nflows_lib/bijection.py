"""The interfaces that the parts of a flow implement: :class:`Layer`, :class:`Bijection`, :class:`Chain` of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nflows_lib.checks import check_at_least, check_tensor

Shape = tuple[int, ...]


class Layer(nn.Module):
    r"""One step of a flow, from data towards latent.

    ``forward(x, context)`` returns ``(z, contribution)``: the transformed batch, and the term that this step adds to
    :math:`\log p(x)` of each example, in nats, shape ``(B,)``. ``inverse(z, context)`` takes a batch in the other
    direction, from latent towards data. A layer that does not use the context ignores it.

    A step that is not a deterministic bijection (dequantization is one) derives from this class and states in its
    docstring what its contribution is. Every other step is a :class:`Bijection`.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set the parameters that depend on data from a first batch. By default there are none, and nothing is done.

        Args:
            x: the first batch, as the layers before this one transform it.
            context: one row per example, if the flow is conditional.
        """

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one transformed example, without the batch dimension.

        Args:
            shape: shape of one example that comes in, without the batch dimension.

        Raises:
            ValueError: if the layer cannot take an example of that shape.
        """
        return shape


class Bijection(Layer):
    r"""A deterministic, invertible :class:`Layer`, :math:`z = f(x)`.

    The contribution is the log-determinant of the *forward* direction, from data to latent: one number per example, in
    nats, shape ``(B,)``. The change of variables adds it to the log-density of the latent (Dinh et al. 2014, eq. 1):

    .. math::

        \log p_X(x) &= \log p_Z(f(x)) \\
        &\quad + \log\left|\det \frac{\partial f}{\partial x}\right|
    """


class ChannelBijection(Bijection):
    """Base of the bijections that have a fixed number of channels.

    They take vectors ``(B, C)`` or images ``(B, C, H, W)``.

    Args:
        channels: number of channels C, at least 1.

    Raises:
        ValueError: if channels is not a whole number of at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_at_least(1, channels=channels)
        self.channels = channels

    def check_channels(self, name: str, x: Tensor) -> None:
        """Raise a ValueError unless x is a batch of vectors or images with this layer's number of channels.

        Args:
            name: what the error calls x.
            x: the batch.
        """
        check_tensor(name, x)
        if x.dim() not in (2, 4) or x.shape[1] != self.channels:
            expected = f"(B, {self.channels}) or (B, {self.channels}, H, W)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) not in (1, 3) or shape[0] != self.channels:
            expected = f"{self.channels}, as in ({self.channels},) or ({self.channels}, H, W)"
            raise ValueError(f"channels: expected {expected}, got {shape}")
        return shape


class AffineBijection(ChannelBijection):
    r"""Base of the bijections that apply one affine map :math:`\mathbf{A} x + b` to the channels of every pixel.

    A subclass says in :meth:`as_affine` what :math:`\mathbf{A}` and :math:`b` are. A :class:`Chain` merges consecutive
    layers of this kind into one matrix product:
    :math:`\mathbf{W} (\mathbf{S} x + b) = (\mathbf{W} \mathbf{S})\, x + \mathbf{W} b`. If a subclass overrides
    ``forward`` but not ``as_affine``, a chain calls its ``forward`` like that of any other layer.
    """

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`\mathbf{A}`, :math:`b` and :math:`\log|\det \mathbf{A}|`, the last one in nats.

        If all examples share them, their shapes are ``(C, C)``, ``(C,)`` and ``()``; if each example has its own,
        ``(B, C, C)``, ``(B, C)`` and ``(B,)``.
        """
        raise NotImplementedError


class Chain(Layer):
    """Layers that are applied one after the other, and whose contributions add up.

    Like an ``nn.Sequential``, a chain can be sliced and joined with a list of layers: ``chain[1:]`` is the chain
    without its first layer, and ``[layer] + chain[1:]`` is the chain with another first layer. The result shares the
    layers' parameters. Its state dict numbers the layers from 0 again, so write a checkpoint from the whole chain,
    never from a slice.

    Args:
        layers: the steps, in the order from data to latent.

    Raises:
        ValueError: if one of them is not a :class:`Layer`.

    >>> import torch
    >>> from nflows_lib.dequantization import Rescale
    >>> chain = Chain([Rescale(2.0), Rescale(0.5)])
    >>> z, log_det = chain(torch.ones(1, 3))
    >>> z.tolist(), log_det.tolist()
    ([[1.0, 1.0, 1.0]], [0.0])
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        layers = list(layers)
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise ValueError(f"layers: expected Layer objects, got {type(layer).__name__} at position {i}")
        self.layers = nn.ModuleList(layers)

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
            # A layer initialises on what the layers before it give, and before its own first forward.
            layer.initialize(x, context)
            x, _ = layer(x, context)

    def output_shape(self, shape: Shape) -> Shape:
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape


def forward_as_one(layers: list[AffineBijection], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply consecutive affine layers to x in one matrix product.

    Returns the transformed batch, in the shape of x, and the sum of the layers' contributions, ``(B,)``, in nats.
    """
    for layer in layers:
        layer.check_channels("x", x)
    matrix, bias, log_det = layers[0].as_affine(context)
    for layer in layers[1:]:
        weight, shift, contribution = layer.as_affine(context)
        matrix, bias = weight @ matrix, (weight @ bias[..., None]).squeeze(-1) + shift
        log_det = log_det + contribution
    return mix(matrix, x, bias), (math.prod(x.shape[2:]) * log_det).expand(len(x))


def mix(matrix: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    r"""Return :math:`\mathbf{A} x + b`, applied to the channels of every pixel, in the shape of x.

    With one matrix for all examples, the whole batch is one product. It needs no copy if the channels of x come first
    in memory, as those of the result do. On a CPU this is several times as fast as a convolution.

    Args:
        matrix: :math:`\mathbf{A}`, ``(C, C)`` for all examples, or ``(B, C, C)`` with one per example.
        x: vectors ``(B, C)`` or images ``(B, C, H, W)``.
        bias: :math:`b`, ``(C,)``, or ``(B, C)`` with one per example.
    """
    if matrix.dim() == 3:
        pixels = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
        return torch.baddbmm(bias[..., None].expand(len(x), -1, 1), matrix, pixels).view(x.shape)
    channels_first = x.transpose(0, 1)
    return torch.addmm(bias[:, None], matrix, channels_first.flatten(1)).view(channels_first.shape).transpose(0, 1)


def _grouped(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers in their order, in lists: consecutive affine maps share a list, every other layer has its own."""
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and _may_merge(groups[-1][-1]) and _may_merge(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _may_merge(layer: Layer) -> bool:
    """Whether ``as_affine`` may replace a call of the layer's ``forward``.

    It may if the class that defines ``forward`` defines ``as_affine``, too, and if no hook or replaced method would
    miss the call.
    """
    watched = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    definer = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return "as_affine" in vars(definer) and not watched


def sum_per_example(values: Tensor) -> Tensor:
    """Sum over every dimension except the batch: ``(B, ...)`` to ``(B,)``."""
    return values.sum(dim=tuple(range(1, values.dim())))


def initialize_network(network: nn.Module | None, x: Tensor, context: Tensor | None) -> None:
    """Call the ``initialize`` of the network inside a layer on what it sees of a first batch, if it has that method."""
    if hasattr(network, "initialize"):
        network.initialize(x, context)
