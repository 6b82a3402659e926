"""Coupling layers: half of the vector passes unchanged and decides what happens to the other half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib.bijection import (
    Bijection,
    ChannelBijection,
    Shape,
    check_shape,
    initialize_network,
    sum_per_example,
)


def alternating_mask(dims: int, parity: int) -> Tensor:
    """Boolean mask of shape (dims,), True at even positions for parity 0, at odd ones for parity 1.

    True marks what passes unchanged and feeds the network; a coupling changes the rest (Dinh et al. 2014,
    section 3.2: one half of the components is taken as the even, the other as the odd ones).

    >>> alternating_mask(4, 0).tolist()
    [True, False, True, False]
    """
    if dims < 2:
        raise ValueError(f"dims: expected at least 2, one for each half, got {dims}")
    _check_parity(parity)
    return torch.arange(dims) % 2 == parity


def checkerboard_mask(shape: Shape, parity: int) -> Tensor:
    """Boolean mask of shape (C, H, W) like a chess board, the same in every channel (Dinh et al. 2016, section 3.4).

    True, where row + column is even for parity 0, odd for parity 1, marks what passes unchanged.

    >>> checkerboard_mask((1, 2, 3), 0).int().tolist()
    [[[1, 0, 1], [0, 1, 0]]]
    """
    if len(shape) != 3 or min(shape) < 1 or shape[1] * shape[2] < 2:
        raise ValueError(f"shape: expected (C, H, W) with at least two pixels, got {tuple(shape)}")
    _check_parity(parity)
    _, height, width = shape
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2 == parity).repeat(shape[0], 1, 1)


def channel_mask(shape: Shape, parity: int) -> Tensor:
    """Boolean mask of shape (C, H, W), True (passes) in the first half of the channels for parity 0, else the second.

    >>> channel_mask((2, 1, 2), 0).int().tolist()
    [[[1, 1]], [[0, 0]]]
    """
    if len(shape) != 3 or shape[0] < 2:
        raise ValueError(f"shape: expected (C, H, W) with at least two channels, got {tuple(shape)}")
    _check_parity(parity)
    first = torch.arange(shape[0]) < shape[0] // 2
    return (first == (parity == 0))[:, None, None].repeat(1, *shape[1:])


class _Coupling(Bijection):
    """The mask b and the network, and what the network sees, which both directions have.

    A vector is cut in two: the network gets the passing half, in order, and its output is for the other half. An image
    keeps its shape, so that a convolution can read it: the network gets b x, and its output is masked.
    """

    def __init__(self, mask: Tensor, network: nn.Module) -> None:
        super().__init__()
        check_mask(mask)
        self.register_buffer("mask", mask)
        self.network = network
        self._find_halves()

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        initialize_network(self.network, self._seen("x", x), context)

    def _seen(self, name: str, x: Tensor) -> Tensor:
        """What the network gets of x, which an error calls by the name."""
        check_shape(name, x, self.mask.shape)
        return x.index_select(1, self.passing) if x.dim() == 2 else x * self.mask

    def _network_output(self, seen: Tensor, context: Tensor | None, outputs: int) -> list[Tensor]:
        """That many tensors from the network: each has one number for each that the layer may change."""
        output = self.network(seen, context)
        size, *rest = self.changing.shape if seen.dim() == 2 else self.mask.shape
        check_shape("network's output", output, (outputs * size, *rest))
        parts = output.chunk(outputs, dim=1)
        return list(parts) if seen.dim() == 2 else [part * ~self.mask for part in parts]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._find_halves()  # the mask may be another one

    def _find_halves(self) -> None:
        """Store where the halves of a vector are. To look for them in each step would make a CPU wait for its GPU."""
        for name, half in (("passing", self.mask), ("changing", ~self.mask)):
            self.register_buffer(name, half.nonzero().flatten() if half.dim() == 1 else None, persistent=False)

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != tuple(self.mask.shape):
            raise ValueError(f"mask: expected shape {tuple(shape)}, that of one example, got {tuple(self.mask.shape)}")
        return tuple(shape)

    def extra_repr(self) -> str:
        return f"passes {int(self.mask.sum())} of {self.mask.numel()}"


class AdditiveCoupling(_Coupling):
    """z1 = x1, z2 = x2 + t(x1): shift one half by a function of the other (Dinh et al. 2014, section 3.2).

    The Jacobian is triangular with ones on its diagonal, so the log-determinant is 0 whatever the network does, and
    the inverse subtracts the same shift: the network itself is never inverted.

    Args:
        mask: b, boolean, of the shape of one example; True passes unchanged.
        network: t, called as ``network(x1, context)``. On vectors it maps (B, P) to (B, D - P), where the mask passes P
            of D numbers; on images (B, C, H, W), with zeros where the mask is False, to (B, C, H, W).

    Raises:
        ValueError: the mask is not boolean, or passes everything or nothing.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shifted("x", x, context, 1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._shifted("z", z, context, -1)

    def _shifted(self, name: str, x: Tensor, context: Tensor | None, sign: int) -> Tensor:
        (shift,) = self._network_output(self._seen(name, x), context, outputs=1)
        return x.index_add(1, self.changing, shift, alpha=sign) if x.dim() == 2 else x + sign * shift


class AffineCoupling(_Coupling):
    """z1 = x1, z2 = x2 exp(s) + t, where s and t are functions of x1 (Dinh et al. 2016, section 3.2).

    On images that is z = b x + (1 - b) (x exp(s) + t), with s and t functions of b x (eq. 9).

    The log-determinant is the sum of s over what is changed. The network gives t as it is, and s as g tanh(.) with one
    learned gain g for the layer, which starts at 1: s stays within [-g, g] whatever the network does, and g is free to
    grow (section 4.1; chapter 3, F12 and F13).

    Args:
        mask: b, boolean, of the shape of one example, (D,) or (C, H, W); True passes unchanged.
        network: called as ``network(x1, context)``; as that of :class:`AdditiveCoupling`, with twice as many numbers:
            (B, 2 (D - P)) or (B, 2 C, H, W), first what becomes s, then t.

    Raises:
        ValueError: the mask is not boolean, or passes everything or nothing.
    """

    def __init__(self, mask: Tensor, network: nn.Module) -> None:
        super().__init__(mask, network)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(self._seen("x", x), context)
        return self._joined(x, self._half(x) * log_scale.exp() + shift), sum_per_example(log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        log_scale, shift = self._log_scale_and_shift(self._seen("z", z), context)
        return self._joined(z, (self._half(z) - shift) * (-log_scale).exp())

    def _log_scale_and_shift(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self._network_output(x1, context, outputs=2)
        return self.gain * raw.tanh(), shift

    def _half(self, x: Tensor) -> Tensor:
        """What scale and shift act on: the half of a vector that changes, or a whole image."""
        return x.index_select(1, self.changing) if x.dim() == 2 else x

    def _joined(self, x: Tensor, changed: Tensor) -> Tensor:
        return x.index_copy(1, self.changing, changed) if x.dim() == 2 else changed


class GlowCoupling(ChannelBijection):
    """z = (x1, (x2 + t) sigmoid(h + 2)), where h and t are functions of x1, the first half of the channels.

    The log-determinant is the sum of log sigmoid(h + 2). Every scale is between 0 and 1: what must grow is left to the
    other layers. A scale that underflows (h below -90 in float32) makes the log-determinant -inf: nothing could be
    inverted there (the code of Kingma and Dhariwal 2018; the paper's table 1 has an exponential in general terms).

    Args:
        channels: C of what comes in, vectors (B, C) or images (B, C, H, W); at least 2. The first C // 2 pass.
        network: called as ``network(x1, context)``; from C // 2 channels to 2 (C - C // 2), first h, then t.

    Raises:
        ValueError: channels is below 2.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels)
        if channels < 2:
            raise ValueError(f"channels: expected at least 2, one for each half, got {channels}")
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2, scale, shift = self._parts("x", x, context)
        z = torch.cat([x1, (x2 + shift) * scale]).transpose(0, 1)
        return z, sum_per_example(scale.log().transpose(0, 1))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z1, z2, scale, shift = self._parts("z", z, context)
        return torch.cat([z1, z2 / scale - shift]).transpose(0, 1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        initialize_network(self.network, x[:, : self.channels // 2], context)

    def _parts(self, name: str, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """The half that passes, the other one, and for that scale and shift; name is x's in an error.

        The channels come first, (C/2, B, ...), as they do in the memory of what a 1x1 convolution returns: a half is
        then one block, and arithmetic on it twice as fast.
        """
        self.check_channels(name, x)
        passes = self.channels // 2
        x1, x2 = x.transpose(0, 1).split([passes, self.channels - passes])
        output = self.network(x1.transpose(0, 1), context)
        check_shape("network's output", output, (2 * len(x2), *x.shape[2:]))
        h, shift = output.transpose(0, 1).chunk(2)
        return [x1, x2, self.scale(h), shift]

    def scale(self, h: Tensor) -> Tensor:
        """The positive factor that the network's output h stands for."""
        return torch.sigmoid(h + 2)


class BoundedGlowCoupling(GlowCoupling):
    """Glow's coupling with the scale of :class:`AffineCoupling`, exp(g tanh(h)), instead of sigmoid(h + 2).

    The one learned gain g of the layer starts at 1. The scale is within [exp(-g), exp(g)] whatever the network does, so
    that neither direction can divide by almost nothing (chapter 5).
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels, network)
        self.gain = nn.Parameter(torch.ones(()))

    def scale(self, h: Tensor) -> Tensor:
        return (self.gain * h.tanh()).exp()


def check_mask(mask: Tensor) -> None:
    """Raise a ValueError unless the mask is boolean and splits an example into two parts, neither empty."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected a boolean tensor, got {mask.dtype}")
    if mask.all() or not mask.any():
        raise ValueError(f"mask: expected both True and False, got only {bool(mask.all())}")


def _check_parity(parity: int) -> None:
    if parity not in (0, 1):
        raise ValueError(f"parity: expected 0 or 1, got {parity}")
