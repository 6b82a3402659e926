"""Data sets: points in the plane drawn on the spot, scikit-learn's digits, MNIST and CIFAR-10 from torchvision.

What the long runs read beside these stands in :mod:`nflows_lib.experiments.image_sets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nflows_lib import settings


@dataclass(frozen=True)
class Images:
    """Images as one tensor of raw integers.

    images: uint8, (N, C, H, W), from 0 to levels - 1. labels: int64, (N,). levels: how many grey levels there are.
    contexts: what the images are to be told from, where that is the task: float32, (N, K, H', W'), in [0, 1].
    """

    images: Tensor
    labels: Tensor
    levels: int
    contexts: Tensor | None = None

    def select(self, index: Tensor) -> Images:
        """Those at these positions, or where the mask is True, with all that belongs to them."""
        contexts = None if self.contexts is None else self.contexts[index]
        return Images(self.images[index], self.labels[index], self.levels, contexts)


# --- points in the plane ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianMixture:
    """Round Gaussians in the plane, all of one standard deviation: a density known exactly.

    means: (K, 2). std: a positive number. weights: how likely each is, (K,), with sum 1; None: all equally.
    """

    means: Tensor
    std: float
    weights: Tensor | None = None

    def sample(self, n: int) -> Tensor:
        """n draws, (n, 2)."""
        if self.weights is None:
            which = torch.randint(len(self.means), (n,))
        else:
            which = torch.multinomial(self.weights, n, replacement=True)
        return self.means[which] + self.std * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log-density in nats: (B, 2) to (B,)."""
        log_weights = -math.log(len(self.means)) if self.weights is None else self.weights.log()
        values = []
        for rows in x.split(4096):  # all pairs at once, with hundreds of means, would fill the memory
            squared = (rows[:, None, :] - self.means).square().sum(-1) / self.std**2
            values.append(torch.logsumexp(log_weights - 0.5 * squared, dim=1))
        return torch.cat(values) - math.log(2 * math.pi * self.std**2)


def two_gaussians() -> GaussianMixture:
    """Means (-2, 0) and (2, 0), standard deviation 0.5."""
    return GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5)


def four_gaussians() -> GaussianMixture:
    """Means at the corners of a square of side 4 around the origin, standard deviation 0.5."""
    return GaussianMixture(torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]), 0.5)


def moons(nodes: int = 128) -> GaussianMixture:
    """The density that ``toy("moons", n)`` is drawn from: uniform on two half circles, plus noise of std 0.075.

    An integral over each half circle, by Gauss's rule, whose nodes are the means. From 128 nodes on the rule's
    error is below what float32 resolves.
    """
    node, weight = (torch.from_numpy(values).float() for values in np.polynomial.legendre.leggauss(nodes))
    angle = (node + 1) * math.pi / 2
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.tensor([1.0, 0.5]) - upper
    means = 1.5 * torch.cat([upper, lower]) + torch.tensor([-0.75, -0.375])
    return GaussianMixture(means, 0.075, torch.cat([weight, weight]) / 4)


