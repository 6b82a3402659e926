"""Conditional Glow on halves of digits: which layers need the context, compared with a pixelwise classifier."""

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
    """The flow with conditioning networks of some kinds set to 0 in all layers, so that they never learn (F24).

    Kinds are "ActNorm and W" and "couplings".
    """
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
    """The upper halves, (N, 1, 4, 8); if ``label``, with ten more channels that hold the class one-hot."""
    if not label:
        return images.contexts
    planes = F.one_hot(images.labels, 10).float()[:, :, None, None].expand(-1, -1, 4, 8)
    return torch.cat([images.contexts, planes], dim=1)


def neighbours(lower: Tensor, mean: Tensor) -> float:
    """The correlation of horizontal neighbours in lower halves, (N, 1, 4, 8), after a model's mean is subtracted."""
    rest = lower - mean
    return torch.corrcoef(torch.stack([rest[..., :-1].flatten(), rest[..., 1:].flatten()]))[0, 1].item()


def perceptron() -> nn.Module:
    """A network from upper halves to logits of lower halves, about as large as the flow of :func:`halves`."""
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
    """Train a model of lower halves of digits given the upper halves, for some hundred steps of 128 examples.

    Args:
        seed: seed of the run.
        without: the kinds of conditioning networks that never learn, as in :func:`dead`.
        label: whether the context holds the class as well.
        independent: whether the model is a pixelwise classifier instead of the flow.
        steps: number of updates.
        draws: samples per test context, and draws of the noise in the importance-weighted bound.

    Returns:
        Measures on the test halves:

        - ``test``: bits/dim, with log p averaged over ten draws of the noise.
        - ``test_closer``: bits/dim by the importance-weighted bound with all ``draws``, which is tighter.
        - ``margin``: how many nats a lower half is likelier given its own upper half than given another one.
        - ``rms``: by k, the root mean square error, in levels, of the average of k samples.
        - ``neighbours`` and ``neighbours_truth``: :func:`neighbours` of a sample, and of the true halves.
        - ``ink_ratio``: the root mean square error of a half's expected sum, divided by the samples' standard deviation
          of that sum.
        - ``ink_covered``: :func:`~nflows_lib.experiments.segmentation.covered`.
        - ``parameters``: their number.
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
