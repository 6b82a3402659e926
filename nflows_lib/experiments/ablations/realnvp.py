"""RealNVP: tanh, moons, clipping, the logit's alpha, weight normalization, the residual network, and learned noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nflows_lib import data
from nflows_lib.bijection import Layer
from nflows_lib.coupling import AffineCoupling, alternating_mask, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.evaluation import log_likelihoods, log_mean_exp
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.flow import Flow
from nflows_lib.models import realnvp_points
from nflows_lib.networks import MLP, ResNet
from nflows_lib.normalization import FlowBatchNorm
from nflows_lib.training import fit


class _Unbounded(AffineCoupling):
    """The affine coupling without the tanh around its log-scale."""

    def _log_scale_and_shift(self, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self._network_output(x1, context, outputs=2)
        return raw, shift


def sine_samples(seed: int, *, coupling: type[AffineCoupling], steps: int = 300, draws: int = 20_000) -> dict[str, Any]:
    """Train four couplings on a thin sine curve, and draw samples at temperature 2.

    The networks start as PyTorch initialises them, not with last layers at zero.

    Returns:
        ``loss``, the mean of the last 50 losses in nats; ``lost``, the number of samples that are not finite; and
        ``largest``, the largest coordinate of the finite samples.
    """
    torch.manual_seed(60 + seed)
    x = torch.randn(10_000, 1)
    layers = []
    for i in range(4):
        network = MLP(1, 2, hidden=64, depth=2)
        network.layers[-1].reset_parameters()
        layers.append(coupling(alternating_mask(2, i % 2), network))
    flow = Flow(layers, StandardNormal(), (2,))
    points = torch.cat([x, x.sin() + 0.01 * torch.randn(10_000, 1)], dim=1)
    loss = torch.tensor(fit(flow, points, steps, lr=4e-3, clip=1.0).loss)
    drawn = flow.sample(draws, temperature=2.0)
    finite = drawn.isfinite().all(1)
    return {
        "loss": loss[-50:].mean().item(),
        "lost": (~finite).sum().item(),
        "largest": drawn[finite].abs().max().item(),
    }


def moons_gap(seed: int, *, steps: int) -> dict[str, Any]:
    """Train six couplings on moons; ``gap`` is how many nats the flow is worse than the exact density on new points."""
    torch.manual_seed(70 + seed)
    flow = realnvp_points(2, couplings=6, hidden=64)
    fit(flow, data.toy("moons", 20_000), steps, lr=5e-3, clip=5.0, cosine=True, ema=0.95)
    points = data.toy("moons", 10_000)
    return {"gap": (data.moons().log_prob(points) - log_likelihoods(flow, points)).mean().item()}


class PlainResNet(nn.Module):
    """The residual network that the notes tried first, with options for each step from it to the reference code's.

    The notes' network has residual blocks of batch norm, ReLU and 3x3 convolutions, one after the other. The options:

    signs: whether the input enters as [h, -h] through a ReLU, as in the reference code.
    skips: whether the output reads a sum over the first layer and all blocks, each through a 1x1 convolution, as in the
        reference code.
    weight_norm: whether every convolution has weight normalization, as in the reference code.
    convolutions: the number of convolutions per block, 3 in the notes and 2 in the reference code.
    batch_norm: whether the blocks have batch norm, as the notes and the reference code have, and our ResNet has not.
    """

    def __init__(
        self,
        hidden: int,
        blocks: int,
        *,
        signs: bool = False,
        skips: bool = False,
        weight_norm: bool = False,
        convolutions: int = 3,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        normalised = parametrizations.weight_norm if weight_norm else nn.Identity()

        def conv(inputs: int, outputs: int, size: int) -> nn.Module:
            return normalised(nn.Conv2d(inputs, outputs, size, padding=size // 2))

        def before() -> list[nn.Module]:
            return [nn.BatchNorm2d(hidden), nn.ReLU()] if batch_norm else [nn.ReLU()]

        def block() -> nn.Module:
            last = [conv(hidden, hidden, 3) for _ in range(convolutions - 2)]
            return nn.Sequential(*before(), conv(hidden, hidden, 3), *before(), conv(hidden, hidden, 3), *last)

        self.signs = signs
        self.first = conv(1 + signs, hidden, 3)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.skips = nn.ModuleList(conv(hidden, hidden, 1) for _ in range(blocks + 1) if skips)
        self.last = conv(hidden, 2, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([x, -x], 1).relu() if self.signs else x)
        on_the_way = [h]
        for block in self.blocks:
            h = h + block(h)
            on_the_way.append(h)
        if self.skips:
            h = sum(skip(value) for skip, value in zip(self.skips, on_the_way, strict=True))
        return self.last(h.relu())


def without_weight_norm(network: nn.Module) -> nn.Module:
    """The network with ordinary weights instead of normalised ones; the function stays the same."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return network


def resnet(weight_norm: bool = True) -> nn.Module:
    """The default network of the couplings in :func:`realnvp_digits`."""
    network = ResNet(1, 2, hidden=32, blocks=1)
    return network if weight_norm else without_weight_norm(network)


def noise_layers() -> list[Layer]:
    """The couplings of a learned dequantization of the digits: two couplings with the digit as their context."""
    masks = (checkerboard_mask((1, 8, 8), parity) for parity in (0, 1))
    return [AffineCoupling(mask, ResNet(1, 2, hidden=16, blocks=1, context=1)) for mask in masks]