def toy(name: str, n: int) -> Tensor:
    """n points in the plane, (n, 2), float32, drawn with torch's global generator.

    The sets, roughly within [-3, 3] in both directions: two_gaussians, four_gaussians; and from scikit-learn, shifted
    and scaled, moons, circles, s_curve, swiss_roll.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TOYS:
        raise ValueError(f"name: expected one of {', '.join(TOYS)}, got {name!r}")
    return TOYS[name](n)


def _plane(name: str, scale: float, shift: tuple[float, float], axes: list[int], **options) -> Callable[[int], Tensor]:
    def draw(n: int) -> Tensor:
        make = getattr(_sklearn_datasets(), f"make_{name}")
        points = make(n, random_state=int(torch.randint(2**31, ())), **options)[0][:, axes]
        return scale * torch.tensor(points, dtype=torch.float32) + torch.tensor(shift)

    return draw


def _sklearn_datasets() -> Any:
    import sklearn.datasets  # not at the top: a command that needs no data should not wait for it

    return sklearn.datasets


TOYS: dict[str, Callable[[int], Tensor]] = {
    "two_gaussians": lambda n: two_gaussians().sample(n),
    "four_gaussians": lambda n: four_gaussians().sample(n),
    "moons": _plane("moons", 1.5, (-0.75, -0.375), [0, 1], noise=0.05),
    "circles": _plane("circles", 2.5, (0.0, 0.0), [0, 1], noise=0.04, factor=0.5),
    "s_curve": _plane("s_curve", 1.3, (0.0, 0.0), [0, 2], noise=0.05),
    "swiss_roll": _plane("swiss_roll", 0.2, (0.0, 0.0), [0, 2], noise=0.3),
}


# --- images -----------------------------------------------------------------------------------------------------------


def tile(batch: Tensor, *, columns: int, levels: int, shape: Sequence[int], pad: int = 1) -> np.ndarray:
    """One sheet of images, row by row, as (height, width, C) values in [0, 1], white between them.

    batch: (N, ...), each with C H W values from 0 to levels - 1. shape: (C, H, W).
    """
    channels, height, width = shape
    pictures = (batch.detach().cpu().float().reshape(-1, *shape) / (levels - 1)).clamp(0, 1)
    rows = -(-len(pictures) // columns)
    sheet = np.ones((rows * (height + pad) + pad, columns * (width + pad) + pad, channels))
    for i, picture in enumerate(pictures):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        sheet[top : top + height, left : left + width] = picture.permute(1, 2, 0).numpy()
    return sheet


def digits(part: str = "train") -> Images:
    """The 8x8 handwritten digits that scikit-learn ships: 17 grey levels, 1,797 images, every sixth one for testing.

    Args:
        part: "train" (1,498 images), "test" (299), or "all".

    Raises:
        ValueError: another part.
    """
    bunch = _sklearn_datasets().load_digits()
    keep = every_sixth(len(bunch.images), part)
    images = torch.tensor(bunch.images[keep], dtype=torch.uint8).unsqueeze(1)
    return Images(images, torch.tensor(bunch.target[keep]), levels=17)


def digit_halves(part: str = "train") -> Images:
    """The digits of :func:`digits` in two: the lower half, 4x8, is to be told from the upper one, its context."""
    whole = digits(part)
    upper, lower = whole.images.chunk(2, dim=2)
    return Images(lower.contiguous(), whole.labels, whole.levels, contexts=upper / (whole.levels - 1))


def patches(part: str = "train", size: int = 16) -> Images:
    """Square colour patches of the two photographs that scikit-learn ships, a temple and a flower; 256 levels.

    The left five sixths of each photograph are for training, a patch at every fourth pixel; the rest is for testing,
    cut into patches that do not overlap. At size 16: 26,780 and 312. labels: which photograph.

    Args:
        part: "train" or "test".
        size: height and width of a patch, from 4 to 64.

    Raises:
        ValueError: another part, or a size out of range.
    """
    check_part(part)
    if not 4 <= size <= 64:
        raise ValueError(f"size: expected 4 to 64, got {size}")
    images, labels = [], []
    for label, photograph in enumerate(_sklearn_datasets().load_sample_images().images):
        pixels = torch.tensor(photograph).permute(2, 0, 1)  # (3, 427, 640)
        border = 5 * pixels.shape[2] // 6
        pixels, step = (pixels[..., :border], 4) if part == "train" else (pixels[..., border:], size)
        cut = pixels.unfold(1, size, step).unfold(2, size, step)  # (3, rows, columns, size, size)
        images.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size))
        labels.append(torch.full((len(images[-1]),), label))
    return Images(torch.cat(images).contiguous(), torch.cat(labels), levels=256)


def mnist(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """MNIST through torchvision: 28x28 handwritten digits, 256 grey levels, 60,000 to train on and 10,000 to test.

    Args:
        part: "train" or "test".
        folder: where the data sets lie or go, ``settings.data_folder()`` where None.
        download: fetch the set (11 MB) where it is missing.

    Raises:
        ValueError: another part.
        FileNotFoundError: the set is not in the folder, and download is False.
    """
    found = torchvision_set(
        "MNIST", "11 MB", "its four files", "MNIST/raw", part, folder, download, train=part == "train"
    )
    return Images(found.data.unsqueeze(1), found.targets, levels=256)


def cifar10(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """CIFAR-10 through torchvision: 32x32 colour photographs of ten things, 50,000 to train on and 10,000 to test.

    Arguments and errors as of :func:`mnist`. To fetch: 170 MB.
    """
    place = "cifar-10-batches-py"
    found = torchvision_set("CIFAR10", "170 MB", "its batches", place, part, folder, download, train=part == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(found.targets), levels=256)


def check_part(part: str) -> None:
    if part not in ("train", "test"):
        raise ValueError(f'part: expected "train" or "test", got {part!r}')


def every_sixth(n: int, part: str) -> Tensor:
    """Which of n examples a part holds, (n,), bool: every sixth one is for testing."""
    test = torch.arange(n) % 6 == 5
    keep = {"train": ~test, "test": test, "all": torch.ones_like(test)}
    if part not in keep:
        raise ValueError(f'part: expected "train", "test" or "all", got {part!r}')
    return keep[part]


def torchvision_set(
    name: str, size: str, files: str, place: str, part: str, folder: Path | str | None, download: bool, **options: Any
) -> Any:
    """One of torchvision's data sets; where it is missing, an error that says how to get it and where it goes."""
    check_part(part)
    from torchvision import datasets  # only full runs need torchvision

    folder = Path(folder or settings.data_folder())
    try:
        return getattr(datasets, name)(folder, download=download, **options)
    except RuntimeError as error:
        if download:
            raise  # it says what failed
        raise FileNotFoundError(
            f'no {name} in {folder}: call {name.lower()}("{part}", download=True) once to fetch it '
            f"({size}), or put {files} into {folder / place}, or name another folder in NFLOWS_DATA"
        ) from error
