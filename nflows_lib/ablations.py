"""Open questions put to the test: each is a few arms, run with several seeds, and a file with what came out.

``make ablations`` runs them all and stores ``data/ablations/<name>.json``; the chapters plot the files.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nflows_lib import data, runs
from nflows_lib.bijection import Bijection, Chain, Layer
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import AffineCoupling, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import glow, nice
from nflows_lib.networks import ResNet
from nflows_lib.normalization import FlowBatchNorm
from nflows_lib.training import NonFiniteLoss, fit, log_likelihoods, log_mean_exp


@dataclass(frozen=True)
class Ablation:
    """A question, and the arms that answer it: each takes a seed and returns its measures."""

    question: str
    seeds: tuple[int, ...]
    arms: dict[str, Callable[[int], dict[str, Any]]]


def nice_activation(slope: float, seed: int) -> dict[str, Any]:
    """NICE on the digits, networks with LeakyReLU of this slope (0 is ReLU): bits/dim on the test digits."""
    torch.manual_seed(20 + seed)
    train, test = (data.digits(part).images.flatten(1) for part in ("train", "test"))
    flow = nice(64, levels=17, hidden=64, depth=2, activation=partial(nn.LeakyReLU, slope))
    fit(flow, train, 1200, batch_size=128, lr=5e-3, cosine=True)
    return {"bits_per_dim": -log_likelihoods(flow, test, draws=4).mean().item() / (64 * math.log(2))}


def no_dequantization(noise: bool, seed: int, steps: int = 90_000, every: int = 200) -> dict[str, Any]:
    """NICE on the digits, Adam at 1e-3, with noise or without: mean log p(u) over every so many steps, and the end."""
    torch.manual_seed(seed)
    images = data.digits("train").images.flatten(1)
    flow = nice(64, levels=17, couplings=2, hidden=64, depth=2)
    if not noise:
        flow, images = Flow([*flow.chain][1:], flow.base, (64,)), images.float()
    broke_at = broke_with = None
    try:
        loss = fit(flow, images, steps, batch_size=128, lr=1e-3).loss
    except NonFiniteLoss as error:
        *loss, last = error.history.loss
        broke_at, broke_with = len(loss) + 1, str(last)
    blocks = torch.tensor(loss).split(every)
    return {
        "steps": len(loss),
        "log_p": [round(64 * math.log(17) - block.mean().item(), 2) for block in blocks],
        "broke_at": broke_at,
        "broke_with": broke_with,
    }


class PlainResNet(nn.Module):
    """The residual network that the course's source tried first, and each step from it to the reference's.

    Residual blocks of batch norm, ReLU and 3x3 convolutions, one after the other. The reference differs in:

    signs: the input enters as [h, -h] through a ReLU.
    skips: the output reads a sum over the first layer and all blocks, each through a 1x1 convolution.
    weight_norm: of every convolution.
    convolutions: in a block, two instead of three.
    batch_norm: the reference has it, too; ours has not.
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
    """The network as it is, with ordinary weights."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return network


def resnet(weight_norm: bool = True) -> nn.Module:
    """What stands in the couplings of :func:`realnvp_digits` where a question is not about it."""
    network = ResNet(1, 2, hidden=32, blocks=1)
    return network if weight_norm else without_weight_norm(network)


def noise_layers() -> list[Layer]:
    """The flow of a learned dequantization of the digits: two couplings given the digit."""
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
    """RealNVP with four couplings on the digits, for some hundred steps of 64 images.

    Args:
        network: builds what stands inside each coupling.
        batch_norm: whether a flow batch norm follows each coupling.
        variational: whether the dequantization noise is learned.
        beta2: Adam's memory of squared gradients.
        draws: of the noise, in the evaluation.

    Returns:
        in bits/dim ``test`` (mean bound), ``log_mean_exp`` (of the draws), ``training`` (means over 10 steps each);
        ``gradient``, the largest norm within each 10 steps, in nats.
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


MIXERS: dict[str, Callable[[int], Bijection]] = {
    "1x1, LU": Invertible1x1Conv,
    "1x1, plain": partial(Invertible1x1Conv, lu=False),
    "shuffle": lambda channels: ChannelPermutation(torch.randperm(channels)),
    "reversal": lambda channels: ChannelPermutation(torch.arange(channels).flip(0)),
    "nothing": lambda channels: ChannelPermutation(torch.arange(channels)),
}


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Put make(layer) in the place of every layer of that kind, at whatever depth."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def grid_texture(images: Tensor) -> float:
    """How much larger steps between neighbours are across the borders of 2x2 squares than inside them: 1 is no grid."""
    values = images.double()
    across, inside = [], []
    for steps in (values.diff(dim=3).abs(), values.diff(dim=2).abs().transpose(2, 3)):
        inside.append(steps[..., 0::2].mean())
        across.append(steps[..., 1::2].mean())
    return (sum(across) / sum(inside)).item()


