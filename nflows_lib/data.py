"""Data sets: points in the plane drawn on the spot, scikit-learn's digits, MNIST and CIFAR-10 from torchvision.

The sets that only the long runs read are in :mod:`nflows_lib.experiments.image_sets`.
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
    """Images as one tensor of raw integers, with their labels.

    Args:
        images: uint8, ``(N, C, H, W)``, from 0 to levels - 1.
        labels: int64, ``(N,)``.
        levels: number of grey levels n.
        contexts: what the images are predicted from, if that is the task: float32, ``(N, K, H', W')``, in [0, 1].
    """

    images: Tensor
    labels: Tensor
    levels: int
    contexts: Tensor | None = None

    def select(self, index: Tensor) -> Images:
        """Return the images at these positions, or where the mask is True, with their labels and contexts."""
        contexts = None if self.contexts is None else self.contexts[index]
        return Images(self.images[index], self.labels[index], self.levels, contexts)


# --- points in the plane ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of round Gaussians in the plane, all of one standard deviation, whose density is known exactly.

    Args:
        means: ``(M, 2)``, one row per Gaussian.
        std: the standard deviation, a positive number.
        weights: probability of each Gaussian, ``(M,)``, with sum 1; None: all the same.
    """

    means: Tensor
    std: float
    weights: Tensor | None = None

    def sample(self, n: int) -> Tensor:
        """Return n draws, ``(n, 2)``."""
        if self.weights is None:
            which = torch.randint(len(self.means), (n,))
        else:
            which = torch.multinomial(self.weights, n, replacement=True)
        return self.means[which] + self.std * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density in nats: ``(B, 2)`` to ``(B,)``."""
        log_weights = -math.log(len(self.means)) if self.weights is None else self.weights.log()
        values = []
        for rows in x.split(4096):  # with hundreds of means, all pairs at once would fill the memory
            squared = (rows[:, None, :] - self.means).square().sum(-1) / self.std**2
            values.append(torch.logsumexp(log_weights - 0.5 * squared, dim=1))
        return torch.cat(values) - math.log(2 * math.pi * self.std**2)


def two_gaussians() -> GaussianMixture:
    """Two Gaussians with means (-2, 0) and (2, 0) and standard deviation 0.5."""
    return GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5)


def four_gaussians() -> GaussianMixture:
    """Four Gaussians of standard deviation 0.5, at the corners of a square of side 4 around the origin."""
    return GaussianMixture(torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]), 0.5)


def moons(nodes: int = 128) -> GaussianMixture:
    """The density that ``toy("moons", n)`` is drawn from: uniform on two half circles, plus noise of std 0.075.

    The density is an integral over each half circle. Gauss's rule computes it, and its nodes are the means of the
    mixture. From 128 nodes on, the error of the rule is below what float32 resolves.

    Args:
        nodes: number of nodes per half circle.
    """
    node, weight = (torch.from_numpy(values).float() for values in np.polynomial.legendre.leggauss(nodes))
    angle = (node + 1) * math.pi / 2
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.tensor([1.0, 0.5]) - upper
    means = 1.5 * torch.cat([upper, lower]) + torch.tensor([-0.75, -0.375])
    return GaussianMixture(means, 0.075, torch.cat([weight, weight]) / 4)


def toy(name: str, n: int) -> Tensor:
    """Return n points in the plane, ``(n, 2)``, float32, drawn with torch's global generator.

    Args:
        name: "two_gaussians", "four_gaussians", or a set of scikit-learn, shifted and scaled: "moons", "circles",
            "s_curve", "swiss_roll". All lie roughly within [-3, 3] in both directions.
        n: number of points.

    Raises:
        ValueError: if name is not one of these.
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
    import sklearn.datasets  # imported here: a command that needs no data should not wait for it

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
    """Return one sheet of images, arranged row by row with white between them: ``(height, width, C)``, in [0, 1].

    Args:
        batch: ``(N, ...)``, each with C H W values from 0 to levels - 1.
        columns: number of images per row.
        levels: number of levels of the values.
        shape: ``(C, H, W)`` of one image.
        pad: width of the white lines, in pixels.
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
    """The 8x8 handwritten digits of scikit-learn: 1,797 images of 17 grey levels, of which every sixth is for testing.

    Args:
        part: "train" (1,498 images), "test" (299), or "all".

    Raises:
        ValueError: if part is none of these.
    """
    bunch = _sklearn_datasets().load_digits()
    keep = every_sixth(len(bunch.images), part)
    images = torch.tensor(bunch.images[keep], dtype=torch.uint8).unsqueeze(1)
    return Images(images, torch.tensor(bunch.target[keep]), levels=17)


def digit_halves(part: str = "train") -> Images:
    """The digits of :func:`digits`, cut in two: the upper half, 4x8, is the context, the lower half the image."""
    whole = digits(part)
    upper, lower = whole.images.chunk(2, dim=2)
    return Images(lower.contiguous(), whole.labels, whole.levels, contexts=upper / (whole.levels - 1))


def patches(part: str = "train", size: int = 16) -> Images:
    """Square colour patches of scikit-learn's two photographs, a temple and a flower, with 256 levels.

    The left five sixths of each photograph are for training, one patch at every fourth pixel. The rest is for testing,
    cut into patches that do not overlap. At size 16 there are 26,780 training and 312 test patches. The label says
    which photograph a patch is from.

    Args:
        part: "train" or "test".
        size: height and width of a patch, from 4 to 64.

    Raises:
        ValueError: if part is neither of these, or size is out of its range.
    """
    check_part(part)
    if not isinstance(size, int) or not 4 <= size <= 64:
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
        folder: where the data sets are stored; None: :func:`nflows_lib.settings.data_folder`.
        download: whether to fetch the set (11 MB) if it is missing.

    Raises:
        ValueError: if part is neither of these, or if a file is damaged.
        FileNotFoundError: if the set is not in the folder and download is False.
    """
    halves = {"train": 60_000, "t10k": 10_000}
    files = {f"MNIST/raw/{half}-images-idx3-ubyte": 16 + 784 * n for half, n in halves.items()}
    files |= {f"MNIST/raw/{half}-labels-idx1-ubyte": 8 + n for half, n in halves.items()}
    found = torchvision_set("MNIST", "11 MB", files, part, folder, download, train=part == "train")
    return Images(found.data.unsqueeze(1), found.targets, levels=256)


