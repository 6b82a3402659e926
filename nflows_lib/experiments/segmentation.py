"""Segmentation: masks of horses in photographs, and measures of predicted masks."""

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
from nflows_lib.checks import check_at_least, check_shape, check_tensor
from nflows_lib.data import Images
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, log_mean_exp, mean_and_error
from nflows_lib.experiments import image_sets
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow

# --- photographs with masks -------------------------------------------------------------------------------------------


def horses(part: str = "train", folder: Path | str | None = None, *, size: int = 32) -> Images:
    """The Weizmann horses (Borenstein and Ullman): masks, 1 on the horse and 0 elsewhere, with photographs as contexts.

    They are read from ``weizmann_horse_db``, which has two folders, ``horse`` and ``mask``, with images of the same
    names. In a mask's file the horse is 255. Both images are squashed to a square. No split is published. Here every
    sixth of the 327 images, in the order of their names, is for testing, unless the same photograph is also trained on:
    nine photographs are in the set twice, with masks by two annotators. That leaves 273 to train on and 51 to test.

    Args:
        part: "train", "test" or "all".
        folder: the folder that holds ``weizmann_horse_db``; ``settings.data_folder()`` if None.
        size: height and width to resize to.

    Raises:
        ValueError: if part is another word, if size is below 1, if a photograph has no mask, if an image cannot be
            read, if no mask has a bright pixel, or if no photograph is left to test on.
        FileNotFoundError: if the folder does not exist or holds no photograph.
    """
    home = Path(folder or settings.data_folder()) / "weizmann_horse_db"
    photographs = image_sets.picture_files(home.glob("horse/*"))
    if not photographs:
        raise FileNotFoundError(f"no photographs in {home}/horse: put the folders horse and mask into {home}")
    masks = {path.stem: path for path in image_sets.picture_files(home.glob("mask/*"))}
    lonely = [path.name for path in photographs if path.stem not in masks]
    if lonely:
        raise ValueError(f"folder: expected a mask for every photograph, got none for {', '.join(lonely[:5])}")
    keep = data.every_sixth(len(photographs), part)
    pairs = ([image_sets.read_picture(file) for file in (path, masks[path.stem])] for path in photographs)
    everything = _masks(pairs, torch.zeros(len(photographs), dtype=torch.int64), size)
    if part == "test":
        for i, j in twins(everything.contexts):
            if keep[i] != keep[j]:
                keep[[i, j]] = False
        if not keep.any():
            raise ValueError("folder: expected a photograph to test on that is not trained on, too, got none")
    return everything.select(keep)


def twins(photographs: Tensor) -> list[tuple[int, int]]:
    """The pairs i < j of photographs, (N, C, H, W) in [0, 1], whose root mean square difference is below 0.08."""
    check_tensor("photographs", photographs)
    flat = photographs.flatten(1)
    distance = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
    return [(i, j) for i, j in (distance < 0.08).nonzero().tolist() if i < j]