def glow_patches(
    seed: int,
    *,
    mixer: str = "1x1, LU",
    bounded: bool = False,
    steps_per_scale: int = 4,
    hidden: int = 32,
    steps: int = 400,
) -> dict[str, Any]:
    """Glow with two scales on 16x16 colour patches, for some hundred steps of 64.

    Args:
        mixer: what stands in the place of the 1x1 convolutions, one of MIXERS.
        bounded: whether the couplings are :class:`~nflows_lib.coupling.BoundedGlowCoupling`.

    Returns:
        ``test``: bits/dim on the test patches; ``grid``: the :func:`grid_texture` of 500 samples, ``broken``: the share
        of them that was not finite, which it leaves out; ``parameters``.
    """
    torch.manual_seed(40 + seed)
    train, test = (data.patches(part).images for part in ("train", "test"))
    flow = glow((3, 16, 16), scales=2, steps=steps_per_scale, hidden=hidden, bounded=bounded)
    replace(flow, Invertible1x1Conv, lambda layer: MIXERS[mixer](layer.channels))
    fit(flow, train, steps, batch_size=64, lr=3e-3, clip=100.0, warmup=min(10, steps), cosine=True)
    inner = Chain([*flow.chain][1:])  # what it makes of a latent before that is rounded to a level
    with torch.no_grad():
        drawn = inner.inverse(torch.randn(500, flow.dims))
    finite = drawn.flatten(1).isfinite().all(1)
    return {
        "test": -log_likelihoods(flow, test).mean().item() / (flow.dims * math.log(2)),
        "grid": grid_texture(drawn[finite].floor().clamp(0, 255)),
        "broken": 1 - finite.float().mean().item(),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }


# What the reference's network differs in from the one that the course's source tried first (chapter 3, Q4).
REFERENCE_STEPS = {
    "weight norm": {"weight_norm": True},
    "[h, -h] and a ReLU": {"signs": True},
    "skips to the output": {"skips": True},
    "2 convolutions a block": {"convolutions": 2},
}


def plain_resnet(**steps: Any) -> Callable[[int], dict[str, Any]]:
    return partial(realnvp_digits, network=partial(PlainResNet, 16, 8, **steps), steps=80, draws=4)


ABLATIONS: dict[str, Ablation] = {
    "nice-activation": Ablation(
        "Q1: ReLU or LeakyReLU in the networks of NICE?",
        (0, 1, 2),
        {"ReLU": partial(nice_activation, 0.0)}
        | {f"Leaky {slope}": partial(nice_activation, slope) for slope in (0.01, 0.2)},
    ),
    "no-dequantization": Ablation(
        "F6: what becomes of NICE on integers without noise, nothing provoked?",
        (0,),
        {"left out": partial(no_dequantization, False), "put back": partial(no_dequantization, True)},
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
    "glow-mixing": Ablation(
        "F22: what should stand between Glow's couplings: a learned 1x1 convolution, a shuffle, a reversal, nothing?",
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
    "realnvp-dequantization": Ablation(
        "What does learned dequantization noise gain?",
        (0, 1, 2),
        {
            name: partial(realnvp_digits, variational=name == "learned", alpha=1e-5, steps=500, cosine=True)
            for name in ("uniform", "learned")
        },
    ),
}


def path(name: str) -> Path:
    """Where the results of an ablation are stored."""
    return runs.ROOT / "data" / "ablations" / f"{name}.json"


def run(name: str) -> None:
    """Run every arm with every seed, and store what came out."""
    ablation = find(name)
    start = time.perf_counter()
    results = {arm: [measure(seed) for seed in ablation.seeds] for arm, measure in ablation.arms.items()}
    record = {
        "ablation": name,
        "question": ablation.question,
        "command": f"python -m nflows_lib.ablations {name}",
        **runs.origin(),
        "seeds": list(ablation.seeds),
        "minutes": (time.perf_counter() - start) / 60,
        "results": results,
    }
    runs.write_json(path(name), record)


def load(name: str) -> dict[str, Any]:
    """The stored record of an ablation.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: it has not been run.
    """
    find(name)
    return json.loads(path(name).read_text())


def find(name: str) -> Ablation:
    """The ablation of that name; a ValueError lists the names there are."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {name!r}")
    return ABLATIONS[name]


def mean_and_spread(record: dict[str, Any], measure: str) -> dict[str, tuple[float, float]]:
    """{arm: (mean, standard deviation over seeds)} of one measure."""
    columns = {arm: [result[measure] for result in results] for arm, results in record["results"].items()}
    return {arm: (statistics.mean(values), statistics.stdev(values)) for arm, values in columns.items()}


if __name__ == "__main__":
    for name in sys.argv[1:] or ABLATIONS:
        print(f"{name}: {find(name).question}", flush=True)
        run(name)
