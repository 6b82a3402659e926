"""Masks of what a photograph shows: the Weizmann horses, and how good predicted masks are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nflows_lib import data, settings
from nflows_lib.bijection import check_positive
from nflows_lib.data import Images
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, log_mean_exp, mean_and_error
from nflows_lib.experiments import image_sets
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow

# --- photographs with masks -------------------------------------------------------------------------------------------


def horses(part: str = "train", folder: Path | str | None = None, *, size: int = 32) -> Images:
    """The Weizmann horses (Borenstein and Ullman): masks, 1 where the horse is, to be told from photographs.

    They are read from ``weizmann_horse_db``: two folders, ``horse`` and ``mask``, with images of the same names (a mask
    is 255 where the horse is). Both are squashed to a square. No split is published: here, in the order of their names,
    every sixth of the 327 is for testing, unless the same photograph is trained on. Nine are in the set twice, with
    masks by two hands; that leaves 273 to train on and 51 to test.

    Args:
        part: "train", "test" or "all".
        folder: the folder that ``weizmann_horse_db`` lies in, ``settings.data_folder()`` where None.
        size: height and width to resize to.

    Raises:
        ValueError: another part, size is below 1, a photograph without a mask, or masks in which nothing is bright.
        FileNotFoundError: there is no such folder, or no photograph in it.
    """
    home = Path(folder or settings.data_folder()) / "weizmann_horse_db"
    photographs = sorted(path for path in home.glob("horse/*") if path.suffix.lower() in image_sets.SUFFIXES)
    if not photographs:
        raise FileNotFoundError(f"no photographs in {home}/horse: put the folders horse and mask there")
    masks = {path.stem: path for path in home.glob("mask/*") if path.suffix.lower() in image_sets.SUFFIXES}
    lonely = [path.name for path in photographs if path.stem not in masks]
    if lonely:
        raise ValueError(f"folder: expected a mask for every photograph, got none for {', '.join(lonely[:5])}")
    pairs = ((Image.open(path), Image.open(masks[path.stem]).convert("L")) for path in photographs)
    everything = _masks(pairs, torch.zeros(len(photographs), dtype=torch.int64), size)
    keep = data.every_sixth(len(photographs), part)
    if part == "test":
        for i, j in twins(everything.contexts):
            if keep[i] != keep[j]:
                keep[[i, j]] = False
    return everything.select(keep)


def twins(photographs: Tensor) -> list[tuple[int, int]]:
    """Pairs i < j of photographs, (N, C, H, W) in [0, 1], that are the same to within 0.08 (root mean square)."""
    flat = photographs.flatten(1)
    distance = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
    return [(i, j) for i, j in (distance < 0.08).nonzero().tolist() if i < j]


def random_view(masks: Tensor, photographs: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and photograph seen from elsewhere, both alike: mirrored, shifted, turned and zoomed at random.

    The photograph's brightness and contrast change, too. What comes into sight from beyond a border is a copy of it.

    Args:
        masks: (B, C, H, W), integers, which stay those that they are.
        photographs: (B, K, H', W'), in [0, 1].
    """
    n, device = len(masks), masks.device

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, device=device)

    angle, zoom = between(-0.2, 0.2), between(0.75, 1.1)
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [
        torch.stack([mirror * cos, -sin, between(-0.2, 0.2)], 1),
        torch.stack([mirror * sin, cos, between(-0.2, 0.2)], 1),
    ]
    where = torch.stack(rows, 1)

    def seen(images: Tensor, mode: str) -> Tensor:
        grid = F.affine_grid(where, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)

    contrast, light = (values[:, None, None, None] for values in (between(0.7, 1.3), between(-0.15, 0.15)))
    photographs = ((seen(photographs, "bilinear") - 0.5) * contrast + 0.5 + light).clamp(0, 1)
    return seen(masks.float(), "nearest").to(masks.dtype), photographs


def _masks(pairs: Iterable[tuple[Image.Image, Image.Image]], labels: Tensor, size: int) -> Images:
    """Pairs of a photograph and a mask, bright on what it shows: two levels, with the photographs as contexts."""
    check_positive(size=size)
    masks = torch.empty(len(labels), 1, size, size, dtype=torch.uint8)
    photographs = torch.empty(len(labels), 3, size, size)
    for i, (photograph, mask) in enumerate(pairs):
        small = photograph.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        photographs[i] = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        masks[i, 0] = torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.BILINEAR)) > 127)
    if not masks.any():
        raise ValueError("folder: expected masks that are bright, 255, on what they show, got none above 127")
    return Images(masks, labels, levels=2, contexts=photographs)


# --- how good predicted masks are: overlap, calibration, what a distribution over masks is worth ----------------------


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
    p, hit = probabilities.flatten().cpu().double(), true.flatten().cpu().double()  # mps has no float64
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
def metrics(model: Flow | PixelClassifier, images: Images, samples: int = 10, most: int = 100) -> dict[str, Any]:
    """What ``run.json`` says of a model of masks given photographs, on these images.

    - ``iou``: of the mean of ``samples`` samples, thresholded at 1/2, with its standard error over images.
    - ``iou_most``: of the mean of ``most`` samples; ``iou_one``: of single samples.
    - ``iou_between``: of two samples with each other; it is 1 if there is no diversity.
    - ``iou_cold``: as ``iou``, of samples at temperature 0.5.
    - ``calibration`` and its ``calibration_error``: of the mean of ``most`` samples.
    - ``area_covered``: :func:`covered`, of the areas of all samples.
    - ``bits_per_dim_most``: -log2 of the mean likelihood over ``most`` draws of the noise, a tighter bound than
      the mean of the logs.
    - ``shuffled``: by how many nats a mask is likelier given its own photograph than given another image's.

    For a :class:`~nflows_lib.experiments.pixelwise.PixelClassifier` the mean is what its network says, without samples.
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