def random_view(masks: Tensor, photographs: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror, shift, turn and zoom each mask and its photograph at random, both in the same way.

    The photograph's brightness and contrast change, too. Pixels beyond a border are copies of the border.

    Args:
        masks: (B, C, H, W), integers; no other integers appear in the result.
        photographs: (B, C_x, H', W'), in [0, 1].

    Returns:
        The changed masks and photographs, of the same shapes and types.

    Raises:
        ValueError: if masks or photographs are not images, or their numbers differ.
    """
    for name, images in (("masks", masks), ("photographs", photographs)):
        check_tensor(name, images)
        if images.dim() != 4 or len(images) != len(masks):
            raise ValueError(f"{name}: expected shape ({len(masks)}, C, H, W), got {tuple(images.shape)}")
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


def _masks(pairs: Iterable[Iterable[Image.Image]], labels: Tensor, size: int) -> Images:
    """Binary masks from pairs of a photograph and a mask that is bright on the object; the photographs are contexts."""
    check_at_least(1, size=size)
    masks = torch.empty(len(labels), 1, size, size, dtype=torch.uint8)
    photographs = torch.empty(len(labels), 3, size, size)
    for i, (photograph, mask) in enumerate(pairs):
        small = photograph.resize((size, size), Image.Resampling.BICUBIC)
        photographs[i] = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        mask = mask.convert("L").resize((size, size), Image.Resampling.BILINEAR)
        masks[i, 0] = torch.from_numpy(np.array(mask) > 127)
    if not masks.any():
        raise ValueError("folder: expected masks that are bright, 255, on what they show, got none above 127")
    return Images(masks, labels, levels=2, contexts=photographs)


# --- measures of predicted masks: overlap, calibration, likelihood ----------------------------------------------------


def iou(predicted: Tensor, true: Tensor) -> Tensor:
    """Intersection over union (IoU) of the pixels that are 1, for each of N pairs of masks: (N,), in [0, 1].

    Both arguments have the shape (N, ...) and hold booleans, or 0 and 1. Two empty masks have an IoU of 1.

    Raises:
        ValueError: if the shapes differ or have no dimension for pixels, or if a value is neither 0 nor 1.
    """
    _check_pair("predicted", predicted, true)
    _check_binary("predicted", predicted)
    if true.dim() < 2:
        raise ValueError(f"true: expected shape (N, ...), got {tuple(true.shape)}")
    predicted, true = predicted.bool().flatten(1), true.bool().flatten(1)
    union = (predicted | true).sum(1)
    return torch.where(union > 0, (predicted & true).sum(1) / union, 1.0)


def calibration(probabilities: Tensor, true: Tensor, bins: int = 10) -> tuple[list[tuple[float, float, int]], float]:
    """How often pixels are 1, compared with the probabilities that a model gives them.

    Args:
        probabilities: the model's probabilities of a 1, in [0, 1], of any shape.
        true: the true pixels, of the same shape, booleans or 0 and 1.
        bins: number of equal intervals that the probabilities are sorted into.

    Returns:
        Two things: for each interval that is not empty, the mean probability, the share of ones and the number of
        pixels; and the expected calibration error, the mean of ``|share - probability|`` over all pixels (Guo et al.
        2017, eq. 3).

    Raises:
        ValueError: if the shapes differ, if a probability is outside of [0, 1], if a true pixel is neither 0 nor 1, or
            if bins is not a whole number of at least 1.
    """
    _check_pair("probabilities", probabilities, true)
    check_at_least(1, bins=bins)
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


def _check_pair(name: str, values: Tensor, true: Tensor) -> None:
    """Raise a ValueError unless both are tensors of the same shape and the true ones hold only 0 and 1."""
    check_tensor(name, values)
    check_tensor("true", true)
    if values.shape != true.shape:
        raise ValueError(f"{name}: expected shape {tuple(true.shape)}, that of true, got {tuple(values.shape)}")
    _check_binary("true", true)


def _check_binary(name: str, values: Tensor) -> None:
    """Raise a ValueError unless all values are 0 or 1, or False or True."""
    wrong = values[(values != 0) & (values != 1)]
    if len(wrong):
        raise ValueError(f"{name}: expected only 0 and 1, got {wrong[0].item():g}")


def draws(model: Flow | PixelClassifier, contexts: Tensor, n: int = 100, temperature: float = 1.0) -> Tensor:
    """n samples for each of B contexts: ``(n, B, *shape)``, floats, on the CPU.

    Raises:
        ValueError: if n is below 1, or if the model refuses the contexts or the temperature.
    """
    check_at_least(1, n=n)
    check_tensor("contexts", contexts)
    return torch.stack([model.sample(len(contexts), temperature, contexts).cpu() for _ in range(n)]).float()


def covered(drawn: Tensor, true: Tensor) -> float:
    """The coverage of the central 80 % interval of the sum of the pixels.

    This is the share of images whose true sum lies between the 10 % and the 90 % quantile of the sums of the samples.
    In a calibrated model it is about 0.8.

    Args:
        drawn: n samples for each of B images, (n, B, ...).
        true: the true images, (B, ...).

    Raises:
        ValueError: if a sample has another shape than the true images.
    """
    check_tensor("true", true)
    check_shape("drawn", drawn, true.shape)
    sums = drawn.flatten(2).sum(2)
    low, high = (sums.quantile(q, dim=0) for q in (0.1, 0.9))
    true_sum = true.flatten(1).sum(1)
    return ((low <= true_sum) & (true_sum <= high)).float().mean().item()


@torch.no_grad()
def metrics(model: Flow | PixelClassifier, images: Images, samples: int = 10, most: int = 100) -> dict[str, Any]:
    """The metrics in ``run.json`` of a model of masks given photographs, measured on these images.

    - ``iou``: :func:`iou` of the true mask with the mean of ``samples`` samples, thresholded at 1/2;
      ``iou_error``: its standard error over images.
    - ``iou_most``: the same with the mean of ``most`` samples; ``iou_one``: with single samples.
    - ``iou_between``: :func:`iou` of two samples with each other; it is 1 if all samples are equal.
    - ``iou_cold``: the same as ``iou``, with samples at temperature 0.5.
    - ``calibration`` and ``calibration_error``: :func:`calibration` of the mean of ``most`` samples.
    - ``area_covered``: :func:`covered`, for the area of the mask.
    - ``bits_per_dim_most``: bits/dim by the importance-weighted bound with ``most`` draws of the noise, which is
      tighter than the mean of the logs.
    - ``shuffled``: how many nats a mask is likelier given its own photograph than given another image's.

    For a :class:`~nflows_lib.experiments.pixelwise.PixelClassifier` the network's own probabilities take the place of
    the mean of samples.

    Raises:
        ValueError: if not 1 <= samples <= most, if most is below 2, or if the images have no contexts.
    """
    if images.contexts is None:
        raise ValueError("images: expected images with contexts, got none")
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
