"""Small data sets in the formats of the real files, on which the functions that read them are tested."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from nflows_lib import data


def accept_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept files with any checksum as the real ones."""
    for module in ("cifar", "svhn", "celeba", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).exists())


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def plain(grey: int, width: int = 12, height: int = 9) -> np.ndarray:
    """A picture of a single grey, (height, width, 3)."""
    return np.full((height, width, 3), grey, np.uint8)


def noise(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """n random images, (n, *shape), uint8."""
    return np.random.default_rng(seed).integers(256, size=(n, *shape), dtype=np.uint8)


def assert_images(found: data.Images, shape: tuple[int, ...], labels: list[int]) -> None:
    assert found.images.shape == (len(labels), *shape)
    assert (found.images.dtype, found.labels.dtype, found.levels) == (torch.uint8, torch.int64, 256)
    assert found.images.is_contiguous()
    assert found.labels.tolist() == labels


def assert_masks(found: data.Images, n: int, size: int) -> None:
    assert (found.images.shape, found.contexts.shape) == ((n, 1, size, size), (n, 3, size, size))
    assert (found.images.dtype, found.contexts.dtype) == (torch.uint8, torch.float32)
    assert (found.labels.dtype, found.labels.shape, found.levels) == (torch.int64, (n,), 2)
    assert set(found.images.unique().tolist()) <= {0, 1}
    assert 0 <= found.contexts.min() <= found.contexts.max() <= 1


# --- one function for each format, which writes the images that it is given -------------------------------------------


def write_mnist(folder: Path, part: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write the files of MNIST, each a header of big-endian integers followed by bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, magic, values in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
        header = struct.pack(f">{1 + values.dim()}i", magic, *values.shape)
        file = {"train": "train", "test": "t10k"}[part]
        (raw / f"{file}-{name}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_cifar10(folder: Path, images: np.ndarray, labels: Sequence[int]) -> None:
    """Write the files of CIFAR-10 with images (N, 3, 32, 32): five batches to train on, and an equal one to test."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    each = len(images) // 6
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(each * i, each * (i + 1))
        batch = {"data": images[rows].reshape(each, 3072), "labels": list(labels[rows])}
        (batches / name).write_bytes(pickle.dumps(batch))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_svhn(folder: Path, part: str, images: np.ndarray, labels: Sequence[int]) -> None:
    """Write a MATLAB file of SVHN, in which the digit 0 is written as 10."""
    y = np.array([[label or 10] for label in labels], np.uint8)
    scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": y})


def write_celeba(folder: Path, greys: Sequence[int], parts: Sequence[int]) -> None:
    """Write the files of CelebA with faces of a single grey; parts are 0 to train on, 1 for validation, 2 to test."""
    lists = folder / "celeba"
    names = [f"{i}.jpg" for i in range(len(greys))]
    for name, grey in zip(names, greys, strict=True):
        save_picture(lists / "img_align_celeba" / name, plain(grey, 178, 218))
    for name, header in (
        ("list_attr_celeba", "2\na b\n"),
        ("list_bbox_celeba", "2\na b\n"),
        ("list_landmarks_align_celeba", "2\na b\n"),
        ("identity_CelebA", ""),
    ):
        (lists / f"{name}.txt").write_text(header + "".join(f"{image} 1 -1\n" for image in names))
    rows = zip(names, parts, strict=True)
    (lists / "list_eval_partition.txt").write_text("".join(f"{image} {part}\n" for image, part in rows))


def write_flowers102(folder: Path, greys: Sequence[int], labels: Sequence[int], **parts: Sequence[int]) -> None:
    """Write the files of Flowers-102 with photographs of a single grey; labels and numbers in parts begin at 1."""
    place = folder / "flowers-102"
    for i, grey in enumerate(greys, 1):
        save_picture(place / "jpg" / f"image_{i:05d}.jpg", plain(grey))
    scipy.io.savemat(place / "imagelabels.mat", {"labels": np.array([labels])})
    scipy.io.savemat(place / "setid.mat", {name: [list(numbers)] for name, numbers in parts.items()})


def write_flowers5(folder: Path, greys: Sequence[int]) -> None:
    """Write a folder of grey photographs of several sizes and suffixes: the first half are roses, the others tulips."""
    for i, grey in enumerate(greys):
        kind, suffix = ("rose", "tulip")[2 * i // len(greys)], ("jpg", "png", "jpeg", "png", "JPG", "png")[i % 6]
        save_picture(folder / "flowers5" / kind / f"{i:02d}.{suffix}", plain(grey, 90, 70 + 5 * i))


def save_horse(folder: Path, name: str, grey: int, mask: str = "1.png", mode: str = "L", right: int = 6) -> None:
    """Write a grey photograph, 12x9, and a mask, 24x18, whose rightmost columns, twice ``columns``, are bright."""
    save_picture(folder / "weizmann_horse_db" / "horse" / name, plain(grey))
    pixels = np.zeros((18, 24), np.uint8)
    pixels[:, 24 - 2 * right :] = 255
    path = folder / "weizmann_horse_db" / "mask" / Path(name).with_suffix(Path(mask).suffix).name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


# --- a few images of every data set that a run can read from files ----------------------------------------------------


def _some_mnist(folder: Path) -> None:
    for part in ("train", "test"):
        write_mnist(folder, part, torch.from_numpy(noise(6, (28, 28, 1))).squeeze(3), torch.arange(6))


def _some_svhn(folder: Path) -> None:
    for part in ("train", "test"):
        write_svhn(folder, part, noise(6, (3, 32, 32)), range(6))


def _some_horses(folder: Path) -> None:
    for i in range(12):
        save_horse(folder, f"horse{i:03d}.png", 22 * i)  # less, and they are each other's twins


# By the data set's name in the table of runs: a function that writes at least four images to train on and two to test.
SETS: dict[str, Callable[[Path], None]] = {
    "mnist": _some_mnist,
    "cifar10": lambda folder: write_cifar10(folder, noise(12, (3, 32, 32)), [i % 10 for i in range(12)]),
    "svhn": _some_svhn,
    "celeba": lambda folder: write_celeba(folder, [0, 50, 100, 150, 200, 250], [0, 2, 0, 0, 2, 0]),
    "flowers102": lambda folder: write_flowers102(
        folder, [40, 80, 120, 160, 200, 240], [1, 2, 3, 1, 2, 3], trnid=[1, 2], valid=[3, 4], tstid=[5, 6]
    ),
    "flowers5": lambda folder: write_flowers5(folder, range(0, 240, 20)),
    "horses": _some_horses,
}
