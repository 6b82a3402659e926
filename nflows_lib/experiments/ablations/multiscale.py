"""RealNVP at several scales, on 16x16 colour patches: the squeeze, and the number of scales."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nflows_lib import data
from nflows_lib.bijection import Layer
from nflows_lib.coupling import AffineCoupling, channel_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.flow import Flow
from nflows_lib.models import realnvp
from nflows_lib.multiscale import Squeeze
from nflows_lib.networks import ResNet
from nflows_lib.normalization import FlowBatchNorm
from nflows_lib.training import fit


class _BareReshape(Squeeze):
    """A plain reshape instead of a squeeze (F17): it is invertible, but puts distant pixels into one position."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.reshape(len(x), *self.output_shape(tuple(x.shape[1:]))), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        batch, channels, height, width = z.shape
        return z.reshape(batch, channels // 4, 2 * height, 2 * width)


def _trained(flow: Flow, steps: int) -> dict[str, Any]:
    """Bits/dim on the test patches after so many steps of 64 training patches, and the number of parameters."""
    train, test = (data.patches(part).images for part in ("train", "test"))
    fit(flow, train, steps, batch_size=64, lr=3e-3, clip=100.0, cosine=True)
    return {
        "test": -log_likelihoods(flow, test).mean().item() / (flow.dims * math.log(2)),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }


def one_squeeze(seed: int, *, squeeze: type[Squeeze] = Squeeze, steps: int = 120) -> dict[str, Any]:
    """The results of :func:`_trained` with one squeeze, then four affine couplings between halves of the channels."""
    torch.manual_seed(50 + seed)
    layers: list[Layer] = [UniformDequantize(256), Rescale(1 / 256), Logit(0.05), squeeze()]
    for i in range(4):
        layers.append(AffineCoupling(channel_mask((12, 8, 8), i % 2), ResNet(12, 24, hidden=24, blocks=1)))
        layers.append(FlowBatchNorm(12))
    return _trained(Flow(layers, StandardNormal(), (3, 16, 16)), steps)


def several_scales(seed: int, *, scales: int, couplings: int, steps: int = 100) -> dict[str, Any]:
    """The results of :func:`_trained` with ``realnvp()``, which has ``couplings`` couplings at the last scale."""
    torch.manual_seed(50 + seed)
    return _trained(realnvp((3, 16, 16), scales=scales, couplings=couplings, hidden=16, blocks=1), steps)


ABLATIONS = {
    "multiscale-squeeze": Ablation(
        "F17: what does a squeeze by reshape cost?",
        (0, 1, 2),
        {"bare reshape": partial(one_squeeze, squeeze=_BareReshape), "squeeze": one_squeeze},
    ),
    "multiscale-scales": Ablation(
        "How much better are two scales than one, and three than two, after as many patches?",
        (0, 1, 2),
        {str(n): partial(several_scales, scales=n, couplings=last) for n, last in ((1, 8), (2, 2), (3, 2))},
    ),
}
