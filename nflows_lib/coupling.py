"""Coupling layers: one half of the vector is left unchanged and decides how the other half is changed."""

from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, ChannelBijection, Shape, initialize_network, sum_per_example
from nflows_lib.checks import check_at_least, check_shape, check_tensor, is_shape


def alternating_mask(dims: int, parity: int) -> Tensor:
    """Return a boolean mask of shape ``(dims,)`` that is True at every other position.

    True marks the entries that are left unchanged and feed the network; a coupling changes the others. So one half of
    the vector has the even positions and the other half the odd ones, as in NICE (Dinh et al. 2014, section 3.2).

    Args:
        dims: number of dimensions D, at least 2.
        parity: 0 for True at the even positions, 1 for True at the odd ones.

    Raises:
        ValueError: if dims is below 2, or parity is neither 0 nor 1.

    >>> alternating_mask(4, 0).tolist()
    [True, False, True, False]
    """
    check_at_least(2, ", one for each half", dims=dims)
    _check_parity(parity)
    return torch.arange(dims) % 2 == parity


def checkerboard_mask(shape: Shape, parity: int) -> Tensor:
    """Return a boolean mask of shape ``(C, H, W)`` that is a checkerboard of pixels (Dinh et al. 2016, section 3.4).

    True marks the pixels that are left unchanged, the same in every channel.

    Args:
        shape: ``(C, H, W)``, with at least two pixels.
        parity: 0 for True where row + column is even, 1 for True where row + column is odd.

    Raises:
        ValueError: if shape is not ``(C, H, W)`` with at least two pixels, or parity is neither 0 nor 1.

    >>> b = checkerboard_mask((1, 2, 3), 0)
    >>> b.int().tolist()
    [[[1, 0, 1], [0, 1, 0]]]
    """
    if not is_shape(shape, 3) or shape[1] * shape[2] < 2:
        raise ValueError(f"shape: expected (C, H, W) with at least two pixels, got {shape}")
    _check_parity(parity)
    _, height, width = shape
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2 == parity).repeat(shape[0], 1, 1)


def channel_mask(shape: Shape, parity: int) -> Tensor:
    """Return a boolean mask of shape ``(C, H, W)`` that is True in one half of the channels.

    True marks the channels that are left unchanged.

    Args:
        shape: ``(C, H, W)``, with at least two channels.
        parity: 0 for True in the first ``C // 2`` channels, 1 for True in the others.

    Raises:
        ValueError: if shape is not ``(C, H, W)`` with at least two channels, or parity is neither 0 nor 1.

    >>> b = channel_mask((2, 1, 2), 0)
    >>> b.int().tolist()
    [[[1, 1]], [[0, 0]]]
    """
    if not is_shape(shape, 3) or shape[0] < 2:
        raise ValueError(f"shape: expected (C, H, W) with at least two channels, got {shape}")
    _check_parity(parity)
    first = torch.arange(shape[0]) < shape[0] // 2
    return (first == (parity == 0))[:, None, None].repeat(1, *shape[1:])


class _Coupling(Bijection):
    """The mask b, the network, and what the network sees: the parts that forward and inverse share.

    A vector is cut in two: the network gets the unchanged half, in order, and its output is for the other half. An
    image keeps its shape, so that a convolution can read it: the network gets b x, and its output is masked.
    """

    def __init__(self, mask: Tensor, network: nn.Module) -> None:
        super().__init__()
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected a boolean tensor, got {mask.dtype}")
        if mask.all() or not mask.any():
            raise ValueError(f"mask: expected both True and False, got only {bool(mask.all())}")
        self.register_buffer("mask", mask)
        self.network = network
        self._find_halves()

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        initialize_network(self.network, self._seen("x", x), context)

    def _seen(self, name: str, x: Tensor) -> Tensor:
        """The part of x that the network gets; name is what an error calls x."""
        check_shape(name, x, self.mask.shape)
        return x.index_select(1, self.passing) if x.dim() == 2 else x * self.mask

    def _network_output(self, seen: Tensor, context: Tensor | None, outputs: int) -> list[Tensor]:
        """That many tensors from the network, each with one number per entry that the layer may change."""
        output = self.network(seen, context)
        size, *rest = self.changing.shape if seen.dim() == 2 else self.mask.shape
        check_shape("network's output", output, (outputs * size, *rest))
        parts = output.chunk(outputs, dim=1)
        return list(parts) if seen.dim() == 2 else [part * ~self.mask for part in parts]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._find_halves()  # the loaded mask may differ from the one before

    def _find_halves(self) -> None:
        """Store the positions of both halves of a vector: finding them in each step would force a GPU sync."""
        for name, half in (("passing", self.mask), ("changing", ~self.mask)):
            self.register_buffer(name, half.nonzero().flatten() if half.dim() == 1 else None, persistent=False)

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != tuple(self.mask.shape):
            raise ValueError(f"mask: expected shape {tuple(shape)}, that of one example, got {tuple(self.mask.shape)}")
        return tuple(shape)

    def extra_repr(self) -> str:
        return f"changes {int((~self.mask).sum())} of {self.mask.numel()}"


