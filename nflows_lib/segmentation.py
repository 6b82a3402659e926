"""How good a predicted mask is: overlap, calibration, and what a distribution over masks is worth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nflows_lib.data import Images
from nflows_lib.distributions import random_state_kept
from nflows_lib.flow import Flow
from nflows_lib.pixelwise import PixelClassifier
from nflows_lib.training import log_likelihoods, log_mean_exp, mean_and_error


def iou(predicted: Tensor, true: Tensor) -> Tensor:
    """Intersection over union of the pixels that are 1: (N, ...), booleans or 0 and 1, twice, to (N,), in [0, 1].

    Two empty masks agree: 1.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predicted: expected shape {tuple(true.shape)}, that of true, got {tuple(predicted.shape)}")
    predicted, true = predicted.bool().flatten(1), true.bool().flatten(1)
    union = (predicted | true).sum(1)
    return torch.where(union > 0, (predicted & true).sum(1) / union, 1.0)


def calibration(probabilities: Tensor, true: Tensor, bins: int = 10) -> tuple[list[tuple[float, float, int]], float]:
    """Whether pixels of which the model says "1 with probability p" are 1 in a share p of the cases.

    Args:
        probabilities: in [0, 1], any shape.
        true: of the same shape, booleans or 0 and 1.
        bins: number of equal intervals that the probabilities are sorted into.

    Returns:
        For each interval that is not empty the mean probability, the share of ones, the number of pixels; and the
        expected calibration error, the mean of ``|share - probability|`` over all pixels (Guo et al. 2017, eq. 3).

    Raises:
        ValueError: the shapes differ, a probability is out of range, or bins is below 1.
    """
    if probabilities.shape != true.shape:
        got = tuple(probabilities.shape)
        raise ValueError(f"probabilities: expected shape {tuple(true.shape)}, that of true, got {got}")
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    p, hit = probabilities.flatten().double(), true.flatten().double()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities: expected values in [0, 1], got some from {p.min():g} to {p.max():g}")
    which = (p * bins).long().clamp(max=bins - 1)
    rows = []
    for i in which.unique().tolist():
        inside = which == i
        rows.append((p[inside].mean().item(), hit[inside].mean().item(), int(inside.sum())))
    error = sum(count * abs(share - mean) for mean, share, count in rows) / max(len(p), 1)
    return rows, error


def draws(model: Flow | PixelClassifier, contexts: Tensor, n: int = 100, temperature: float = 1.0) -> Tensor:
    """n samples for each of B contexts: ``(n, B, *shape)``, floats, on the CPU."""
    return torch.stack([model.sample(len(contexts), temperature, contexts).cpu() for _ in range(n)]).float()


def covered(drawn: Tensor, true: Tensor) -> float:
    """Share of images for which the sum of the true one's pixels is in the middle 80 % of the sums of those drawn.

    drawn: (n, B, ...). true: (B, ...).
    """
    sums = drawn.flatten(2).sum(2)
    low, high = (sums.quantile(q, dim=0) for q in (0.1, 0.9))
    true_sum = true.flatten(1).sum(1)
    return ((low <= true_sum) & (true_sum <= high)).float().mean().item()


@torch.no_grad()
def figures(model: Flow | PixelClassifier, images: Images, samples: int = 10, most: int = 100) -> dict[str, Any]:
    """What ``run.json`` says of a model of masks given photographs, on these images.

    ``iou``: of the mean of so many samples, thresholded at 1/2, with its standard error over images; ``iou_most``: of
    the mean of the most; ``iou_one``: of single samples; ``iou_between``: of two samples with each other, 1 if there is
    no diversity; ``iou_cold``: as ``iou``, of samples at temperature 0.5. For a :class:`PixelClassifier` the mean is
    what its network says, without samples. ``calibration`` and its ``error`` are those of that mean (for a flow, of the
    most samples). ``area_covered``: :func:`covered`, of the areas of all samples. ``bits_per_dim_most``: -log2 of the
    mean likelihood over the most draws of the noise, a closer bound than the mean of logs. ``shuffled``: by how many
    nats a mask is likelier given its own photograph than another's.
    """
    if not 1 <= samples <= most or most < 2:
        raise ValueError(f"samples, most: expected 1 <= samples <= most and most >= 2, got {samples} and {most}")
    contexts, true = images.contexts.to(next(model.parameters()).device), images.images
    with random_state_kept(contexts.device):
        torch.manual_seed(0)
        drawn = draws(model, contexts, most)
        if isinstance(model, PixelClassifier):
            few = many = cold = model.mean(contexts).cpu()
        else:
            few, many, cold = drawn[:samples].mean(0), drawn.mean(0), draws(model, contexts, samples, 0.5).mean(0)
        nats = torch.stack([model(true.to(contexts.device), contexts).cpu() for _ in range(most)])
        own, others = (log_likelihoods(model, true, c, draws=5) for c in (contexts, contexts.roll(1, 0)))
    closer = log_mean_exp(nats)
    mean, error = mean_and_error(iou(few > 0.5, true))
    rows, calibration_error = calibration(many, true)
    return {
        "samples": samples,
        "iou": mean,
        "iou_error": error,
        "most": most,
        "iou_most": iou(many > 0.5, true).mean().item(),
        "iou_one": torch.stack([iou(one, true) for one in drawn]).mean().item(),
        "iou_between": torch.stack([iou(*pair) for pair in drawn[: most // 2 * 2].split(2)]).mean().item(),
        "iou_cold": iou(cold > 0.5, true).mean().item(),
        "area_covered": covered(drawn, true),
        "bits_per_dim_most": -closer.mean().item() / (true[0].numel() * math.log(2)),
        "calibration": [[round(p, 4), round(share, 4), count] for p, share, count in rows],
        "calibration_error": calibration_error,
        "shuffled": (own - others).mean().item(),
    }
