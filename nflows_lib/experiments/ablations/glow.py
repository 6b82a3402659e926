"""Glow: its first updates, what mixes the channels, how deep the flow is, and the grid in its samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib import data
from nflows_lib.bijection import Bijection
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import AffineCoupling, GlowCoupling, channel_mask, checkerboard_mask
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.networks import GlowNet
from nflows_lib.training import NonFiniteLoss, fit

MIXERS: dict[str, Callable[[int], Bijection]] = {
    "1x1, LU": Invertible1x1Conv,
    "1x1, plain": partial(Invertible1x1Conv, lu=False),
    "1x1, fixed": lambda channels: Invertible1x1Conv(channels, lu=False).requires_grad_(False),
    "shuffle": lambda channels: ChannelPermutation(torch.randperm(channels)),
    "reversal": lambda channels: ChannelPermutation(torch.arange(channels).flip(0)),
    "nothing": lambda channels: ChannelPermutation(torch.arange(channels)),
}


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Replace every layer of exactly that kind, at any depth of the module, by make(layer)."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def grid_texture(images: Tensor) -> float:
    """The ratio of the mean step between neighbours across borders of 2x2 squares to that inside them; 1 is no grid."""
    values = images.double()
    across, inside = [], []
    for steps in (values.diff(dim=3).abs(), values.diff(dim=2).abs().transpose(2, 3)):
        inside.append(steps[..., 0::2].mean())
        across.append(steps[..., 1::2].mean())
    return (sum(across) / sum(inside)).item()


def flow_of_patches(mixer: str, bounded: bool, steps_per_scale: int, hidden: int) -> Flow:
    """Glow with two scales for 16x16 colour patches, with one of MIXERS instead of the 1x1 convolutions."""
    flow = glow((3, 16, 16), scales=2, steps=steps_per_scale, hidden=hidden, bounded=bounded)
    replace(flow, Invertible1x1Conv, lambda layer: MIXERS[mixer](layer.channels))
    return flow


@torch.no_grad()
def finite_samples(flow: Flow, n: int = 500, temperature: float = 1.0) -> Tensor:
    """Those of n samples that are finite, rounded to the flow's levels."""
    drawn = flow[1:].decode(temperature * torch.randn(n, flow.dims))  # pixels before they are rounded to levels
    return drawn[drawn.flatten(1).isfinite().all(1)].floor().clamp(0, flow.levels - 1)


def grid_of_samples(flow: Flow, n: int = 500) -> tuple[float, float]:
    """The :func:`grid_texture` of the finite ones among n samples, and the share of samples that are not finite."""
    samples = finite_samples(flow, n)
    return grid_texture(samples), 1 - len(samples) / n


def score_of(flow: Flow, images: Tensor, draws: int = 1) -> float:
    """The mean bits/dim of the images, with log p averaged over draws of the noise."""
    return -log_likelihoods(flow, images, draws=draws).mean().item() / (flow.dims * math.log(2))


def glow_patches(
    seed: int,
    *,
    mixer: str = "1x1, LU",
    bounded: bool = False,
    steps_per_scale: int = 4,
    hidden: int = 32,
    steps: int = 400,
) -> dict[str, Any]:
    """Train a Glow with two scales on 16x16 colour patches, for some hundred steps of 64 patches.

    Args:
        seed: seed of the run.
        mixer: the layer that mixes the channels, a key of MIXERS.
        bounded: whether the couplings are :class:`~nflows_lib.coupling.BoundedGlowCoupling`.
        steps_per_scale: steps of the flow at each scale.
        hidden: channels of the couplings' networks.
        steps: number of updates.

    Returns:
        ``test``, bits/dim on the test patches; ``grid`` and ``broken``, the two results of :func:`grid_of_samples`; and
        ``parameters``, the number of those that are trained.
    """
    torch.manual_seed(40 + seed)
    train, test = (data.patches(part).images for part in ("train", "test"))
    flow = flow_of_patches(mixer, bounded, steps_per_scale, hidden)
    fit(flow, train, steps, batch_size=64, lr=3e-3, clip=100.0, warmup=min(10, steps), cosine=True)
    grid, broken = grid_of_samples(flow)
    return {
        "test": score_of(flow, test),
        "grid": grid,
        "broken": broken,
        "parameters": sum(parameter.numel() for parameter in flow.parameters() if parameter.requires_grad),
    }