class AdditiveCoupling(_Coupling):
    r"""An additive coupling: one half is shifted by a function of the other (Dinh et al. 2014, section 3.2).

    .. math::

        z_1 &= x_1 \\
        z_2 &= x_2 + t(x_1)

    The Jacobian is triangular with ones on its diagonal, so the log-determinant is 0 whatever the network does. The
    inverse subtracts the same shift: the network itself is never inverted.

    Args:
        mask: :math:`b`, boolean, of the shape of one example; True marks what is left unchanged.
        network: :math:`t`, called as ``network(x1, context)``. On vectors it maps ``(B, P)`` to ``(B, D - P)``, where P
            of the D entries are left unchanged. On images it maps ``(B, C, H, W)``, with zeros where the mask is False,
            to ``(B, C, H, W)``.

    Raises:
        ValueError: if the mask is not boolean, or has the same value everywhere.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shifted("x", x, context, 1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._shifted("z", z, context, -1)

    def _shifted(self, name: str, x: Tensor, context: Tensor | None, sign: int) -> Tensor:
        (shift,) = self._network_output(self._seen(name, x), context, outputs=1)
        return x.index_add(1, self.changing, shift, alpha=sign) if x.dim() == 2 else x + sign * shift


class AffineCoupling(_Coupling):
    r"""An affine coupling: one half is scaled and shifted by functions of the other (Dinh et al. 2016, section 3.2).

    .. math::

        z_1 &= x_1 \\
        z_2 &= x_2 \odot e^{s(x_1)} + t(x_1)

    On images, with the mask :math:`b`, this is (eq. 9)

    .. math::

        z = b \odot x + (1 - b) \odot (x \odot e^{s} + t)

    where :math:`s` and :math:`t` are functions of :math:`b \odot x`. The log-determinant is the sum of :math:`s` over
    the entries that change.

    The network gives :math:`t` as it is. From its other output :math:`h` the layer makes :math:`s = g \tanh h`, with
    one learned gain :math:`g` per layer, which starts at 1: :math:`s` stays within :math:`[-g, g]` whatever the network
    does, and :math:`g` is free to grow (section 4.1; chapter 3, F12 and F13).

    Args:
        mask: :math:`b`, boolean, of the shape of one example, ``(D,)`` or ``(C, H, W)``; True marks what is left
            unchanged.
        network: called as ``network(x1, context)``, like that of :class:`AdditiveCoupling`, but with twice as many
            outputs: ``(B, 2 (D - P))`` or ``(B, 2 C, H, W)``, first :math:`h`, then :math:`t`.

    Raises:
        ValueError: if the mask is not boolean, or has the same value everywhere.
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
        """x with its changed entries."""
        return x.index_copy(1, self.changing, changed) if x.dim() == 2 else changed


class GlowCoupling(ChannelBijection):
    r"""Glow's coupling: the second half of the channels is shifted and scaled by functions of the first half.

    .. math::

        z_1 &= x_1 \\
        z_2 &= (x_2 + t(x_1)) \odot \sigma(h(x_1) + 2)

    The log-determinant is the sum of :math:`\log \sigma(h + 2)` over the entries that change. Every scale factor lies
    between 0 and 1: growth is left to the other layers. If a scale factor underflows to 0 (:math:`h` below -90 in
    float32), the log-determinant is -inf, and nothing could be inverted there. This is the form in the code of Kingma
    and Dhariwal 2018; table 1 of the paper writes the scale factor as an exponential.

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``, at least 2. The first
            ``C // 2`` are left unchanged.
        network: called as ``network(x1, context)``; maps ``C // 2`` channels to ``2 * (C - C // 2)``, first :math:`h`,
            then :math:`t`.

    Raises:
        ValueError: if channels is below 2.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels)
        check_at_least(2, ", one for each half", channels=channels)
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
        """The unchanged half, the other half, its scale factor and its shift; name is what an error calls x.

        The channels come first, (C/2, B, ...), as they do in the memory of what a 1x1 convolution returns: each half is
        then one block of memory, and arithmetic on it is twice as fast.
        """
        self.check_channels(name, x)
        passes = self.channels // 2
        x1, x2 = x.transpose(0, 1).split([passes, self.channels - passes])
        output = self.network(x1.transpose(0, 1), context)
        check_shape("network's output", output, (2 * len(x2), *x.shape[2:]))
        h, shift = output.transpose(0, 1).chunk(2)
        return [x1, x2, self.scale(h), shift]

    def scale(self, h: Tensor) -> Tensor:
        """Return the positive scale factor that the network's output h stands for, in the shape of h."""
        return torch.sigmoid(h + 2)


class BoundedGlowCoupling(GlowCoupling):
    r"""Glow's coupling with a bounded scale factor, like that of :class:`AffineCoupling`.

    .. math::

        z_1 &= x_1 \\
        z_2 &= (x_2 + t(x_1)) \odot e^{g \tanh h(x_1)}

    The layer has one learned gain :math:`g`, which starts at 1. The scale factor lies within :math:`[e^{-g}, e^{g}]`
    whatever the network does, so neither direction can divide by a number close to 0 (chapter 5).

    Args:
        channels: as in :class:`GlowCoupling`.
        network: as in :class:`GlowCoupling`.

    Raises:
        ValueError: if channels is below 2.
    """

    def __init__(self, channels: int, network: nn.Module) -> None:
        super().__init__(channels, network)
        self.gain = nn.Parameter(torch.ones(()))

    def scale(self, h: Tensor) -> Tensor:
        return (self.gain * h.tanh()).exp()


def _check_parity(parity: int) -> None:
    if parity not in (0, 1):
        raise ValueError(f"parity: expected 0 or 1, got {parity}")
