"""NICE: the slope of the networks' activation, and training without dequantization."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from nflows_lib import data
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.models import nice
from nflows_lib.training import NonFiniteLoss, fit


def nice_activation(slope: float, seed: int) -> dict[str, Any]:
    """NICE on the digits, networks with LeakyReLU of this slope (0 is ReLU): bits/dim on the test digits."""
    torch.manual_seed(20 + seed)
    train, test = (data.digits(part).images.flatten(1) for part in ("train", "test"))
    flow = nice(64, levels=17, hidden=64, depth=2, activation=partial(nn.LeakyReLU, slope))
    fit(flow, train, 1200, batch_size=128, lr=5e-3, cosine=True)
    return {"bits_per_dim": -log_likelihoods(flow, test, draws=4).mean().item() / (64 * math.log(2))}


def no_dequantization(
    noise: bool, seed: int, steps: int = 90_000, every: int = 200, lr: float = 1e-3
) -> dict[str, Any]:
    """NICE on the digits, with noise or without: mean log p(u) of each block of steps, and how it ended."""
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
    "no-dequantization": Ablation(
        "F6: what becomes of NICE on integers without noise, nothing provoked?",
        (0,),
        {"left out": partial(no_dequantization, False), "put back": partial(no_dequantization, True)},
    ),
}