def masked(flow: Flow, mask: Callable[[tuple[int, int, int], int], Tensor], hidden: int) -> None:
    """Replace the couplings of a Glow for 16x16 patches by affine couplings with alternating masks."""
    parity = 0

    def coupling(layer: GlowCoupling) -> AffineCoupling:
        nonlocal parity
        parity, size = 1 - parity, 8 if layer.channels == 12 else 4
        network = GlowNet(layer.channels, 2 * layer.channels, hidden)
        return AffineCoupling(mask((layer.channels, size, size), parity), network)

    replace(flow, GlowCoupling, coupling)


def first_updates(
    seed: int,
    *,
    noise: bool = False,
    zeros: bool = True,
    exponential: bool = False,
    mask: Callable[[tuple[int, int, int], int], Tensor] | None = None,
    hidden: int = 32,
    steps: int = 40,
) -> dict[str, Any]:
    """Train a Glow with two scales of four steps on 16x16 colour patches, for some dozen updates of 32 patches.

    Args:
        seed: seed of the run.
        noise: whether the first batch, which sets the ActNorms, is noise instead of photographs.
        zeros: whether the networks' last convolutions start at zero; if not, their weights start from N(0, 0.05^2).
        exponential: whether the couplings multiply by exp(h) instead of sigmoid(h + 2).
        mask: a function of shape and parity that gives the masks of affine couplings, which replace Glow's couplings;
            Glow's own couplings if None.
        hidden: channels of the couplings' networks.
        steps: number of updates.

    Returns:
        ``start`` and ``test``, bits/dim on the test patches before and after the updates, or infinity if the result is
        not finite; ``updates``, the number of losses, of which the last one is not finite if the training broke.
    """
    torch.manual_seed(40 + seed)
    train, test = (data.patches(part).images for part in ("train", "test"))
    flow = glow((3, 16, 16), scales=2, steps=4, hidden=hidden)
    for module in flow.modules():
        if isinstance(module, GlowNet) and not zeros:
            nn.init.normal_(module.layers[-1].weight, std=0.05)
        if isinstance(module, GlowCoupling) and exponential:
            module.scale = torch.exp
    if mask is not None:
        masked(flow, mask, hidden)
    photographs = train[torch.randperm(len(train))[:64]]
    flow.initialize(torch.randint_like(photographs, 256) if noise else photographs)

    def score() -> float:
        value = score_of(flow, test)
        return value if math.isfinite(value) else math.inf

    start = score()
    try:
        history = fit(flow, train, steps, batch_size=32, lr=3e-3, clip=100.0, cosine=True)
    except NonFiniteLoss as error:
        return {"start": start, "test": math.inf, "updates": len(error.history.loss)}
    return {"start": start, "test": score(), "updates": len(history.loss)}


ABLATIONS = {
    "glow-first-updates": Ablation(
        "F20, F21, F23: what do a first batch of noise, a network without zeros at its end and other masks cost?",
        (0, 1, 2),
        {
            "as it is": first_updates,
            "from noise": partial(first_updates, noise=True),
            "no zeros": partial(first_updates, zeros=False),
            "exp(h)": partial(first_updates, exponential=True),
            "exp(h), no zeros": partial(first_updates, exponential=True, zeros=False),
            "checkerboard": partial(first_updates, mask=checkerboard_mask),
            "channel mask": partial(first_updates, mask=channel_mask),
        },
    ),
    "glow-mixing": Ablation(
        "F22: what should stand between Glow's couplings: "
        "a learned or a fixed 1x1 convolution, a shuffle, a reversal, nothing?",
        (0, 1, 2),
        {mixer: partial(glow_patches, mixer=mixer, steps=150) for mixer in MIXERS},
    ),
    "glow-depth": Ablation(
        "Q5: does depth cure the grid in Glow's samples? And what do a wide and a bounded coupling do?",
        (0, 1, 2),
        {str(n): partial(glow_patches, steps_per_scale=n) for n in (1, 2, 4, 8)}
        | {f"{n}, 1600 updates": partial(glow_patches, steps_per_scale=n, steps=1600) for n in (1, 4)}
        | {"2, wide": partial(glow_patches, steps_per_scale=2, hidden=104)}
        | {"8, bounded": partial(glow_patches, steps_per_scale=8, bounded=True)},
    ),
}
