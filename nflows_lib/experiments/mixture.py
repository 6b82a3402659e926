"""A coupling after Glow: the distribution function of a mixture of logistics, whose inverse is found by bisection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import ChannelBijection, initialize_network, sum_per_example
from nflows_lib.checks import check_at_least, check_shape
from nflows_lib.coupling import BoundedGlowCoupling
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.multiscale import FactorOut
from nflows_lib.networks import GlowNet, zeroed


class MixtureCoupling(ChannelBijection):
    r"""The coupling of Flow++ (Ho et al. 2019, section 3.2), with bounded log-scales and log-factors.

    :math:`F` is the distribution function of a mixture of K logistic distributions, and :math:`\sigma` the sigmoid:

    .. math::

        F(v) &= \sum_k \pi_k\, \sigma\big((v - m_k)\, e^{-s_k}\big) \\
        z_1 &= x_1 \\
        z_2 &= \operatorname{logit} F(x_2) \odot e^{a} + t

    The weights :math:`\pi`, the means :math:`m` and the log-scales :math:`s` of each component, the log-factor
    :math:`a` and the shift :math:`t` are functions of :math:`x_1`, for each entry that changes; the means add a learned
    offset. Log-scales and log-factors have the form :math:`g \tanh(\cdot)`, with one learned gain :math:`g`, which
    starts at 1. So the slope of forward is at most :math:`e^{2 |g|}`; that of the inverse has no such bound, because
    it grows with the distance between the means. The log-determinant is the sum of
    :math:`\log F'(x_2) - \log F(x_2) - \log(1 - F(x_2)) + a` over the entries that change.

    :math:`F` has no inverse in closed form. The quantile of a mixture lies between the least and the largest quantile
    of its components, :math:`m_k + e^{s_k} \operatorname{logit} p`, so the inverse halves this interval, 31 times
    in float32 and 60 times in float64. No gradient flows through the inverse.

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``, at least 2. The first
            ``C // 2`` are left unchanged.
        network: called as ``network(x1, context)``; maps ``C // 2`` channels to ``(2 + 3 K) (C - C // 2)``: first the
            log-factors and the shifts, then the weights before a softmax, the means and the log-scales of each
            component.
        components: number of logistic distributions K, at least 1.

    Raises:
        ValueError: if channels is below 2 or components below 1.
    """

    def __init__(self, channels: int, network: nn.Module, components: int) -> None:
        super().__init__(channels)
        check_at_least(2, ", one for each half", channels=channels)
        check_at_least(1, components=components)
        self.network, self.components = network, components
        self.gain = nn.Parameter(torch.ones(()))
        # Without different means to start from, a network of zeros would keep all components equal for ever.
        spread = torch.linspace(-1, 1, components)[:, None] if components > 1 else torch.zeros(1, 1)
        self.means = nn.Parameter(spread.repeat(1, channels - channels // 2))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2, log_factor, shift, mixture = self._parts("x", x, context)
        value, log_det = _logit_of_mixture(x2, *mixture)
        z = torch.cat([x1, value * log_factor.exp() + shift]).transpose(0, 1)
        return z, sum_per_example((log_det + log_factor).transpose(0, 1))

    @torch.no_grad()
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z1, z2, log_factor, shift, (log_weights, means, log_scales) = self._parts("z", z, context)
        value = (z2 - shift) * (-log_factor).exp()
        quantiles = means + log_scales.exp() * value  # of each component
        low, high = quantiles.amin(0), quantiles.amax(0)
        for _ in range(halvings(z.dtype)):
            middle = (low + high) / 2
            below = _logit_of_mixture(middle, log_weights, means, log_scales)[0] < value
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.cat([z1, (low + high) / 2]).transpose(0, 1)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        initialize_network(self.network, x[:, : self.channels // 2], context)

    def extra_repr(self) -> str:
        return f"components={self.components}"

    def _parts(
        self, name: str, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """The unchanged half, the other half, its log-factor and shift, and the mixture; name is what an error calls x.

        The channels come first, as in :class:`~nflows_lib.coupling.GlowCoupling`: (C/2, B, ...). The mixture's
        logarithms of the weights, means and log-scales are (K, C/2, B, ...).
        """
        self.check_channels(name, x)
        passes = self.channels // 2
        x1, x2 = x.transpose(0, 1).split([passes, self.channels - passes])
        output = self.network(x1.transpose(0, 1), context)
        check_shape("network's output", output, ((2 + 3 * self.components) * len(x2), *x.shape[2:]))
        raw, shift, *mixture = output.transpose(0, 1).split([len(x2)] * 2 + [self.components * len(x2)] * 3)
        weights, means, log_scales = (part.unflatten(0, (self.components, len(x2))) for part in mixture)
        means = means + self.means.view(*self.means.shape, *[1] * (x.dim() - 1))
        mixture = [weights.log_softmax(0), means, self.gain * log_scales.tanh()]
        return x1, x2, self.gain * raw.tanh(), shift, mixture


class TwoHeads(nn.Module):
    """The last layer of a mixture coupling's network, which starts at zero.

    A 3x3 convolution gives the log-factors and shifts, as in Glow. The many numbers of the mixture come from a 1x1
    convolution, which has a ninth of the weights.

    Args:
        hidden: channels that come in.
        changed: channels that the coupling changes.
        components: number of logistic distributions in the mixture.
    """

    def __init__(self, hidden: int, changed: int, components: int) -> None:
        super().__init__()
        self.affine = zeroed(nn.Conv2d(hidden, 2 * changed, 3, padding=1))
        self.mixture = zeroed(nn.Conv2d(hidden, 3 * components * changed, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Map hidden images ``(B, hidden, H, W)`` to ``(B, (2 + 3 components) changed, H, W)``."""
        return torch.cat([self.affine(h), self.mixture(h)], dim=1)


