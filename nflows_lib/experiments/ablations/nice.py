"""NICE: the networks' activation, how its log-scales start, and training without noise or with shared noise."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib import data
from nflows_lib.dequantization import UniformDequantize
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.experiments.runs import nice_optimizer
from nflows_lib.flow import Flow
from nflows_lib.models import nice
from nflows_lib.training import NonFiniteLoss, fit


def nice_activation(slope: float, seed: int) -> dict[str, Any]:
    """Bits/dim on the test digits of a NICE whose networks have a LeakyReLU of this slope; slope 0 is the ReLU."""
    torch.manual_seed(20 + seed)
    train, test = (data.digits(part).images.flatten(1) for part in ("train", "test"))
    flow = nice(64, levels=17, hidden=64, depth=2, activation=partial(nn.LeakyReLU, slope))
    fit(flow, train, 1200, batch_size=128, lr=5e-3, cosine=True)
    return {"bits_per_dim": -log_likelihoods(flow, test, draws=4).mean().item() / (64 * math.log(2))}


def nice_initialisation(random: bool, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """The loss of NICE on the digits, -log p(u) in nats: at the first step, and as means over 20 steps each.

    If ``random``, the log-scales start from N(0, 1), else at 0.
    """
    torch.manual_seed(40 + seed)
    flow = nice(64, levels=17, couplings=4, hidden=64, depth=2)
    if random:
        nn.init.normal_(flow.chain[-1].log_scale)
    images = data.digits("train").images.flatten(1)
    loss = torch.tensor(fit(flow, images, steps, batch_size=128, lr=lr).loss) - 64 * math.log(17)
    return {"first": loss[0].item(), "loss": [round(block.mean().item(), 2) for block in loss.split(20)]}


class SharedNoise(UniformDequantize):
    """Dequantization with one noise vector per batch or, if ``fixed``, one for the whole run (F8)."""

    def __init__(self, levels: int, dims: int, fixed: bool) -> None:
        super().__init__(levels)
        self.register_buffer("eps", torch.rand(1, dims) if fixed else None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        eps = torch.rand(1, x.shape[1], device=x.device) if self.eps is None else self.eps
        return x + eps, torch.zeros(len(x), device=x.device)


def nice_shared_noise(shared: str | None, seed: int, steps: int = 300) -> dict[str, Any]:
    """Train NICE on the digits, with noise that a "batch" or a "run" shares, or with new noise for every value (None).

    Returns:
        ``training``, bits/dim in training with that noise; and ``test``, bits/dim on the test digits with new noise
        for every value.
    """
    torch.manual_seed(60 + seed)
    train, test = (data.digits(part).images.flatten(1) for part in ("train", "test"))
    whole = nice(64, levels=17, hidden=64, depth=2)
    first = whole.chain[0] if shared is None else SharedNoise(17, 64, fixed=shared == "run")
    flow = Flow([first, *whole.chain[1:]], whole.base, (64,))
    optimizer = nice_optimizer(flow, lr=1e-2, weight_decay=0.0)
    optimizer.param_groups[1]["lr"] = 6e-2  # of the log-scales
    loss = torch.tensor(fit(flow, train, steps, optimizer=optimizer, batch_size=128, cosine=True).loss)
    honest = Flow([whole.chain[0], *flow.chain[1:]], flow.base, (64,))
    bits = 1 / (64 * math.log(2))
    return {
        "training": loss[-50:].mean().item() * bits,
        "test": -log_likelihoods(honest, test, draws=8).mean().item() * bits,
    }


def no_dequantization(
    noise: bool, seed: int, steps: int = 90_000, every: int = 200, lr: float = 1e-3
) -> dict[str, Any]:
    """Train NICE on the digits, with dequantization noise or without it.

    Returns:
        ``steps``, the number of finite losses; ``log_p``, the mean of log p(u) in nats over each ``every`` steps;
        ``broke_at`` and ``broke_with``, the step and the value of a loss that is not finite, or None.
    """
    torch.manual_seed(seed)
    images = data.digits("train").images.flatten(1)
    flow = nice(64, levels=17, couplings=2, hidden=64, depth=2)
    if not noise:
        flow, images = flow[1:], images.float()
    broke_at = broke_with = None
    try:
        loss = fit(flow, images, steps, batch_size=128, lr=lr).loss
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


ABLATIONS = {
    "nice-activation": Ablation(
        "Q1: ReLU or LeakyReLU in the networks of NICE?",
        (0, 1, 2),
        {"ReLU": partial(nice_activation, 0.0)}
        | {f"Leaky {slope}": partial(nice_activation, slope) for slope in (0.01, 0.2)},
    ),
    "nice-initialisation": Ablation(
        "F5: log-scales that start at random, compared with zeros, at two learning rates",
        tuple(range(8)),
        {
            f"{start}, rate {lr}": partial(nice_initialisation, start == "random", lr, steps)
            for lr, steps in ((0.01, 500), (0.002, 200))
            for start in ("zeros", "random")
        },
    ),
    "nice-shared-noise": Ablation(
        "F8: one noise vector for a batch, or for a whole run, compared with noise of each value's own",
        tuple(range(5)),
        {
            "fresh": partial(nice_shared_noise, None),
            "per batch": partial(nice_shared_noise, "batch"),
            "per run": partial(nice_shared_noise, "run"),
        },
    ),
    "no-dequantization": Ablation(
        "F6: what becomes of NICE on integers without noise, nothing provoked?",
        (0,),
        {"left out": partial(no_dequantization, False), "put back": partial(no_dequantization, True)},
    ),
}