def cifar10(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """CIFAR-10 through torchvision: 32x32 colour photographs of ten classes, 50,000 to train on and 10,000 to test.

    Arguments and errors are those of :func:`mnist`. The download is 170 MB.
    """
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    sizes = 31_035_704, 31_035_320, 31_035_999, 31_035_696, 31_035_623, 31_035_526, 158
    files = {f"cifar-10-batches-py/{name}": size for name, size in zip(names, sizes, strict=True)}
    found = torchvision_set("CIFAR10", "170 MB", files, part, folder, download, train=part == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(found.targets), levels=256)


def check_part(part: str) -> None:
    """Raise a ValueError unless part is "train" or "test"."""
    if part not in ("train", "test"):
        raise ValueError(f'part: expected "train" or "test", got {part!r}')


def every_sixth(n: int, part: str) -> Tensor:
    """Return which of n examples belong to a part, ``(n,)``, bool: every sixth example is for testing.

    Raises:
        ValueError: if part is not "train", "test" or "all", or if it is "test" and there are fewer than six examples.
    """
    test = torch.arange(n) % 6 == 5
    keep = {"train": ~test, "test": test, "all": torch.ones_like(test)}
    if part not in keep:
        raise ValueError(f'part: expected "train", "test" or "all", got {part!r}')
    if part == "test" and n < 6:
        raise ValueError(f"part: expected at least 6 examples, of which every sixth is for testing, got {n}")
    return keep[part]


def torchvision_set(
    name: str, size: str, files: dict, part: str, folder: Path | str | None, download: bool, **options: Any
) -> Any:
    """Return one of torchvision's data sets; if it is missing or damaged, raise an error that says what to do.

    Args:
        name: name of the class in ``torchvision.datasets``.
        size: size of the download, for the error.
        files: the files that the set needs, by their paths in the folder, with their sizes in bytes, None if unknown.
        part: "train" or "test".
        folder: where the data sets are stored; None: :func:`nflows_lib.settings.data_folder`.
        download: whether to fetch the set if it is missing.
        options: further arguments of the class.

    Raises:
        ValueError: if part is neither "train" nor "test", or if a file is damaged.
        FileNotFoundError: if the set is not in the folder and download is False.
    """
    check_part(part)
    from torchvision import datasets  # only full runs need torchvision

    folder = Path(folder or settings.data_folder())
    try:
        return getattr(datasets, name)(folder, download=download, **options)
    except Exception as error:  # torchvision raises errors of many kinds for a damaged file
        paths = {folder / file: length for file, length in files.items()}
        place = next(iter(paths)).parent
        if all(path.exists() for path in paths):
            odd = " or ".join(path.name for path, length in paths.items() if path.stat().st_size != length)
            raise ValueError(f"folder: expected whole {name} files, got {odd or 'one'} damaged in {place}") from error
        if download or isinstance(error, OSError):
            raise  # the message says why the download or the reading failed
        raise FileNotFoundError(
            f'no {name} in {folder}: call {name.lower()}("{part}", download=True) once to fetch it ({size}), '
            f"or put {', '.join(path.name for path in paths)} into {place}, or name another folder in NFLOWS_DATA"
        ) from error
