"""Data sets: points in the plane drawn on the spot, digits that scikit-learn ships, images that torchvision reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sklearn.datasets
import torch
from torch import Tensor

from nflows_lib import settings


@dataclass(frozen=True)
class Images:
    """Images as one tensor of raw integers.

    images: uint8, (N, C, H, W), from 0 to levels - 1. labels: int64, (N,). levels: how many grey levels there are.
    """

    images: Tensor
    labels: Tensor
    levels: int


# --- points in the plane ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianMixture:
    """Equally likely round Gaussians in the plane, all of one standard deviation: a density known exactly.

    means: (K, 2). std: a positive number.
    """

    means: Tensor
    std: float

    def sample(self, n: int) -> Tensor:
        """n draws, (n, 2)."""
        which = torch.randint(len(self.means), (n,))
        return self.means[which] + self.std * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log-density in nats: (B, 2) to (B,)."""
        squared = (x[:, None, :] - self.means).square().sum(-1) / self.std**2
        constant = math.log(2 * math.pi * self.std**2) + math.log(len(self.means))
        return torch.logsumexp(-0.5 * squared, dim=1) - constant


def two_gaussians() -> GaussianMixture:
    """Means (-2, 0) and (2, 0), standard deviation 0.5."""
    return GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5)


def four_gaussians() -> GaussianMixture:
    """Means at the corners of a square of side 4 around the origin, standard deviation 0.5."""
    return GaussianMixture(torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]), 0.5)


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


def _plane(
    maker: Callable, scale: float, shift: tuple[float, float], axes: list[int], **options
) -> Callable[[int], Tensor]:
    def draw(n: int) -> Tensor:
        points = maker(n, random_state=int(torch.randint(2**31, ())), **options)[0][:, axes]
        return scale * torch.tensor(points, dtype=torch.float32) + torch.tensor(shift)

    return draw


TOYS: dict[str, Callable[[int], Tensor]] = {
    "two_gaussians": lambda n: two_gaussians().sample(n),
    "four_gaussians": lambda n: four_gaussians().sample(n),
    "moons": _plane(sklearn.datasets.make_moons, 1.5, (-0.75, -0.375), [0, 1], noise=0.05),
    "circles": _plane(sklearn.datasets.make_circles, 2.5, (0.0, 0.0), [0, 1], noise=0.04, factor=0.5),
    "s_curve": _plane(sklearn.datasets.make_s_curve, 1.3, (0.0, 0.0), [0, 2], noise=0.05),
    "swiss_roll": _plane(sklearn.datasets.make_swiss_roll, 0.2, (0.0, 0.0), [0, 2], noise=0.3),
}


# --- images -----------------------------------------------------------------------------------------------------------


def digits(part: str = "train") -> Images:
    """The 8x8 handwritten digits that scikit-learn ships: 17 grey levels, 1,797 images, every sixth one for testing.

    Args:
        part: "train" (1,498 images), "test" (299), or "all".

    Raises:
        ValueError: another part.
    """
    bunch = sklearn.datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    test = torch.arange(len(images)) % 6 == 5
    keep = {"train": ~test, "test": test, "all": torch.ones_like(test)}
    if part not in keep:
        raise ValueError(f'part: expected "train", "test" or "all", got {part!r}')
    return Images(images[keep[part]], labels[keep[part]], levels=17)


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
    if part not in ("train", "test"):
        raise ValueError(f'part: expected "train" or "test", got {part!r}')
    from torchvision.datasets import MNIST  # only full runs need torchvision

    folder = Path(folder or settings.data_folder())
    try:
        found = MNIST(folder, train=part == "train", download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no MNIST in {folder}: call mnist(download=True) once to fetch it (11 MB), or put its four files into "
            f"{folder / 'MNIST' / 'raw'}, or name another folder in NFLOWS_DATA"
        ) from error
    return Images(found.data.unsqueeze(1), found.targets, levels=256)
