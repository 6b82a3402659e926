"""Conditional Glow on halves of digits: which layers need the context, and what independent pixels do instead."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib import data
from nflows_lib.conditional import ConditionalNet, ConditioningNetwork
from nflows_lib.data import Images
from nflows_lib.evaluation import log_likelihoods, log_mean_exp
from nflows_lib.experiments import segmentation
from nflows_lib.experiments.ablations.experiment import Ablation
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow
from nflows_lib.models import cglow
from nflows_lib.training import fit


def dead(flow: Flow, *kinds: str) -> Flow:
    """The flow with conditioning networks all at zero, so that they never learn: "ActNorm and W" or "couplings"."""
    for module in flow.modules():
        silent: list[nn.Module] = []
        if isinstance(module, ConditioningNetwork) and "ActNorm and W" in kinds:
            silent.append(module)
        if isinstance(module, ConditionalNet) and "couplings" in kinds:
            silent.append(module.features)
        for parameter in (parameter for network in silent for parameter in network.parameters()):
            nn.init.zeros_(parameter)
    return flow


def contexts_of(images: Images, label: bool) -> Tensor:
    """Upper halves, (N, 1, 4, 8); with ten more channels for the class where the label is told."""
    if not label:
        return images.contexts
    planes = F.one_hot(images.labels, 10).float()[:, :, None, None].expand(-1, -1, 4, 8)
    return torch.cat([images.contexts, planes], dim=1)


def neighbours(lower: Tensor, mean: Tensor) -> float:
    """Correlation of horizontal neighbours in lower halves, (N, 1, 4, 8), after a model's mean is taken off."""
    rest = lower - mean
    return torch.corrcoef(torch.stack([rest[..., :-1].flatten(), rest[..., 1:].flatten()]))[0, 1].item()


def perceptron() -> nn.Module:
    """From upper halves to logits of lower halves, about as many parameters as the flow of :func:`halves` has."""
    hidden = [nn.Linear(32, 296), nn.ReLU(), nn.Linear(296, 296), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(296, 17 * 32), nn.Unflatten(1, (17, 4, 8)))


def halves(
    seed: int,
    *,
    without: tuple[str, ...] = (),
    label: bool = False,
    independent: bool = False,
    steps: int = 300,
    draws: int = 100,
) -> dict[str, Any]:
    """A model of lower halves of digits given the upper ones, trained for some hundred steps of 128.

    Args:
        without: which conditioning networks are all zero, as of :func:`dead`.
        label: whether the model is told the class as well.
        independent: whether it is, instead of the flow, a network with a softmax at each pixel.
        draws: draws for each test context, and of the noise in the closer bound.

    Returns:
        On the test halves: ``test`` and ``test_closer``, bits/dim, ten draws of the noise averaged and all ``draws`` in
        one bound; ``margin``, nats for the own upper half over another's; ``rms``, {k: error of the average of k
        draws, in levels}; ``neighbours`` of a draw and of the truth; ``ink_ratio``, error over spread of a half's sum,
        and ``ink_covered``, of :func:`~nflows_lib.experiments.segmentation.covered`; ``parameters``.
    """
    torch.manual_seed(60 + seed)
    train, test = (data.digit_halves(part) for part in ("train", "test"))
    told, x = contexts_of(train, label), contexts_of(test, label)
    model: Flow | PixelClassifier
    if independent:
        model = PixelClassifier(perceptron(), (1, 4, 8), 17)
    else:
        size = {"levels": 17, "scales": 1, "steps": 3, "hidden": 48, "conditioning": 48}
        model = dead(cglow((1, 4, 8), tuple(x.shape[1:]), **size), *without)
    fit(model, train.images, steps, context=told, batch_size=128, lr=5e-3, clip=50.0, warmup=30, cosine=True, ema=0.98)
    bits, truth = 1 / (model.dims * math.log(2)), test.images.float()
    own = log_likelihoods(model, test.images, x, draws=10)
    others = log_likelihoods(model, test.images, x[torch.randperm(len(x))], draws=10)
    with torch.no_grad():
        closer = log_mean_exp(torch.stack([model(test.images, x) for _ in range(draws)]))
    drawn = segmentation.draws(model, x, draws)
    mean, ink = drawn.mean(0), drawn.flatten(2).sum(2)
    missed = ink.mean(0) - truth.flatten(1).sum(1)
    return {
        "test": -own.mean().item() * bits,
        "test_closer": -closer.mean().item() * bits,
        "margin": (own - others).mean().item(),
        "rms": {str(k): (drawn[:k].mean(0) - truth).square().mean().sqrt().item() for k in (1, 10, draws)},
        "neighbours": neighbours(drawn[0], mean),
        "neighbours_truth": neighbours(truth, mean),
        "ink_ratio": (missed.square().mean().sqrt() / ink.std(0).mean()).item(),
        "ink_covered": segmentation.covered(drawn, truth),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


ABLATIONS = {
    "cglow-conditioning": Ablation(
        "Which layers of conditional Glow need the context, and what do as many parameters do with independent pixels?",
        (0, 1, 2),
        {
            "all three": halves,
            "couplings only": partial(halves, without=("ActNorm and W",)),
            "ActNorm and W only": partial(halves, without=("couplings",)),
            "none": partial(halves, without=("ActNorm and W", "couplings")),
            "all three, and the label": partial(halves, label=True),
            "independent pixels": partial(halves, independent=True),
        },
    ),
}