def realnvp_digits(
    seed: int,
    *,
    network: Callable[[], nn.Module] = resnet,
    alpha: float = 0.05,
    batch_norm: bool = True,
    variational: bool = False,
    steps: int = 250,
    lr: float = 3e-3,
    clip: float | None = 100.0,
    beta2: float = 0.999,
    cosine: bool = False,
    draws: int = 32,
) -> dict[str, Any]:
    """Train a RealNVP with four couplings on the digits, for some hundred steps of 64 images.

    Args:
        seed: seed of the run.
        network: a function that builds the network of one coupling.
        alpha: the logit's margin.
        batch_norm: whether a flow batch norm follows each coupling.
        variational: whether the dequantization noise is learned.
        steps: number of updates.
        lr: learning rate.
        clip: the largest norm of a gradient; without clipping if None.
        beta2: the decay of Adam's running mean of squared gradients.
        cosine: whether the learning rate falls to 0 along a cosine.
        draws: number of draws of the noise in the evaluation.

    Returns:
        ``test``, bits/dim on the test digits with log p averaged over the draws; ``log_mean_exp``, bits/dim by the
        importance-weighted bound of the same draws; ``training``, means of bits/dim over 10 steps each; ``gradient``,
        the largest norm of the gradient, in nats, within each 10 steps.
    """
    torch.manual_seed(30 + seed)
    train, test = (data.digits(part).images for part in ("train", "test"))
    noise = VariationalDequantize(noise_layers(), 17) if variational else UniformDequantize(17)
    layers: list[Layer] = [noise, Rescale(1 / 17), Logit(alpha)]
    for i in range(4):
        layers.append(AffineCoupling(checkerboard_mask((1, 8, 8), i % 2), network()))
        layers += [FlowBatchNorm(1)] if batch_norm else []
    flow = Flow(layers, StandardNormal(), (1, 8, 8))
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
    history = fit(flow, train, steps, batch_size=64, optimizer=optimizer, clip=clip, cosine=cosine)
    with torch.no_grad():
        log_p = torch.stack([flow(test) for _ in range(draws)])
    bits = 1 / (64 * math.log(2))
    return {
        "test": -log_p.mean().item() * bits,
        "log_mean_exp": -log_mean_exp(log_p).mean().item() * bits,
        "training": [round(block.mean().item() * bits, 4) for block in torch.tensor(history.loss).split(10)],
        "gradient": [round(block.max().item(), 1) for block in torch.tensor(history.grad_norm).split(10)],
    }


# The differences between the reference code's network and the one that the notes tried first (Q4).
REFERENCE_STEPS = {
    "weight norm": {"weight_norm": True},
    "[h, -h] and a ReLU": {"signs": True},
    "skips to the output": {"skips": True},
    "2 convolutions a block": {"convolutions": 2},
}


def plain_resnet(**steps: Any) -> Callable[[int], dict[str, Any]]:
    """A variant of Q4: :func:`realnvp_digits` with a :class:`PlainResNet` that has these options."""
    return partial(realnvp_digits, network=partial(PlainResNet, 16, 8, **steps), steps=80, draws=4)


ABLATIONS = {
    "realnvp-tanh": Ablation(
        "F12: how far do samples fly without the tanh around the log-scale?",
        (0, 1, 2),
        {
            "no tanh": partial(sine_samples, coupling=_Unbounded),
            "gain * tanh": partial(sine_samples, coupling=AffineCoupling),
        },
    ),
    "realnvp-moons": Ablation(
        "How close does a small RealNVP come to the exact density of the moons, after how many steps?",
        (0, 1, 2),
        {f"{steps:,} steps": partial(moons_gap, steps=steps) for steps in (500, 2000)},
    ),
    "realnvp-clipping": Ablation(
        "F11: what does clipping the gradient do for RealNVP, with and without a flow batch norm?",
        (0, 1, 2),
        {
            f"{norm}, {label}": partial(realnvp_digits, alpha=1e-5, batch_norm=norm == "batch norm", lr=1e-3, **options)
            for norm in ("no batch norm", "batch norm")
            for label, options in (
                ("not clipped", {"clip": None}),
                ("clipped at 1", {"clip": 1.0}),
                ("short memory", {"clip": None, "beta2": 0.9}),
            )
        },
    ),
    "realnvp-alpha": Ablation(
        "Q2: which alpha in the logit, .05 or 1e-5?",
        (0, 1, 2),
        {str(alpha): partial(realnvp_digits, alpha=alpha) for alpha in (0.05, 0.01, 1e-5)},
    ),
    "realnvp-weight-norm": Ablation(
        "Q3: does weight norm help?",
        (0, 1, 2),
        {
            f"{label}, rate {lr}": partial(realnvp_digits, network=partial(resnet, label == "with"), lr=lr)
            for lr in (0.003, 0.01)
            for label in ("with", "without")
        },
    ),
    "realnvp-resnet": Ablation(
        "Q4: which difference to the reference's network made the source's first ResNet fail?",
        (0, 1, 2),
        {"the source's first": plain_resnet()}
        | {f"+ {name}": plain_resnet(**step) for name, step in REFERENCE_STEPS.items()}
        | {"the reference's": plain_resnet(**{k: v for step in REFERENCE_STEPS.values() for k, v in step.items()})}
        | {"- batch norm inside": plain_resnet(batch_norm=False)},
    ),
    "realnvp-dequantization": Ablation(
        "What does learned dequantization noise gain?",
        (0, 1, 2),
        {
            name: partial(realnvp_digits, variational=name == "learned", alpha=1e-5, steps=500, cosine=True)
            for name in ("uniform", "learned")
        },
    ),
}