def halvings(dtype: torch.dtype) -> int:
    """The number of halvings that make an interval shorter than the type's relative precision, with 8 to spare.

    >>> halvings(torch.float32), halvings(torch.float64)
    (31, 60)
    """
    return 8 - int(math.log2(torch.finfo(dtype).eps))


def _logit_of_mixture(v: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """logit F(v) and the logarithm of its derivative, each in the shape of v. The sums stay in the logarithm, where no
    tail underflows."""
    u = (v - means) * (-log_scales).exp()
    log_below, log_above = F.logsigmoid(u), F.logsigmoid(-u)
    log_cdf = (log_weights + log_below).logsumexp(0)
    log_survival = (log_weights + log_above).logsumexp(0)
    log_density = (log_weights + log_below + log_above - log_scales).logsumexp(0)
    return log_cdf - log_survival, log_density - log_cdf - log_survival


def mixture_glow(
    shape: tuple[int, int, int],
    *,
    mixtures: int = 1,
    components: int = 4,
    hidden: int = 512,
    precision: torch.dtype = torch.float32,
    **size: Any,
) -> Flow:
    """Glow with bounded scale factors, in which the last couplings of each scale are :class:`MixtureCoupling`.

    At every scale but the last, the last coupling changes the half of the channels that is finished there. So one
    mixture per scale already lets a finished number have a density with several peaks and with heavier shoulders than a
    normal density of the same variance.

    Args:
        shape: ``(C, H, W)`` of one image of integers.
        mixtures: how many couplings of each scale are mixtures, from the last one on.
        components: number of logistic distributions in each mixture.
        hidden: channels inside the couplings' networks.
        precision: type that the couplings' networks compute in.
        size: the other arguments of :func:`nflows_lib.models.glow`.

    Raises:
        ValueError: if mixtures or components is below 1, or if ``glow`` raises it.
    """
    check_at_least(1, mixtures=mixtures, components=components)
    flow = glow(shape, hidden=hidden, bounded=True, precision=precision, **size)
    chain = flow.chain
    while chain:
        places = [i for i, layer in enumerate(chain) if isinstance(layer, BoundedGlowCoupling)]
        for i in places[-mixtures:]:
            channels = chain[i].channels
            network = GlowNet(channels // 2, channels, hidden, size.get("classes", 0), precision)
            network.layers[-1] = TwoHeads(hidden, channels - channels // 2, components)
            chain.layers[i] = MixtureCoupling(channels, network, components)
        chain = chain[-1].inner if isinstance(chain[-1], FactorOut) else None
    return flow
